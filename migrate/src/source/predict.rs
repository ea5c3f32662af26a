//! What a migration would cost, without doing it.

use super::{
    fixed::Fixed,
    ms,
    rounds::{Prepared, Rounds},
    transfer,
};
use crate::{
    dump::{
        pages::{self, SpacePlan},
        tree::Dumped,
    },
    image::PAGE,
    plan::{self, Activity, Forecast, Outlook, forecast},
    report::{Downtime, Range, Report, Round, SendOptions},
    tracer::Tracer,
    wire::{self, Message, WireError},
};
use migrate_transport::{Link, sample_compression};
use std::{
    fs::File,
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

/// What a prediction goes by.
pub struct Counts {
    pub processes: u32,
    pub threads: u32,
    /// Of memory with content.
    pub bytes: u64,
}

impl Counts {
    pub fn of(d: &Dumped) -> Counts {
        let tree = &d.tree;
        let shared = tree
            .objects
            .iter()
            .zip(&d.object_fds)
            .filter_map(|(o, fd)| pages::data(fd.as_fd(), o.size).ok());
        let shared: u64 = shared.flatten().map(|r| r.1 - r.0).sum();
        let private = tree
            .processes
            .iter()
            .zip(&d.pids)
            .filter(|(p, _)| p.zombie.is_none())
            .filter_map(|(p, pid)| {
                let mm = tree.mms.get(p.mm as usize)?;
                pages::plan_mm(*pid, p.mm, mm).ok().map(|(plan, _)| plan.bytes())
            });
        Counts {
            processes: tree.processes.len() as u32,
            threads: tree.processes.iter().map(|p| p.threads.len() as u32).sum(),
            bytes: private.sum::<u64>() + shared,
        }
    }
}

/// How long the program's writes are watched: first for an instant in which it hardly writes a page twice, then for long enough to see how many pages
/// it writes.
const INSTANT: Duration = Duration::from_millis(60);
const SAMPLE: Duration = Duration::from_millis(500);
/// Bytes of a probe of the link, how many are sent, and how many of them are under way at a time.
const PROBE: usize = 4 << 20;
const PROBES: usize = 12;
const AHEAD: usize = 3;
/// Bytes that are read to see how well they compress, and how many are zeros.
const LOOKED_AT: u64 = 2 << 20;
/// What pages may be carried at, by what the probe was: on hosts short of cores reading and placing them takes of what the connection takes (0.5 to 0.8
/// of it is left on two cores), and others may use the link. Where a program writes about as fast as that, all depends on it. The prediction is the middle one.
const SHARES: [f64; 3] = [0.5, 1.0, 1.5];

/// What a prediction goes by, beside the link.
pub struct Basis<'a> {
    /// What the inventory has counted.
    pub counts: &'a Counts,
    /// Mode and limits.
    pub options: &'a SendOptions,
    /// Looks at the tree, in modes with rounds.
    pub rounds: Option<Rounds>,
    /// Where it looks.
    pub tracer: &'a Tracer,
    /// What the migration has taken when its first round begins.
    pub before: Duration,
}

/// What the link was seen to carry.
struct Probed {
    /// Bytes a second.
    rate: f64,
    rtt: Duration,
    /// By how much the first bytes were late, until the congestion window had grown.
    ramp: Duration,
}

async fn probe<L: Link>(link: &mut L) -> Result<Probed, WireError> {
    // A small one for the round trip.
    let mut rtt = Duration::MAX;
    for _ in 0..3 {
        let began = Instant::now();
        wire::send(link, &Message::Probe(vec![0])).await?;
        answered(link).await?;
        rtt = rtt.min(began.elapsed());
    }
    // Then large ones without a pause between them, timed from the first answer: by then the congestion window has grown.
    let mut bytes = vec![0u8; PROBE];
    let _ = File::open("/dev/urandom").and_then(|mut f| io::Read::read_exact(&mut f, &mut bytes));
    let message = Message::Probe(bytes);
    let start = Instant::now();
    for _ in 0..AHEAD {
        wire::send(link, &message).await?;
    }
    answered(link).await?;
    let first = start.elapsed();
    let began = Instant::now();
    for k in 1..PROBES {
        if k + AHEAD <= PROBES {
            wire::send(link, &message).await?;
        }
        answered(link).await?;
    }
    let rate = ((PROBES - 1) * PROBE) as f64 / began.elapsed().as_secs_f64().max(1e-9);
    let ramp = first.saturating_sub(Duration::from_secs_f64(PROBE as f64 / rate));
    Ok(Probed { rate, rtt, ramp })
}

async fn answered<L: Link>(link: &mut L) -> Result<(), WireError> {
    match wire::recv(link).await? {
        Message::Pending => Ok(()),
        other => Err(WireError::Protocol(format!("{} instead of an answer to a probe", other.name()))),
    }
}

/// What a sample of the running tree tells.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    activity: Activity,
    /// Bytes of memory with content, and those that are looked at every round.
    total: u64,
    /// Bytes on the wire for one of memory, were it compressed; compressed bytes a second.
    compression: (f64, f64),
    /// Share of pages that are not zero.
    content: f64,
    /// The first look: everything is tracked from then on.
    first: Duration,
}

/// The sample, with what the looks say of a freeze.
type Sampled = (Sample, Fixed);

/// Watches the tree's writes. It is stopped for an instant when the tracker is attached; with soft-dirty at each look.
fn sample(mut rounds: Rounds, mut fixed: Fixed) -> io::Result<Sampled> {
    let began = Instant::now();
    let mut last = rounds.look()?;
    let first = began.elapsed();
    fixed.look(&last);
    let total = last.dirty;
    let (compression, content) = look_into(&last)?;
    let mut windows = [(Duration::ZERO, 0); 2];
    for (window, time) in windows.iter_mut().zip([INSTANT, SAMPLE]) {
        rounds.pretend_sent(&last)?;
        let began = Instant::now();
        std::thread::sleep(time);
        last = rounds.look()?;
        *window = (began.elapsed(), last.dirtied);
        fixed.look(&last);
    }
    let sample = Sample {
        activity: Activity::from_samples(windows[0], windows[1], total),
        total,
        compression,
        content,
        first,
    };
    Ok((sample, fixed))
}

/// Reads some of the first round's pages: how they compress, and the share that is not zero.
fn look_into(p: &Prepared) -> io::Result<((f64, f64), f64)> {
    let all = p.bytes();
    let (mut pages, mut zero, mut data) = (0, 0, Vec::new());
    for (plan, reader) in &p.plans {
        // From each space its share, from the middle of each range.
        let share = |bytes: u64| (bytes as u128 * LOOKED_AT as u128 / u128::from(all.max(1))) as u64 / PAGE * PAGE;
        let mut some = SpacePlan {
            space: plan.space,
            ranges: Vec::new(),
        };
        let mut due = 0;
        for (a, b) in &plan.ranges {
            due += b - a;
            let n = share(due).min((b - a) / PAGE * PAGE);
            if n > 0 {
                due = 0;
                let from = a + (b - a - n) / 2 / PAGE * PAGE;
                some.ranges.push((from, from + n));
            }
        }
        let mut missed = Vec::new();
        pages::read_running(&some, reader, &mut missed, &mut |b| {
            pages += b.pages;
            zero += b.zero;
            data.extend(b.data);
            true
        })?;
    }
    let content = if pages + zero == 0 {
        1.0
    } else {
        pages as f64 / (pages + zero) as f64
    };
    Ok((sample_compression(&data), content))
}

/// Predicts a migration: the link is measured with some random bytes, the program's writes are watched for a moment, and the planner that would lead the
/// migration leads a simulation of it. Nothing is moved.
pub async fn predict<L: Link>(link: &mut L, basis: Basis<'_>) -> Result<Report, WireError> {
    let Basis { counts: c, options, .. } = basis;
    let Probed { rate: measured, rtt, ramp } = probe(link).await?;
    let limited = |rate: f64| options.bandwidth.map_or(rate, |b| rate.min(b as f64));
    let rate = limited(measured);
    let fixed = Fixed::new(c, rtt);
    let (seen, fixed) = match basis.rounds {
        Some(rounds) => {
            let failed = |e: io::Error| WireError::Protocol(format!("nothing: cannot look at the tree: {e}"));
            basis
                .tracer
                .call(move || sample(rounds, fixed))
                .await
                .map_err(failed)?
                .map_err(failed)?
        }
        None => {
            let nothing = Sample {
                total: c.bytes,
                compression: (1.0, 0.0),
                content: 1.0,
                ..Sample::default()
            };
            (nothing, fixed)
        }
    };
    let (packed, speed) = seen.compression;
    let ratio = if plan::compress_pays(packed, speed, rate, transfer::cores_shared(options.bandwidth)) {
        packed
    } else {
        1.0
    };
    let outlook = Outlook {
        total: (seen.total as f64 * seen.content) as u64,
        activity: seen.activity,
        ratio,
        rate,
        fixed: fixed.now(),
        overhead: fixed.round() + rtt,
        first: seen.first + Fixed::skeleton(c) + ramp,
    };
    let all = SHARES.map(|share| {
        let outlook = Outlook {
            rate: limited(measured * share),
            ..outlook
        };
        forecast(options.limits(), options.mode, &outlook)
    });
    let range = |of: &dyn Fn(&Forecast) -> Duration| {
        let all = all.iter().map(|f| ms(of(f)));
        all.fold([f64::INFINITY, 0.0], |[least, most], x| [least.min(x), most.max(x)])
    };
    let total = |f: &Forecast| basis.before + f.total;
    let f = &all[1];
    let rounds: Vec<Round> = f
        .sent
        .iter()
        .map(|(bytes, took)| Round {
            pages: bytes / PAGE,
            zero_pages: 0,
            bytes: (*bytes as f64 * ratio) as u64,
            ms: ms(*took),
            stopped_ms: 0.0,
            compared: 0,
        })
        .collect();
    let last = f.sent.last().map_or(0, |s| s.0) as f64 * ratio / rate * 1000.0;
    Ok(Report {
        processes: c.processes,
        threads: c.threads,
        pages_sent: rounds.iter().map(|r| r.pages).sum(),
        bytes_sent: rounds.iter().map(|r| r.bytes).sum(),
        rounds,
        downtime_ms: ms(f.downtime),
        downtime: Downtime {
            transfer_ms: last,
            restore_ms: ms(f.downtime) - last,
            ..Default::default()
        },
        total_ms: ms(total(f)),
        range: Some(Range {
            downtime_ms: range(&|f| f.downtime),
            total_ms: range(&total),
        }),
        ..Default::default()
    })
}
