//! Random choices that can be made again.

use std::time::Duration;

/// Random enough, and printed: a failure can be tried again.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Begins where `MIGRATE_SEED` says, else anywhere; prints where.
    pub fn new() -> Dice {
        let seed = std::env::var("MIGRATE_SEED").ok().and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64) | 1);
        println!("MIGRATE_SEED={seed}");
        Dice(seed)
    }
    /// Begins here.
    pub fn of(seed: u64) -> Dice {
        Dice(seed | 1)
    }
    /// Any number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// Shorter than this.
    pub fn below(&mut self, limit: Duration) -> Duration {
        limit.mul_f64((self.draw() >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

impl Default for Dice {
    fn default() -> Dice {
        Dice::new()
    }
}
