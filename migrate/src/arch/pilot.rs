//! The pilot: the code that a task being rebuilt runs until its own registers are loaded.
//!
//! A rebuilt task has no memory of its own at first, so it runs position-independent code in a shared region that the agent maps too, uses
//! no stack and takes no signals. It waits on a futex word for a batch of [`Record`]s, runs them, stores each result and reports on a
//! second word. No ptrace is involved: the agent posts batches to hundreds of tasks at once and looks at the results.
//!
//! Control block (64 bytes): +0 command sequence (futex) · +4 done sequence (futex) · +8 number of records · +16 table address · +24 expected
//! parent pid · +32 address of the decision word · +40 address of a timespec, how often to look after the parent.
//!
//! The *decision word* is 0 at first. The agent's release turns 0 into 1; a task that finds its parent gone turns 0 into 2, and whoever sees 2
//! exits. One compare-and-swap on one word that all tasks share decides for all of them, so a copy is either wholly released or wholly dead.
//! Tried on paper and dropped: PR_SET_PDEATHSIG, which each task has to take back after the release, so that a death of the agent in between
//! kills a part of the tree.
//!
//! Beside system calls the pilot knows pseudo records with a negative number:
//! [`LEAVE`] loads the final context with rt_sigreturn(2) · [`HOLD`] waits for the release: the one event of all tasks ·
//! [`EXPECT`] ends the process unless the record before returned this · [`AMX`] makes the kernel allocate AMX tile state (XFD).
//! After clone3(2) the child goes on with the control block that the sixth argument names, which clone3 itself ignores.

/// A system call and its result, 64 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Record {
    /// Number, or a pseudo record.
    pub nr: i64,
    /// Arguments.
    pub args: [u64; 6],
    /// Result, written by the stub.
    pub ret: i64,
}

/// Bytes of a record in a table.
pub const RECORD: usize = 64;
/// rt_sigreturn with the stack pointer in the first argument.
pub const LEAVE: i64 = -1;
/// Wait until the decision word is 1.
pub const HOLD: i64 = -2;
/// exit_group(1) unless the previous record returned the first argument.
pub const EXPECT: i64 = -3;
/// Touch the AMX tiles, with a tile configuration at the first argument.
pub const AMX: i64 = -4;

impl Record {
    /// A record from a number and up to six arguments.
    pub fn new(nr: i64, args: &[u64]) -> Record {
        let mut a = [0; 6];
        a[..args.len()].copy_from_slice(args);
        Record {
            nr,
            args: a,
            ret: i64::MIN,
        }
    }
    /// As the stubs read it.
    pub fn to_bytes(self) -> [u8; RECORD] {
        let mut b = [0; RECORD];
        b[..8].copy_from_slice(&self.nr.to_le_bytes());
        for (i, a) in self.args.iter().enumerate() {
            b[8 + i * 8..16 + i * 8].copy_from_slice(&a.to_le_bytes());
        }
        b[56..].copy_from_slice(&self.ret.to_le_bytes());
        b
    }
}

std::arch::global_asm!(
    ".pushsection .text.migrate_pilot,\"ax\",@progbits",
    ".globl migrate_pilot_start",
    ".globl migrate_pilot_end",
    "migrate_pilot_start:",
    // r12 control block, r14d last command seen
    "20:",
    "mov eax, dword ptr [r12]",
    "cmp eax, r14d",
    "jne 21f",
    "mov rdi, r12",
    "xor esi, esi",
    "mov edx, r14d",
    "mov r10, qword ptr [r12+40]",
    "mov eax, 202",
    "syscall",
    "cmp rax, -110",
    "jne 20b",
    // Nothing for a while: is the parent still there?
    "mov eax, 110",
    "syscall",
    "mov rdi, qword ptr [r12+32]",
    "cmp eax, dword ptr [r12+24]",
    "je 31f",
    "xor eax, eax",
    "mov ecx, 2",
    "lock cmpxchg dword ptr [rdi], ecx",
    "31:",
    "cmp dword ptr [rdi], 2",
    "jne 20b",
    "32:",
    "mov edi, 1",
    "mov eax, 231",
    "syscall",
    "21:",
    "mov r14d, eax",
    "mov r13, qword ptr [r12+8]",
    "mov rbx, qword ptr [r12+16]",
    "22:",
    "test r13, r13",
    "jz 29f",
    "mov rax, qword ptr [rbx]",
    "mov rdi, qword ptr [rbx+8]",
    "mov rsi, qword ptr [rbx+16]",
    "mov rdx, qword ptr [rbx+24]",
    "mov r10, qword ptr [rbx+32]",
    "mov r8, qword ptr [rbx+40]",
    "mov r9, qword ptr [rbx+48]",
    "test rax, rax",
    "js 24f",
    "mov rbp, rax",
    "syscall",
    "test rax, rax",
    "jnz 23f",
    "cmp rbp, 435",
    "jne 23f",
    // The child of clone3. It may not look at the table: its maker may be through with it and hold the next batch already.
    "mov r12, r9",
    "xor r14d, r14d",
    "jmp 20b",
    "23:",
    "mov qword ptr [rbx+56], rax",
    "24:",
    "cmp rax, -1",
    "jne 25f",
    "cmp qword ptr [rbx], -1",
    "jne 28f",
    "mov rsp, rdi",
    "mov eax, 15",
    "syscall",
    "25:",
    "cmp qword ptr [rbx], -2",
    "jne 26f",
    "30:",
    "mov rdi, qword ptr [r12+32]",
    "mov eax, dword ptr [rdi]",
    "cmp eax, 1",
    "je 28f",
    "cmp eax, 2",
    "je 32b",
    "xor esi, esi",
    "xor edx, edx",
    "mov r10, qword ptr [r12+40]",
    "mov eax, 202",
    "syscall",
    "cmp rax, -110",
    "jne 30b",
    "mov eax, 110",
    "syscall",
    "cmp eax, dword ptr [r12+24]",
    "je 30b",
    "mov rdi, qword ptr [r12+32]",
    "xor eax, eax",
    "mov ecx, 2",
    "lock cmpxchg dword ptr [rdi], ecx",
    "jmp 30b",
    "26:",
    "cmp qword ptr [rbx], -3",
    "jne 27f",
    "cmp qword ptr [rbx-8], rdi",
    "je 28f",
    "mov edi, 1",
    "mov eax, 231",
    "syscall",
    "27:",
    "cmp qword ptr [rbx], -4",
    "jne 28f",
    // ldtilecfg [rdi]; tilezero tmm0; tilerelease
    ".byte 0xc4, 0xe2, 0x78, 0x49, 0x07",
    ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0",
    ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0",
    "28:",
    "add rbx, 64",
    "dec r13",
    "jmp 22b",
    "29:",
    "mov dword ptr [r12+4], r14d",
    "lea rdi, [r12+4]",
    "mov esi, 1",
    "mov edx, 0x7fffffff",
    "mov eax, 202",
    "syscall",
    "jmp 20b",
    "migrate_pilot_end:",
    ".popsection",
);

unsafe extern "C" {
    static migrate_pilot_start: u8;
    static migrate_pilot_end: u8;
}

/// The pilot's machine code.
pub fn code() -> &'static [u8] {
    // SAFETY: both symbols bound the assembly above, in this order, in one section.
    unsafe {
        let start = &raw const migrate_pilot_start;
        let end = &raw const migrate_pilot_end;
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}

/// clone3(2) of a process that starts in the pilot at `entry` with control block `control`, both in memory that the child inherits.
///
/// `args` is `struct clone_args`. The caller has blocked all signals. Returns the child's pid.
pub fn spawn(args: &mut [u64; 11], entry: u64, control: u64) -> std::io::Result<i32> {
    let ret: i64;
    // SAFETY: without CLONE_VM the child has its own copy of this memory and never comes back here: it jumps into the pilot, which uses
    // neither stack nor any register but those set here. The parent only sees a system call.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov r12, {control}",
            "xor r14d, r14d",
            "jmp {entry}",
            "2:",
            entry = in(reg) entry,
            control = in(reg) control,
            inlateout("rax") 435i64 => ret,
            in("rdi") args.as_mut_ptr(),
            in("rsi") 88u64,
            out("rcx") _, out("r11") _, out("r12") _, out("r14") _,
        );
    }
    if ret < 0 {
        Err(std::io::Error::from_raw_os_error(-ret as i32))
    } else {
        Ok(ret as i32)
    }
}
