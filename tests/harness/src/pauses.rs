//! How long a file does not grow: the pauses of a program that prints.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Watches a file until it is dropped.
#[derive(Debug)]
pub struct Pauses {
    file: PathBuf,
    longest_ns: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Pauses {
    /// Looks at it every so often.
    pub fn watch(file: &Path, every: Duration) -> Pauses {
        let (longest_ns, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (longest, end, path) = (longest_ns.clone(), stop.clone(), file.to_owned());
        thread::spawn(move || {
            let (mut last, mut grew) = (size(&path), Instant::now());
            while !end.load(Ordering::Relaxed) {
                let now = size(&path);
                longest.fetch_max(grew.elapsed().as_nanos() as u64, Ordering::Relaxed);
                if now != last {
                    (last, grew) = (now, Instant::now());
                }
                thread::sleep(every);
            }
        });
        Pauses {
            file: file.to_owned(),
            longest_ns,
            stop,
        }
    }

    /// How large the file is.
    pub fn size(&self) -> u64 {
        size(&self.file)
    }

    /// Forgets the longest.
    pub fn reset(&self) {
        self.longest_ns.store(0, Ordering::Relaxed);
    }

    /// The longest so far, the one under way included.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_ns.load(Ordering::Relaxed))
    }
}

impl Drop for Pauses {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn size(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |m| m.len())
}
