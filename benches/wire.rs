//! Pages and sections over a QUIC connection on loopback, against plain QUIC between the same two processes.
//!
//! `cargo bench --bench wire [-- NAME]`

#[path = "common/random.rs"]
mod random;

use bytes::Bytes;
use criterion::{Criterion, SamplingMode, Throughput};
use migrate_transport::{
    Link, LinkError, PageReceiver, PageSender, Run, Section, ceiling,
    quic::{self, Listener},
    trust::{Identity, Ticket, Tickets, TrustStore},
};
use std::{
    env,
    error::Error,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

type Failure = Box<dyn Error>;

/// Makes a process the receiver: the directory for its trust store.
const ROLE: &str = "MIGRATE_BENCH_RECEIVER";
/// Bytes sent at a time: what slow start takes does not show in them.
const BYTES: usize = 512 << 20;
/// A full frame.
const FRAME: usize = 256 * PAGE;
const PAGE: usize = 4096;
/// Sections of this kind come back; one of another announces pages.
const ECHO: u16 = 1;

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if let Some(dir) = env::var_os(ROLE) {
        return runtime.block_on(receive(dir.as_ref()));
    }
    let dir = tempfile::tempdir()?;
    let mut c = Criterion::default().configure_from_args();
    send(&mut c, &runtime, dir.path())?;
    c.final_summary();
    Ok(())
}

async fn receive(dir: &Path) -> Result<(), Failure> {
    let id = Identity::load_or_create(dir)?;
    let tickets = Tickets::new(&id);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let plain = ceiling::serve(any).await?;
    let listener = Listener::bind(any, &id, TrustStore::open(dir)?, tickets.clone()).await?;
    println!("{}\n{}\n{}", plain.local_addr(), listener.local_addr(), tickets.issue()?);
    loop {
        let link = listener.accept().await?;
        tokio::spawn(answer(link));
    }
}

async fn answer(mut link: impl Link) -> Result<(), LinkError> {
    loop {
        let section = link.recv().await?;
        if section.kind == ECHO {
            link.send(section).await?;
        } else {
            let mut pages = link.accept_pages().await?;
            while pages.recv().await?.is_some() {}
        }
    }
}

/// Ends with the value.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send(c: &mut Criterion, runtime: &Runtime, dir: &Path) -> Result<(), Failure> {
    let mut child = Command::new(env::current_exe()?)
        .env(ROLE, dir.join("receiver"))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let _receiver = Receiver(child);
    let mut line = || lines.next().ok_or("the receiver said nothing")?.map_err(Failure::from);
    let (plain, pages, ticket): (SocketAddr, String, Ticket) = (line()?.parse()?, line()?, line()?.parse()?);
    let (id, store) = (Identity::load_or_create(dir)?, TrustStore::open(dir)?);
    let mut link = runtime.block_on(quic::connect(&pages, &id, &store, Some(&ticket)))?;
    let frame = Bytes::from(random::random(FRAME));

    let mut group = c.benchmark_group("wire");
    group.bench_function("section there and back", |b| {
        b.iter(|| {
            let echo = async {
                link.send(Section::new(ECHO, 1, Bytes::new())).await?;
                link.recv().await
            };
            runtime.block_on(echo).expect("the section")
        });
    });
    group
        .sampling_mode(SamplingMode::Flat)
        .sample_size(20)
        .throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("plain QUIC", |b| {
        b.iter_custom(|times| {
            let bytes = BYTES as u64;
            (0..times)
                .map(|_| runtime.block_on(ceiling::measure(plain, bytes)).expect("plain QUIC").elapsed)
                .sum()
        });
    });
    group.bench_function("pages", |b| {
        // Over a new connection each time, as plain QUIC is measured.
        let one = async || {
            let mut link = quic::connect(&pages, &id, &store, None).await?;
            let time = push(&mut link, &frame).await?;
            link.close("measured").await;
            Ok::<_, Failure>(time)
        };
        b.iter_custom(|times| (0..times).map(|_| runtime.block_on(one()).expect("pages")).sum());
    });
    Ok(())
}

/// How long pages are under way until all are acknowledged.
async fn push(link: &mut impl Link, frame: &Bytes) -> Result<Duration, Failure> {
    link.send(Section::new(ECHO + 1, 1, Bytes::new())).await?;
    let begun = Instant::now();
    let mut sender = link.open_pages().await?;
    for start in (0..BYTES as u64).step_by(FRAME) {
        let run = Run::new(0, start, (FRAME / PAGE) as u32, false)?;
        sender.send(&[run], vec![frame.clone()]).await?;
    }
    sender.finish().await?;
    Ok(begun.elapsed())
}
