//! The destination's side of a migration, the mirror of [`crate::source`].
//!
//! Until the decision word is set to 1 the copy is nothing but pilots, which end when this agent does. The word lies in the journal's page, so
//! a later agent knows from the journal alone whether the tasks were let go: see [`answer`].

use crate::{
    dump,
    journal::{self, Entry, Journal, Side, Stage},
    oracle, preflight,
    report::{Downtime, Event, Events, Failure, Report, Round, Stdio},
    restore::{fds::StdioFds, rebuild::Pids, rebuild::Rebuild, sink::Sink},
    sys::misc,
    tracer::Tracer,
    wire::{self, Accept, Message, Running, State, WireError},
};
use migrate_transport::{Link, PageFrame, PageReceiver};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

/// How long the source may take between two messages before the freeze.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a served connection ended.
#[derive(Debug)]
pub enum Served {
    /// A tree runs here now. The guard keeps what has to live on with it.
    Running(Box<Report>),
    /// A preflight, or a question about an older migration: nothing was started.
    Answered,
}

/// Serves one authenticated connection to its end.
pub async fn serve<L: Link>(
    mut link: L,
    stdio: Stdio,
    state_dir: PathBuf,
    events: Events,
    cancel: CancellationToken,
) -> Result<Served, Failure> {
    let start = Instant::now();
    let lost = |phase: &'static str| move |e: WireError| Failure::failed(phase, 0, format!("{e}; nothing was started here"));
    let first = tokio::select! {
        m = tokio::time::timeout(PATIENCE, wire::recv(&mut link)) => match m {
            Ok(m) => m.map_err(lost("inventory"))?,
            Err(_) => return Err(Failure::failed("inventory", 0, "the source says nothing")),
        },
        () = cancel.cancelled() => return Err(interrupted()),
    };
    let inv = match first {
        Message::Query(id) => {
            let m = answer(&state_dir, &id);
            let _ = wire::send(&mut link, &m).await;
            // The source closes once it has read the answer.
            let _ = tokio::time::timeout(Duration::from_secs(5), wire::recv(&mut link)).await;
            return Ok(Served::Answered);
        }
        Message::Inventory(i) => i,
        other => {
            return Err(lost("inventory")(WireError::Protocol(format!(
                "{} as its first message",
                other.name()
            ))));
        }
    };
    events(Event::Phase { phase: "preflight" });
    if !journal::valid_id(&inv.id) {
        return Err(lost("inventory")(WireError::Protocol("an id that is none".into())));
    }
    let id = inv.id.clone();
    let check_only = inv.check_only;
    inv.tree
        .validate()
        .map_err(|e| lost("inventory")(WireError::Protocol(format!("a tree that is none: {e}"))))?;
    let (blockers, host) = {
        tokio::task::spawn_blocking(move || (preflight::tree(&inv.tree), dump::host::host()))
            .await
            .map_err(|e| Failure::failed("preflight", 0, e))?
    };
    let (blockers, fresh) = blockers;
    let host = host.map_err(|e| Failure::failed("preflight", 0, format!("cannot examine this host: {e}")))?;
    if !blockers.is_empty() {
        let text = blockers.iter().map(|b| format!("\n  - {b}")).collect::<String>();
        let _ = wire::send(&mut link, &Message::Refuse(blockers.clone())).await;
        let _ = tokio::time::timeout(Duration::from_secs(5), wire::recv(&mut link)).await;
        if check_only {
            return Ok(Served::Answered);
        }
        tracing::info!("refused a tree:{text}");
        return Err(Failure::refused(
            "preflight",
            0,
            "a tree was refused; nothing was started",
            blockers,
        ));
    }
    wire::send(&mut link, &Message::Accept(Accept { host, fresh_pids: fresh }))
        .await
        .map_err(lost("preflight"))?;
    if check_only {
        while let Ok(Ok(Message::Probe(_))) = tokio::time::timeout(Duration::from_secs(10), wire::recv(&mut link)).await {
            if wire::send(&mut link, &Message::Pending).await.is_err() {
                break;
            }
        }
        return Ok(Served::Answered);
    }

    // A session may pass before the freeze: rounds, transient blockers.
    let state = tokio::select! {
        m = tokio::time::timeout(PATIENCE, wire::recv(&mut link)) => match m {
            Ok(Ok(Message::State(s))) => *s,
            Ok(Ok(other)) => return Err(lost("freeze")(WireError::Protocol(format!("{} instead of the state", other.name())))),
            Ok(Err(e)) => return Err(lost("freeze")(e)),
            Err(_) => return Err(Failure::failed("freeze", 0, "the source says nothing; nothing was started here")),
        },
        () = cancel.cancelled() => return Err(interrupted()),
    };
    let arrived = Instant::now();
    let whole = state.tree.validate().and_then(|()| {
        if state.tree.processes.is_empty() {
            Err("it is empty".into())
        } else {
            Ok(())
        }
    });
    whole.map_err(|e| lost("freeze")(WireError::Protocol(format!("a tree that is none: {e}"))))?;
    events(Event::Phase { phase: "restore" });
    let processes = state.tree.processes.len() as u32;
    let threads = state.tree.processes.iter().map(|p| p.threads.len() as u32).sum();
    let tracer = Tracer::start().map_err(|e| Failure::failed("restore", 0, e))?;
    let built = tokio::select! {
        b = build(&mut link, &tracer, state, &id, &state_dir, &stdio, &events) => b,
        () = cancel.cancelled() => Err("the receiver was interrupted".to_owned()),
    };
    let (mut copy, mut journal, mut entry, round) = match built {
        Ok(b) => b,
        Err(reason) => {
            // Everything built so far has died with its guard. Whoever asks later hears the same: nothing is known of it.
            if let Ok((journal, _)) = Journal::open(&state_dir, &id, Side::Destination) {
                let _ = journal.remove();
            }
            let _ = wire::send(&mut link, &Message::Aborted(reason.clone())).await;
            let _ = tokio::time::timeout(Duration::from_secs(2), wire::recv(&mut link)).await;
            return Err(Failure::failed(
                "restore",
                0,
                format!("{reason}; nothing runs here, the source was told"),
            ));
        }
    };

    // The decision: one store that is the journal entry and the release.
    let released = copy.as_mut().is_some_and(|c| c.release());
    let restore_ms = arrived.elapsed().as_secs_f64() * 1000.0;
    let pid = copy.as_ref().map_or(0, Rebuild::root_pid);
    if !released {
        entry.stage = Stage::Aborted;
        let _ = journal.update(&entry);
        drop(copy);
        let reason = "the copy ended before it was released".to_owned();
        let _ = wire::send(&mut link, &Message::Aborted(reason.clone())).await;
        return Err(Failure::failed("restore", 0, format!("{reason}; nothing runs here")));
    }
    let told = wire::send(&mut link, &Message::Running(Running { pid, restore_ms })).await;
    entry.stage = Stage::Running;
    let _ = journal.update(&entry);
    events(Event::Running { pid });
    let left = tracer.call(move || copy.as_mut().map_or(0, Rebuild::clean_up)).await.unwrap_or(1);
    if left > 0 {
        events(Event::Note {
            text: format!("{left} processes keep an unused mapping of the restore"),
        });
    }
    if let Err(e) = told {
        events(Event::Note {
            text: format!("the source did not hear that the tree runs here ({e}); it will ask"),
        });
    } else {
        // Only a source that says that it is done will never ask. One that is merely gone keeps its originals stopped and does.
        let end = tokio::time::timeout(Duration::from_secs(10), wire::recv(&mut link)).await;
        if let Ok(Err(WireError::Link(migrate_transport::LinkError::Closed { clean: true, reason, .. }))) = end
            && reason == wire::DONE
        {
            let _ = journal.remove();
        }
    }
    // The root is a child of this process: without a wait its pid would stay taken after its end.
    let _ = std::thread::Builder::new().name("reaper".into()).spawn(move || misc::wait(pid));
    Ok(Served::Running(Box::new(Report {
        outcome: "migrated".into(),
        id,
        pid: 0,
        restored_pid: pid,
        processes,
        threads,
        rounds: vec![round],
        downtime_ms: 0.0,
        downtime: Downtime {
            restore_ms,
            ..Default::default()
        },
        total_ms: start.elapsed().as_secs_f64() * 1000.0,
        bytes_sent: link.bytes_sent(),
        pages_sent: round.pages,
        pages_zero: round.zero_pages,
        agent_peak_rss: misc::peak_rss(),
        ..Default::default()
    })))
}

fn interrupted() -> Failure {
    Failure::failed("cancel", 0, "interrupted; nothing was started here")
}

type Ready = (Option<Rebuild>, Journal, Entry, Round);

/// Builds the copy up to the last step before the release. Err: why not, in words for both sides.
async fn build<L: Link>(
    link: &mut L,
    tracer: &Tracer,
    state: State,
    id: &str,
    state_dir: &Path,
    stdio: &Stdio,
    events: &Events,
) -> Result<Ready, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let stdio_fds = StdioFds::open(stdio).map_err(|e| format!("cannot open the standard streams: {e}"))?;
    let State {
        tree,
        guards,
        bytes,
        verify,
    } = state;
    let mut entry = Entry {
        id: id.to_owned(),
        side: Side::Destination,
        stage: Stage::Committed,
        processes: Vec::new(),
        peer: link.peer().fingerprint.to_string(),
        since: misc::clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000,
        boot_id: journal::boot_id(),
    };
    let mut journal =
        Journal::create(state_dir, &entry).map_err(|e| format!("cannot write the journal in {}: {e}", state_dir.display()))?;
    let word = journal.file().try_clone().map_err(|e| text(&e))?;
    let (mut copy, sink) = tracer
        .call(move || {
            let pids = if crate::restore::rebuild::pids_free(&tree) {
                Pids::Here
            } else {
                Pids::Fresh
            };
            let copy = Rebuild::skeleton(tree, &word, pids, true).map_err(|e| e.to_string())?;
            let sink = copy.sink().map_err(|e| format!("cannot reach the copy's memory: {e}"))?;
            Ok::<_, String>((copy, sink))
        })
        .await
        .map_err(|e| text(&e))??;
    entry.processes = journal::identify(copy.pids());
    journal.update(&entry).map_err(|e| text(&e))?;
    let round = pages(link, sink, bytes, events).await?;
    let own_hashes = if verify {
        let (r, c) = tracer
            .call(move || (oracle::hashes(copy.tree(), copy.pids(), copy.objects()), copy))
            .await
            .map_err(|e| text(&e))?;
        copy = c;
        Some(r.map_err(|e| format!("cannot hash the copy's pages: {e}"))?)
    } else {
        None
    };
    let (done, copy) = tracer
        .call(move || {
            let mut copy = copy;
            (copy.complete(&stdio_fds, &guards).map_err(|e| e.to_string()), copy)
        })
        .await
        .map_err(|e| text(&e))?;
    done?;
    let h = match tokio::time::timeout(PATIENCE, wire::recv(link)).await {
        Ok(Ok(Message::Handover(h))) => h,
        Ok(Ok(other)) => return Err(format!("the source sent {} instead of the handover", other.name())),
        Ok(Err(e)) => return Err(text(&e)),
        Err(_) => return Err("the source does not hand over".into()),
    };
    if (h.pages, h.zero) != (round.pages, round.zero_pages) {
        return Err(format!(
            "{} pages and {} zero pages were sent, {} and {} arrived",
            h.pages, h.zero, round.pages, round.zero_pages
        ));
    }
    if let (Some(theirs), Some(ours)) = (h.hashes, own_hashes) {
        let d = oracle::differences(&theirs, &ours);
        if !d.is_empty() {
            return Err(format!("the copy's memory differs from the original's: {}", d.join("; ")));
        }
    }
    Ok((Some(copy), journal, entry, round))
}

/// Receives pages until the stream ends, and writes them from a thread of their own.
async fn pages<L: Link>(link: &mut L, sink: Sink, total: u64, events: &Events) -> Result<Round, String> {
    let start = Instant::now();
    let mut stream = link.accept_pages().await.map_err(|e| e.to_string())?;
    let (tx, rx) = std::sync::mpsc::sync_channel::<PageFrame>(4);
    let writer = tokio::task::spawn_blocking(move || -> io::Result<(u64, u64)> {
        let (mut pages, mut zero) = (0, 0);
        for frame in rx {
            let (p, z) = sink.write(&frame)?;
            pages += p;
            zero += z;
        }
        Ok((pages, zero))
    });
    let tx = Arc::new(tx);
    let mut received = 0u64;
    let mut last = Instant::now();
    let mut failed = None;
    loop {
        match tokio::time::timeout(PATIENCE, stream.recv()).await {
            Ok(Ok(Some(frame))) => {
                received += frame.runs.iter().map(|r| u64::from(r.pages) * crate::image::PAGE).sum::<u64>();
                // try_send first: the channel is rarely full, and a blocked runtime thread would hold up the network.
                if let Err(std::sync::mpsc::TrySendError::Full(frame)) = tx.try_send(frame) {
                    let tx = tx.clone();
                    if tokio::task::spawn_blocking(move || tx.send(frame).is_ok()).await.ok() != Some(true) {
                        break;
                    }
                }
                if writer.is_finished() {
                    break;
                }
                if last.elapsed() > Duration::from_millis(100) {
                    last = Instant::now();
                    let rate = (received as f64 / start.elapsed().as_secs_f64()) as u64;
                    events(Event::Progress {
                        round: 1,
                        bytes: received,
                        total,
                        rate,
                    });
                }
            }
            Ok(Ok(None)) => break,
            Ok(Err(e)) => {
                failed = Some(e.to_string());
                break;
            }
            Err(_) => {
                failed = Some("the source stopped sending pages".to_owned());
                break;
            }
        }
    }
    drop(tx);
    let (pages, zero_pages) = writer
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| format!("writing the copy's memory failed: {e}"))?;
    if let Some(f) = failed {
        return Err(f);
    }
    Ok(Round {
        pages,
        zero_pages,
        bytes: received,
        ms: start.elapsed().as_secs_f64() * 1000.0,
    })
}

/// What became of a migration, from the journal alone: presumed abort.
pub fn answer(state_dir: &Path, id: &str) -> Message {
    match Journal::open(state_dir, id, Side::Destination) {
        Err(_) => match Journal::refuse(state_dir, id) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Message::Pending,
            _ => Message::Aborted("this receiver knows nothing of it".into()),
        },
        Ok((journal, entry)) => {
            if entry.boot_id != journal::boot_id() {
                return Message::Aborted("the receiving host has restarted since".into());
            }
            match journal.decision() {
                Ok(1) => Message::Running(Running {
                    pid: entry.processes.first().map_or(0, |p| p.0),
                    restore_ms: 0.0,
                }),
                Ok(0) => {
                    // Undecided: while its tasks wait they may still be let go, unless this question decides against them.
                    if decide_against(&journal) {
                        Message::Aborted("the receiver had not resumed it".into())
                    } else {
                        Message::Pending
                    }
                }
                _ => Message::Aborted("the copy had ended before it was resumed".into()),
            }
        }
    }
}

/// Turns an undecided word into 2. False: it was decided in between.
fn decide_against(journal: &Journal) -> bool {
    use crate::{restore::pilots::WORD, sys::region::Region};
    use std::sync::atomic::Ordering;
    let Ok(region) = Region::map(journal.file(), 4096, 0) else {
        return false;
    };
    region
        .word(WORD)
        .compare_exchange(0, 2, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}
