//! What a migration would cost, without doing it.

use super::ms;
use crate::{
    dump::pages,
    image::Tree,
    report::{Downtime, Report, Round},
    wire::{self, Message, WireError},
};
use migrate_transport::Link;
use std::{
    fs::File,
    io,
    time::{Duration, Instant},
};

/// What a prediction goes by.
pub struct Counts {
    processes: u32,
    threads: u32,
    bytes: u64,
}

impl Counts {
    pub fn of(tree: &Tree, pids: &[i32]) -> Counts {
        // Shared objects are counted by their size, which is at most too much.
        let private = tree
            .processes
            .iter()
            .zip(pids)
            .filter(|(p, _)| p.zombie.is_none())
            .filter_map(|(p, pid)| {
                let mm = tree.mms.get(p.mm as usize)?;
                pages::plan_mm(*pid, p.mm, mm).ok().map(|(plan, _)| plan.bytes())
            });
        Counts {
            processes: tree.processes.len() as u32,
            threads: tree.processes.iter().map(|p| p.threads.len() as u32).sum(),
            bytes: private.sum::<u64>() + tree.objects.iter().map(|o| o.size).sum::<u64>(),
        }
    }
}

impl Counts {
    /// Stop, collect and rebuild, without pages: milliseconds for the first process, then by the piece (measured, docs/benchmarks.md).
    pub fn fixed(&self) -> Duration {
        let ms = 4.0 + 0.4 * f64::from(self.processes.saturating_sub(1)) + 0.06 * f64::from(self.threads);
        Duration::from_secs_f64(ms / 1000.0)
    }
}

/// Predicts a stop-and-copy migration: the link is measured with some random bytes, nothing is stopped.
pub async fn predict<L: Link>(link: &mut L, c: &Counts) -> Result<Report, WireError> {
    let start = Instant::now();
    let mut probe = vec![0u8; 8 << 20];
    let _ = File::open("/dev/urandom").and_then(|mut f| io::Read::read_exact(&mut f, &mut probe));
    let mut best = f64::INFINITY;
    let mut rtt = Duration::MAX;
    for k in 0..4 {
        let t = Instant::now();
        // A small one for the round trip, then large ones for the rate.
        let bytes = if k == 0 { vec![0] } else { probe.clone() };
        wire::send(link, &Message::Probe(bytes)).await?;
        match wire::recv(link).await? {
            Message::Pending => {}
            other => return Err(WireError::Protocol(format!("{} instead of an answer to a probe", other.name()))),
        }
        if k == 0 {
            rtt = t.elapsed();
        } else {
            best = best.min(t.elapsed().saturating_sub(rtt).as_secs_f64() / probe.len() as f64);
        }
    }
    let fixed = ms(c.fixed()) + ms(rtt);
    let wire_ms = best * c.bytes as f64 * 1000.0;
    let round = Round {
        pages: c.bytes / crate::image::PAGE,
        zero_pages: 0,
        bytes: c.bytes,
        ms: wire_ms,
        stopped_ms: 0.0,
    };
    Ok(Report {
        processes: c.processes,
        threads: c.threads,
        rounds: vec![round],
        downtime_ms: fixed + wire_ms,
        downtime: Downtime {
            transfer_ms: wire_ms,
            restore_ms: fixed,
            ..Default::default()
        },
        total_ms: ms(start.elapsed()),
        bytes_sent: link.bytes_sent(),
        ..Default::default()
    })
}
