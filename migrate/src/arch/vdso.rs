//! The vdso of one kernel made to serve under another: its functions become jumps to those of the kernel that the process is on.
//!
//! A program calls the vdso at addresses it looked up once, so the code of the kernel it was started on has to stay where it was. That code
//! reads data of its own kernel (`[vvar]`) and cannot run elsewhere. So the copy gets ordinary memory in place of all three mappings, the *proxy*:
//!
//! ```text
//! vvar ...        zeros, but for the last half page before the vdso:
//!   -2048         magic, hash of the code, sizes of the mappings, address of the real vdso, one entry a function
//!   -2048 + 576   one stub a function: jump to the target; fallback: the plain system call; target: an address
//! vdso +0         the code as it was, each function's first five bytes a jump to its stub
//! ```
//!
//! The real vdso of the present kernel lies elsewhere, with its data. A function that it lacks has its own fallback as its target. The next dump
//! finds the proxy by its magic, undoes the jumps and has the first kernel's vdso again, so nothing grows however often a process moves, and on
//! a kernel with that vdso it gets the real one back.
//!
//! *Zeros* are not chosen at random: code of the original vdso that a signal handler interrupted and returns to finds clock mode 0 ("none") there
//! and makes the system call, or finds that the sequence number has changed, starts again, and then makes the system call.

use super::restart_anew;
use crate::image::{Regs, Vdso};
use object::{Object, ObjectSymbol, SymbolKind, read::elf::ElfFile64};

/// The proxy's head lies this far before the vdso, in the last page of what was the data.
pub const HEAD: u64 = 2048;
/// Bytes of a jump at a function's entry.
pub const JUMP: usize = 5;
/// Room for a fallback.
pub const FALLBACK: usize = 32;

const MAGIC: &[u8; 16] = b"migrate-vdso-1\0\0";
const REAL: usize = 80;
const ENTRIES: usize = 96;
const ENTRY: usize = 16;
const MAX: usize = 30;
const STUBS: usize = ENTRIES + MAX * ENTRY;
const STUB: usize = 48;
const TARGET: usize = 40;
const _: () = assert!(STUBS + MAX * STUB <= HEAD as usize);

/// Functions with a system call of the same meaning.
const CALLS: [(&str, u32); 6] = [
    ("clock_gettime", 228),
    ("gettimeofday", 96),
    ("time", 201),
    ("getcpu", 309),
    ("clock_getres", 229),
    ("getrandom", 318),
];

/// A function of a vdso.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name without `__vdso_`.
    pub name: String,
    /// Where it begins in the image.
    pub at: u32,
    /// Its number among those with a system call.
    call: Option<u8>,
}

impl Function {
    /// Whether a plain system call does the same.
    pub fn has_call(&self) -> bool {
        self.call.is_some()
    }
}

/// The exported functions, ascending, each once. Err: why the image cannot be used.
pub fn functions(code: &[u8]) -> Result<Vec<Function>, String> {
    let elf = ElfFile64::<object::Endianness>::parse(code).map_err(|e| format!("its vdso is not an ELF image ({e})"))?;
    let mut out: Vec<Function> = Vec::new();
    for s in elf.dynamic_symbols().filter(|s| s.kind() == SymbolKind::Text && s.is_definition()) {
        let name = s.name().map_err(|e| format!("a function of its vdso has no name ({e})"))?;
        // Every function has two names, with and without the prefix.
        let name = name.strip_prefix("__vdso_").unwrap_or(name);
        let at = u32::try_from(s.address()).map_err(|_| format!("{name} lies outside its vdso"))?;
        if !out.iter().any(|f| f.at == at) {
            let call = CALLS.iter().position(|c| c.0 == name).map(|i| i as u8);
            out.push(Function {
                name: name.into(),
                at,
                call,
            });
        }
    }
    out.sort_by_key(|f| f.at);
    let ends = out.iter().skip(1).map(|f| f.at as usize).chain([code.len()]);
    for (f, end) in out.iter().zip(ends) {
        if (f.at as usize) < 64 || f.at as usize + JUMP > end {
            return Err(format!("{} of its vdso has no room for a jump", f.name));
        }
    }
    if out.is_empty() || out.len() > MAX {
        return Err(format!("its vdso has {} functions", out.len()));
    }
    Ok(out)
}

/// Code that makes a function's system call, or fails with ENOSYS, and where its `ret` instructions are.
fn fallback(call: Option<u8>) -> (Vec<u8>, Vec<usize>) {
    // mov rax,-ENOSYS; ret
    const NONE: [u8; 8] = [0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, 0xc3];
    let Some((name, nr)) = call.and_then(|c| CALLS.get(c as usize)) else {
        return (NONE.to_vec(), vec![7]);
    };
    // mov r9,rcx: the call destroys rcx, and a call that is begun again needs it.
    let mut c = vec![0x49, 0x89, 0xc9];
    let random = *name == "getrandom";
    if random {
        // With r8 = -1 it is asked about its state in user memory, of which the system call knows nothing. cmp r8,-1; je NONE
        c.extend_from_slice(&[0x49, 0x83, 0xf8, 0xff, 0x74, 8]);
    }
    // mov eax,nr; syscall; ret
    c.push(0xb8);
    c.extend_from_slice(&nr.to_le_bytes());
    c.extend_from_slice(&[0x0f, 0x05, 0xc3]);
    let mut rets = vec![c.len() - 1];
    if random {
        c.extend_from_slice(&NONE);
        rets.push(c.len() - 1);
    }
    (c, rets)
}

fn jump(from: u64, to: u64) -> [u8; JUMP] {
    let rel = to.wrapping_sub(from + JUMP as u64) as i32;
    let mut b = [0xe9, 0, 0, 0, 0];
    b[1..].copy_from_slice(&rel.to_le_bytes());
    b
}

fn word(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

/// A vdso as ordinary memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Written [`HEAD`] bytes before the code.
    pub head: Vec<u8>,
    /// Written where the vdso was.
    pub code: Vec<u8>,
}

/// Builds the proxy of `vdso` at `at`. The real vdso lies at `real` and has these functions.
pub fn proxy(vdso: &Vdso, at: u64, real: u64, functions_there: &[Function]) -> Result<Proxy, String> {
    if vdso.layout[0] + vdso.layout[1] < crate::image::PAGE {
        return Err("its vdso has no data before it".into());
    }
    let mut head = vec![0u8; HEAD as usize];
    let mut code = vdso.code.clone();
    let functions = functions(&code)?;
    head[..16].copy_from_slice(MAGIC);
    head[16..48].copy_from_slice(blake3::hash(&code).as_bytes());
    for (i, n) in vdso.layout.iter().enumerate() {
        head[48 + i * 8..56 + i * 8].copy_from_slice(&n.to_le_bytes());
    }
    head[72..76].copy_from_slice(&(functions.len() as u32).to_le_bytes());
    head[REAL..REAL + 8].copy_from_slice(&real.to_le_bytes());
    let base = at - HEAD;
    for (k, f) in functions.iter().enumerate() {
        let from = f.at as usize;
        let e = ENTRIES + k * ENTRY;
        head[e..e + 4].copy_from_slice(&f.at.to_le_bytes());
        head[e + 4] = f.call.unwrap_or(u8::MAX);
        head[e + 8..e + 8 + JUMP].copy_from_slice(&code[from..from + JUMP]);
        let s = STUBS + k * STUB;
        // jmp [rip+34]
        head[s..s + 8].copy_from_slice(&[0xff, 0x25, (TARGET - 6) as u8, 0, 0, 0, 0x66, 0x90]);
        let (fall, _) = fallback(f.call);
        head[s + 8..s + 8 + fall.len()].copy_from_slice(&fall);
        let target = match functions_there.iter().find(|g| g.name == f.name) {
            Some(g) => real + u64::from(g.at),
            None => base + s as u64 + 8,
        };
        head[s + TARGET..s + TARGET + 8].copy_from_slice(&target.to_le_bytes());
        code[from..from + JUMP].copy_from_slice(&jump(at + u64::from(f.at), base + s as u64));
    }
    Ok(Proxy { head, code })
}

/// A function of a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it begins in the code.
    pub at: u32,
    /// Its name, when it has a system call.
    pub name: Option<&'static str>,
    /// Offset of its target in the head.
    pub target: usize,
    /// Its target.
    pub leads_to: u64,
    /// Offset of its fallback in the head.
    pub fallback: usize,
    saved: [u8; JUMP],
    call: Option<u8>,
}

/// A proxy's head, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The vdso's hash.
    hash: [u8; 32],
    /// Sizes of the mappings it stands for.
    pub layout: [u64; 3],
    /// Where the real vdso is.
    pub real: u64,
    /// Its functions.
    pub entries: Vec<Entry>,
}

/// Reads the head of a proxy; `None`: it is none.
pub fn head(b: &[u8]) -> Option<Head> {
    if b.len() < HEAD as usize || b[..16] != *MAGIC {
        return None;
    }
    let layout = [word(b, 48)?, word(b, 56)?, word(b, 64)?];
    let count = u32::from_le_bytes(b[72..76].try_into().ok()?) as usize;
    if count > MAX || layout.iter().any(|&n| n > 1 << 20 || n % crate::image::PAGE != 0) || layout[2] == 0 || layout[0] + layout[1] == 0 {
        return None;
    }
    let entries = (0..count)
        .map(|k| {
            let e = ENTRIES + k * ENTRY;
            let s = STUBS + k * STUB;
            let at = u32::from_le_bytes(b[e..e + 4].try_into().ok()?);
            let call = Some(b[e + 4]).filter(|&c| (c as usize) < CALLS.len());
            (at as u64 + JUMP as u64 <= layout[2]).then_some(Entry {
                at,
                name: call.map(|c| CALLS[c as usize].0),
                target: s + TARGET,
                leads_to: word(b, s + TARGET)?,
                fallback: s + 8,
                saved: b[e + 8..e + 8 + JUMP].try_into().ok()?,
                call,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    Some(Head {
        hash: b[16..48].try_into().ok()?,
        layout,
        real: word(b, REAL)?,
        entries,
    })
}

impl Head {
    /// The vdso that the proxy stands for, from the proxy's code. `None`: something has overwritten it.
    pub fn original(&self, mut code: Vec<u8>) -> Option<Vdso> {
        for e in &self.entries {
            code.get_mut(e.at as usize..e.at as usize + JUMP)?.copy_from_slice(&e.saved);
        }
        let v = Vdso { code, layout: self.layout };
        (v.is_valid() && blake3::hash(&v.code) == blake3::Hash::from_bytes(self.hash)).then_some(v)
    }

    /// The places in the head where a task can be, for a proxy whose code is at `at`.
    pub fn spots(&self, at: u64) -> Vec<Spot> {
        let base = at - HEAD;
        self.entries
            .iter()
            .flat_map(|e| {
                let entry = at + u64::from(e.at);
                let fall = base + e.fallback as u64;
                let jump = Spot {
                    start: fall - 8,
                    end: fall,
                    entry,
                    rets: Vec::new(),
                };
                [jump, spot(fall, entry, e.call)]
            })
            .collect()
    }
}

/// A short piece of code in place of a function of the vdso, from which a task can be taken back to the beginning or on to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The function that was called.
    pub entry: u64,
    rets: Vec<u64>,
}

fn spot(start: u64, entry: u64, call: Option<u8>) -> Spot {
    let (code, rets) = fallback(call);
    Spot {
        start,
        end: start + code.len() as u64,
        entry,
        rets: rets.into_iter().map(|r| start + r as u64).collect(),
    }
}

/// Takes a task out of a spot: before its system call it is put back to where the function was called, after it to where it returns. `pop` reads
/// a word of its stack. `None`: it is in none.
pub fn settle(r: &Regs, spots: &[Spot], pop: impl FnOnce(u64) -> Option<u64>) -> Option<Regs> {
    let mut n = restart_anew(r);
    let s = spots.iter().find(|s| (s.start..s.end).contains(&n.rip))?;
    if s.rets.contains(&n.rip) {
        n.rip = pop(n.rsp)?;
        n.rsp += 8;
    } else {
        if n.rip != s.start {
            n.rcx = n.r9;
        }
        n.rip = s.entry;
    }
    Some(n)
}

/// Functions of a real vdso turned into system calls for a moment: what to write where, offsets in the vdso, the stubs first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detour {
    /// Stubs in the last bytes of the vdso's last page.
    pub stubs: (usize, Vec<u8>),
    /// Jumps to them.
    pub jumps: Vec<(u32, [u8; JUMP])>,
    calls: Vec<(u32, Option<u8>)>,
}

/// Bytes at a vdso's very end that a detour takes.
pub const DETOUR: usize = CALLS.len() * FALLBACK;

/// The detour of a vdso of `len` bytes. It uses nothing but the vdso itself, and leaves a process healthy that nobody comes back to.
pub fn detour(len: usize, functions: &[Function]) -> Detour {
    let base = len - DETOUR;
    let mut stubs = vec![0u8; DETOUR];
    let mut jumps = Vec::new();
    let mut calls = Vec::new();
    for (k, f) in functions.iter().filter(|f| f.has_call()).take(CALLS.len()).enumerate() {
        let (code, _) = fallback(f.call);
        stubs[k * FALLBACK..k * FALLBACK + code.len()].copy_from_slice(&code);
        jumps.push((f.at, jump(u64::from(f.at), (base + k * FALLBACK) as u64)));
        calls.push((f.at, f.call));
    }
    Detour {
        stubs: (base, stubs),
        jumps,
        calls,
    }
}

impl Detour {
    /// The places in the stubs where a task can be, for a vdso at `at`.
    pub fn spots(&self, at: u64) -> Vec<Spot> {
        let base = at + self.stubs.0 as u64;
        let each = self.calls.iter().enumerate();
        each.map(|(k, (entry, call))| spot(base + (k * FALLBACK) as u64, at + u64::from(*entry), *call))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dump::vdso::own;

    /// A vdso with its data range in memory of this process.
    struct Mapped {
        start: *mut u8,
        len: usize,
        at: u64,
    }

    impl Mapped {
        fn new(layout: [u64; 3]) -> Mapped {
            let len = layout.iter().sum::<u64>() as usize;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a fresh mapping.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            assert_ne!(start, libc::MAP_FAILED);
            let start: *mut u8 = start.cast();
            Mapped {
                start,
                len,
                at: start as u64 + layout[0] + layout[1],
            }
        }
        fn write(&self, at: u64, bytes: &[u8]) {
            let offset = (at - self.start as u64) as usize;
            assert!(offset + bytes.len() <= self.len);
            // SAFETY: inside the mapping, which is writable until `executable`.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) };
        }
        fn executable(&self) {
            // SAFETY: the whole mapping is ours.
            let r = unsafe { libc::mprotect(self.start.cast(), self.len, libc::PROT_READ | libc::PROT_EXEC) };
            assert_eq!(r, 0);
        }
        fn call(&self, at: u32, a: [u64; 5]) -> i64 {
            // SAFETY: a function of the vdso with these arguments, all of which it ignores or knows.
            unsafe {
                let f: extern "C" fn(u64, u64, u64, u64, u64) -> i64 = std::mem::transmute(self.at + u64::from(at));
                f(a[0], a[1], a[2], a[3], a[4])
            }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: nobody uses it any more.
            unsafe { libc::munmap(self.start.cast(), self.len) };
        }
    }

    fn real() -> u64 {
        let auxv = crate::procfs::read(std::process::id() as i32, "auxv").unwrap();
        crate::dump::vdso::known_at(&auxv).unwrap()
    }

    fn time_of(m: &Mapped, at: u32, clock: u64) -> i128 {
        let mut t = [0i64; 2];
        assert_eq!(m.call(at, [clock, t.as_mut_ptr() as u64, 0, 0, 0]), 0);
        i128::from(t[0]) * 1_000_000_000 + i128::from(t[1])
    }

    /// Every function of a vdso in memory against this process's C library. Coarse clocks and resolutions are read from the data without a check.
    fn works(m: &Mapped, functions: &[Function], coarse: bool) {
        let now = |clock| i128::from(crate::sys::misc::clock_ns(clock));
        let near = |got: i128, clock: i32| {
            let now = now(clock);
            assert!((now - 1_000_000_000..=now).contains(&got), "clock {clock}: {got} against {now}");
        };
        for f in functions {
            match f.name.as_str() {
                "clock_gettime" => {
                    for clock in [
                        libc::CLOCK_REALTIME,
                        libc::CLOCK_MONOTONIC,
                        libc::CLOCK_BOOTTIME,
                        libc::CLOCK_PROCESS_CPUTIME_ID,
                    ] {
                        near(time_of(m, f.at, clock as u64), clock);
                    }
                    assert_eq!(m.call(f.at, [77, 0, 0, 0, 0]), -22);
                    if coarse {
                        near(time_of(m, f.at, libc::CLOCK_REALTIME_COARSE as u64), libc::CLOCK_REALTIME_COARSE);
                    }
                }
                "gettimeofday" => {
                    let mut t = [0i64; 2];
                    assert_eq!(m.call(f.at, [t.as_mut_ptr() as u64, 0, 0, 0, 0]), 0);
                    near(i128::from(t[0]) * 1_000_000_000 + i128::from(t[1]) * 1000, libc::CLOCK_REALTIME);
                }
                "time" if coarse => {
                    let t = i128::from(m.call(f.at, [0; 5]));
                    assert!((t - now(libc::CLOCK_REALTIME) / 1_000_000_000).abs() <= 1);
                }
                "getcpu" => {
                    let mut cpu = u32::MAX;
                    assert_eq!(m.call(f.at, [&raw mut cpu as u64, 0, 0, 0, 0]), 0);
                    assert!(cpu < 65536);
                }
                "clock_getres" if coarse => {
                    let mut t = [0i64; 2];
                    assert_eq!(m.call(f.at, [1, t.as_mut_ptr() as u64, 0, 0, 0]), 0);
                    assert!(t[0] == 0 && t[1] > 0);
                }
                "getrandom" => {
                    let mut b = [0u8; 32];
                    assert_eq!(m.call(f.at, [b.as_mut_ptr() as u64, 32, 0, 0, 0]), 32);
                    assert_ne!(b, [0; 32]);
                }
                _ => {}
            }
        }
    }

    fn proxied(there: &[Function]) -> (Mapped, Proxy) {
        let own = own().unwrap();
        let m = Mapped::new(own.vdso.layout);
        let p = proxy(&own.vdso, m.at, real(), there).unwrap();
        m.write(m.at - HEAD, &p.head);
        m.write(m.at, &p.code);
        m.executable();
        (m, p)
    }

    #[test]
    fn a_proxy_leads_to_the_real_functions() {
        let functions = own().unwrap().functions.clone().unwrap();
        let (m, p) = proxied(&functions);
        works(&m, &functions, true);
        let h = head(&p.head).unwrap();
        assert!(h.entries.iter().all(|e| e.leads_to == real() + u64::from(e.at)));
    }

    #[test]
    fn functions_that_are_missing_become_system_calls() {
        let functions = own().unwrap().functions.clone().unwrap();
        let (m, p) = proxied(&[]);
        works(&m, &functions, true);
        // What getrandom needs to know of its state has no answer without the function, and nothing is written.
        if let Some(f) = functions.iter().find(|f| f.name == "getrandom") {
            let mut params = [7u32; 16];
            assert_eq!(m.call(f.at, [0, 0, 0, params.as_mut_ptr() as u64, u64::MAX]), -38);
            assert_eq!(params, [7; 16]);
        }
        assert!(
            head(&p.head)
                .unwrap()
                .entries
                .iter()
                .all(|e| e.leads_to == m.at - HEAD + e.fallback as u64)
        );
    }

    /// Code of the original that something returns to: its data reads as zeros.
    #[test]
    fn code_without_its_data_makes_system_calls() {
        let own = own().unwrap();
        let m = Mapped::new(own.vdso.layout);
        m.write(m.at, &own.vdso.code);
        m.executable();
        works(&m, own.functions.as_ref().unwrap(), false);
    }

    #[test]
    fn the_original_comes_back_from_a_proxy() {
        let own = own().unwrap();
        let at = 0x7000_0000_0000;
        let p = proxy(&own.vdso, at, 0x1000_0000_0000, own.functions.as_ref().unwrap()).unwrap();
        let h = head(&p.head).unwrap();
        assert_eq!((h.real, h.layout), (0x1000_0000_0000, own.vdso.layout));
        assert_eq!(h.original(p.code.clone()).as_ref(), Some(&own.vdso));
        let mut damaged = p.code.clone();
        damaged[own.used - 1] ^= 1;
        assert_eq!(h.original(damaged), None);
        assert_eq!(h.original(Vec::new()), None);
        for n in [0, 1, 15, 100, HEAD as usize - 1] {
            assert_eq!(head(&p.head[..n]), None);
        }
        let mut forged = p.head.clone();
        forged[72..76].fill(0xff);
        assert_eq!(head(&forged), None);
        let mut forged = p.head;
        forged[ENTRIES..ENTRIES + 4].fill(0xff);
        assert_eq!(head(&forged), None);
    }

    #[test]
    fn images_of_any_length_are_read_without_harm() {
        let code = &own().unwrap().vdso.code;
        for n in (0..code.len()).step_by(61) {
            let _ = functions(&code[..n]);
        }
        for i in (0..code.len()).step_by(7) {
            let mut c = code.clone();
            c[i] ^= 0xff;
            let v = Vdso {
                code: c,
                layout: own().unwrap().vdso.layout,
            };
            let _ = proxy(&v, 0x7000_0000_0000, 0x1000_0000_0000, &[]);
        }
        assert!(functions(&[]).is_err());
    }

    #[test]
    fn a_thread_is_taken_out_of_a_stub_from_every_instruction() {
        let functions = own().unwrap().functions.clone().unwrap();
        let at = 0x7000_0000_0000;
        let d = detour(own().unwrap().vdso.code.len(), &functions);
        for s in d.spots(at) {
            let code = &d.stubs.1[(s.start - at) as usize - d.stubs.0..];
            let regs = |rip| Regs {
                rip,
                rcx: 1,
                r9: 2,
                rax: 5,
                rsp: 0x1000,
                orig_rax: u64::MAX,
                ..Default::default()
            };
            let pop = |sp| (sp == 0x1000).then_some(0x4444);
            let first = settle(&regs(s.start), std::slice::from_ref(&s), pop).unwrap();
            assert_eq!((first.rip, first.rcx, first.rsp), (s.entry, 1, 0x1000));
            let ret = s.rets[0];
            assert_eq!(code[(ret - s.start) as usize], 0xc3);
            let call = settle(&regs(ret - 2), std::slice::from_ref(&s), pop).unwrap();
            assert_eq!((call.rip, call.rcx, call.rsp), (s.entry, 2, 0x1000));
            let done = settle(&regs(ret), std::slice::from_ref(&s), pop).unwrap();
            assert_eq!((done.rip, done.rax, done.rsp), (0x4444, 5, 0x1008));
            // A call that the stop broke off is made anew, from the start.
            let mut broken = regs(ret);
            (broken.rax, broken.orig_rax) = (-512i64 as u64, 318);
            let again = settle(&broken, std::slice::from_ref(&s), pop).unwrap();
            assert_eq!((again.rip, again.rcx, again.orig_rax), (s.entry, 2, u64::MAX));
            assert_eq!(settle(&regs(s.end), std::slice::from_ref(&s), pop), None);
        }
    }

    #[test]
    fn a_detour_works() {
        let own = own().unwrap();
        let functions = own.functions.as_ref().unwrap();
        let d = detour(own.vdso.code.len(), functions);
        let m = Mapped::new(own.vdso.layout);
        m.write(m.at, &own.vdso.code);
        m.write(m.at + d.stubs.0 as u64, &d.stubs.1);
        for (at, jump) in &d.jumps {
            m.write(m.at + u64::from(*at), jump);
        }
        m.executable();
        works(&m, functions, true);
    }
}
