//! Registers: each thread loads what it has, spins or sleeps in a system call with all of it live, and stores it again when told.

use crate::kit::{Kit, Numbers, sys};
use std::{
    arch::asm,
    io,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// 64-byte aligned room for any register file.
#[repr(C, align(64))]
#[derive(Clone, PartialEq)]
struct Room([u64; 1088]);

impl Room {
    fn random(seed: u64) -> Box<Room> {
        let mut numbers = Numbers::new(seed);
        let mut room = Box::new(Room([0; 1088]));
        room.0.iter_mut().for_each(|w| *w = numbers.draw());
        room
    }
    fn empty() -> Box<Room> {
        Box::new(Room([0; 1088]))
    }
}

/// Waits while `[flag]` is 0: spins, or sleeps a millisecond at a time in nanosleep when `[flag + 4]` is 1. Uses rax, rcx, rdi, rsi and
/// r11 only.
macro_rules! hold {
    () => {
        "
        22: cmp dword ptr [r15], 0
        jne 24f
        cmp dword ptr [r15 + 4], 0
        jne 23f
        pause
        jmp 22b
        23: lea rdi, [r15 + 16]
        xor esi, esi
        mov eax, 35
        syscall
        jmp 22b
        24:
        "
    };
}

/// Flag, how to wait, and the timespec of the sleep.
#[repr(C)]
struct Gate {
    go: AtomicU32,
    sleeps: u32,
    pad: u64,
    second: i64,
    nano: i64,
}

impl Gate {
    fn new(sleeps: bool) -> Gate {
        Gate {
            go: AtomicU32::new(0),
            sleeps: sleeps.into(),
            pad: 0,
            second: 0,
            nano: 1_000_000,
        }
    }
}

type Kind = (&'static str, fn(&Gate) -> Result<(), String>);

fn general(gate: &Gate) -> Result<(), String> {
    let put = Room::random(1);
    let mut got = Room::empty();
    // rax, rcx, rdi, rsi and r11 belong to the loop, rsp to the stack, r15 to the gate; r14 holds where to put the rest.
    // SAFETY: everything changed is declared, or saved and restored; the pointers are to live boxes.
    unsafe {
        asm!(
            "push rbx", "push rbp", "push r14",
            "mov rbx, [rax]", "mov rbp, [rax + 8]", "mov rdx, [rax + 16]", "mov r8, [rax + 24]", "mov r9, [rax + 32]",
            "mov r10, [rax + 40]", "mov r12, [rax + 48]", "mov r13, [rax + 56]", "mov r14, [rax + 64]",
            hold!(),
            "mov rax, [rsp]",
            "mov [rax], rbx", "mov [rax + 8], rbp", "mov [rax + 16], rdx", "mov [rax + 24], r8", "mov [rax + 32], r9",
            "mov [rax + 40], r10", "mov [rax + 48], r12", "mov [rax + 56], r13", "mov [rax + 64], r14",
            "pop r14", "pop rbp", "pop rbx",
            inout("rax") put.0.as_ptr() => _, in("r14") got.0.as_mut_ptr(), in("r15") gate,
            out("rcx") _, out("rdx") _, out("rdi") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _,
        );
    }
    same("general registers", &put.0[..9], &got.0[..9])
}

fn same(what: &str, put: &[u64], got: &[u64]) -> Result<(), String> {
    match put.iter().zip(got).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: word {i} now {:#x}, before {:#x}", got[i], put[i])),
    }
}

fn avx512(gate: &Gate) -> Result<(), String> {
    let put = Room::random(2);
    let mut got = Room::empty();
    // SAFETY: only called when the cpu has AVX-512; the vector and mask registers are declared, the boxes are large enough.
    unsafe {
        asm!(
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 zmm\\n, [rdx + 64 * \\n]",
            ".endr",
            ".irp n, 0,1,2,3,4,5,6,7",
            "kmovq k\\n, [rdx + 2048 + 8 * \\n]",
            ".endr",
            hold!(),
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
            "vmovdqu64 [r8 + 64 * \\n], zmm\\n",
            ".endr",
            ".irp n, 0,1,2,3,4,5,6,7",
            "kmovq [r8 + 2048 + 8 * \\n], k\\n",
            ".endr",
            "vzeroall",
            in("rdx") put.0.as_ptr(), in("r8") got.0.as_mut_ptr(), in("r15") gate,
            out("rax") _, out("rcx") _, out("rdi") _, out("rsi") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _,
            out("xmm15") _,
        );
    }
    same("AVX-512 registers", &put.0[..264], &got.0[..264])
}

fn avx(gate: &Gate) -> Result<(), String> {
    let put = Room::random(3);
    let mut got = Room::empty();
    // SAFETY: only called when the cpu has AVX; the vector registers are declared.
    unsafe {
        asm!(
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu ymm\\n, [rdx + 32 * \\n]",
            ".endr",
            hold!(),
            ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "vmovdqu [r8 + 32 * \\n], ymm\\n",
            ".endr",
            "vzeroall",
            in("rdx") put.0.as_ptr(), in("r8") got.0.as_mut_ptr(), in("r15") gate,
            out("rax") _, out("rcx") _, out("rdi") _, out("rsi") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _,
            out("xmm15") _,
        );
    }
    same("AVX registers", &put.0[..64], &got.0[..64])
}

/// The x87 stack with three numbers on it, another rounding mode in both units, and the flags word.
fn x87(gate: &Gate) -> Result<(), String> {
    let put: [u64; 8] = [0x027f, 0x5fa0, 0, 0, 0, 0, 0, 0];
    let mut got = [0_u64; 8];
    // SAFETY: control words are set back to the defaults, the stack is emptied.
    unsafe {
        asm!(
            "fninit", "fldcw [rdx]", "ldmxcsr [rdx + 8]", "fldpi", "fldl2e", "fldln2",
            hold!(),
            "fstp qword ptr [r8 + 16]", "fstp qword ptr [r8 + 24]", "fstp qword ptr [r8 + 32]", "fnstcw [r8]", "stmxcsr [r8 + 8]",
            "fninit", "mov dword ptr [r8 + 56], 0x1f80", "ldmxcsr [r8 + 56]",
            in("rdx") put.as_ptr(), in("r8") got.as_mut_ptr(), in("r15") gate,
            out("rax") _, out("rcx") _, out("rdi") _, out("rsi") _, out("r11") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    let numbers = [
        std::f64::consts::LN_2.to_bits(),
        std::f64::consts::LOG2_E.to_bits(),
        std::f64::consts::PI.to_bits(),
    ];
    same("x87 control word and mxcsr", &put[..2], &got[..2])?;
    // The rounding mode chosen above may leave the last bit one lower.
    match numbers.iter().zip(&got[2..5]).position(|(a, b)| a.abs_diff(*b) > 1) {
        None => Ok(()),
        Some(i) => Err(format!("x87 stack: place {i} now {:#x}, before {:#x}", got[2 + i], numbers[i])),
    }
}

const AMX_CONFIG: [u8; 64] = {
    let mut c = [0; 64];
    c[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        c[16 + 2 * tile] = 64;
        c[48 + tile] = 16;
        tile += 1;
    }
    c
};

fn amx(gate: &Gate) -> Result<(), String> {
    let put = Room::random(5);
    let mut got = Room::empty();
    let mut config = [0_u8; 64];
    // SAFETY: only called after the kernel gave leave to use tile data; eight tiles of 1 KiB fit the boxes.
    unsafe {
        asm!(
            "ldtilecfg [r9]",
            "mov r10d, 64",
            ".irp n, 0,1,2,3,4,5,6,7",
            "tileloadd tmm\\n, [rdx + r10 + 1024 * \\n]",
            ".endr",
            hold!(),
            "mov r10d, 64",
            ".irp n, 0,1,2,3,4,5,6,7",
            "tilestored [r8 + r10 + 1024 * \\n], tmm\\n",
            ".endr",
            "sttilecfg [r12]",
            "tilerelease",
            in("rdx") put.0.as_ptr(), in("r8") got.0.as_mut_ptr(), in("r9") AMX_CONFIG.as_ptr(), in("r12") config.as_mut_ptr(),
            in("r15") gate, out("r10") _, out("rax") _, out("rcx") _, out("rdi") _, out("rsi") _, out("r11") _,
        );
    }
    if config != AMX_CONFIG {
        return Err(format!("AMX tile configuration: now {config:?}"));
    }
    same("AMX tiles", &put.0[..1024], &got.0[..1024])
}

/// gs base, a thing of each thread's own that the C library leaves alone.
fn gs(gate: &Gate) -> Result<(), String> {
    const SET_GS: i32 = 0x1001;
    const GET_GS: i32 = 0x1004;
    let (mut before, mut now) = (0x1234_5678_9000_u64, 0_u64);
    sys!(syscall(libc::SYS_arch_prctl, SET_GS, before)).map_err(|e| e.to_string())?;
    while gate.go.load(Ordering::SeqCst) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    sys!(syscall(libc::SYS_arch_prctl, GET_GS, &mut now)).map_err(|e| e.to_string())?;
    if std::mem::take(&mut before) == now {
        Ok(())
    } else {
        Err(format!("gs base: now {now:#x}"))
    }
}

fn amx_allowed() -> bool {
    const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
    const XTILEDATA: i32 = 18;
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|t| t.contains("amx_tile"))
        && sys!(syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)).is_ok()
}

/// Two threads of each kind: one spins, one sleeps.
pub fn xstate(mut kit: Kit) -> io::Result<ExitCode> {
    let mut kinds: Vec<Kind> = vec![("general", general), ("x87", x87), ("gs", gs)];
    if std::is_x86_feature_detected!("avx") {
        kinds.push(("avx", avx));
    }
    if std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw") {
        kinds.push(("avx512", avx512));
    }
    if amx_allowed() {
        kinds.push(("amx", amx));
    }
    println!("kinds {:?}", kinds.iter().map(|k| k.0).collect::<Vec<_>>());
    // (gate, done, what differs) of each thread; a thread goes round again after each answer.
    struct Worker {
        name: String,
        gate: Gate,
        rounds: AtomicU32,
        wrong: Mutex<Option<String>>,
    }
    crate::kit::bind_here()?;
    let begun = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::new();
    for (name, run) in kinds {
        for sleeps in [false, true] {
            let worker = Arc::new(Worker {
                name: format!("{name} {}", if sleeps { "in a system call" } else { "in user mode" }),
                gate: Gate::new(sleeps),
                rounds: AtomicU32::new(0),
                wrong: Mutex::new(None),
            });
            workers.push(Arc::clone(&worker));
            let begun = Arc::clone(&begun);
            thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(move || {
                crate::kit::yield_to_others();
                begun.fetch_add(1, Ordering::SeqCst);
                loop {
                    let result = run(&worker.gate);
                    worker.gate.go.store(0, Ordering::SeqCst);
                    if let Err(e) = result {
                        *worker.wrong.lock().unwrap_or_else(|p| p.into_inner()) = Some(e);
                    }
                    worker.rounds.fetch_add(1, Ordering::SeqCst);
                }
            })?;
        }
    }
    // Their niceness is in the picture that is compared later.
    let all = crate::kit::within(Duration::from_secs(20), || begun.load(Ordering::SeqCst) == workers.len());
    kit.check(all, "not every thread has begun");
    thread::sleep(Duration::from_millis(100));
    kit.ready()?;
    Ok(kit.run(
        |_| {},
        |kit| {
            for worker in &workers {
                let before = worker.rounds.load(Ordering::SeqCst);
                worker.gate.go.store(1, Ordering::SeqCst);
                let answers = crate::kit::within(Duration::from_secs(10), || worker.rounds.load(Ordering::SeqCst) != before);
                let wrong = worker.wrong.lock().unwrap_or_else(|p| p.into_inner()).take();
                if !answers {
                    kit.differs(format!("{}: does not answer", worker.name));
                } else if let Some(wrong) = wrong {
                    kit.differs(format!("{}: {wrong}", worker.name));
                }
            }
            // Loaded again before anyone looks away.
            thread::sleep(Duration::from_millis(50));
        },
    ))
}
