//! Plain quinn against page streams, side by side: `cargo run --release --example throughput [MIB] [ROUNDS]`.
//!
//! The receiving half runs as a second process, as it would in a migration. Each round measures one after the other, so that both see the
//! same machine.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Instant,
};

use bytes::Bytes;
use migrate_transport::{
    Encoding, Link, PageReceiver, PageSender, Run, ceiling,
    quic::{self, Congestion, Listener, Tuning},
    trust::{Identity, Ticket, Tickets, TrustStore},
};

type Failure = Box<dyn std::error::Error>;

/// Pages in a frame: the most there can be.
const FRAME: usize = 256 * 4096;

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match std::env::args().nth(1).as_deref() {
        Some("serve") => runtime.block_on(serve()),
        first => {
            let mib = first.map_or(Ok(1024), str::parse)?;
            let rounds = std::env::args().nth(2).map_or(Ok(3), |text| text.parse())?;
            runtime.block_on(measure(mib, rounds))
        }
    }
}

/// Tuning from the environment, to try things out.
fn tuning() -> Result<Tuning, Failure> {
    let mut tuning = Tuning::default();
    if let Ok(text) = std::env::var("DATAGRAM") {
        tuning.max_datagram = text.parse()?;
    }
    if std::env::var("CC").is_ok_and(|text| text == "bbr") {
        tuning.congestion = Congestion::Bbr;
    }
    Ok(tuning)
}

async fn serve() -> Result<(), Failure> {
    let dir = tempdir()?;
    let id = Identity::load_or_create(&dir)?;
    let tickets = Tickets::new(&id);
    let plain = ceiling::serve(([127, 0, 0, 1], 0).into()).await?;
    let store = TrustStore::open(&dir)?;
    let listener = Listener::bind_with(([127, 0, 0, 1], 0).into(), &id, store, tickets.clone(), tuning()?).await?;
    println!("{}\n{}\n{}", plain.local_addr(), listener.local_addr(), tickets.issue()?);
    loop {
        let mut link = listener.accept().await?;
        tokio::spawn(async move {
            while let Ok(mut stream) = link.accept_pages().await {
                tokio::spawn(async move { while let Ok(Some(_)) = stream.recv().await {} });
            }
        });
    }
}

async fn measure(mib: u64, rounds: u32) -> Result<(), Failure> {
    let mut server = Command::new(std::env::current_exe()?).arg("serve").stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(server.stdout.take().ok_or("no output")?).lines();
    let mut line = || lines.next().ok_or("the server said nothing")?.map_err(Failure::from);
    let (plain, pages, ticket): (_, _, Ticket) = (line()?.parse()?, line()?, line()?.parse()?);

    let dir = tempdir()?;
    let (id, store, tuning) = (Identity::load_or_create(&dir)?, TrustStore::open(&dir)?, tuning()?);
    let bytes = mib << 20;
    let mut random = vec![0; FRAME];
    let mut seed = 1u64;
    random.iter_mut().for_each(|byte| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (seed >> 56) as u8;
    });
    let random = Bytes::from(random);
    let text = Bytes::from(b"a page that compresses, about as well as memory does; ".repeat(FRAME / 54 + 1)).slice(..FRAME);

    println!(
        "{:>10} {:>10} {:>8} {:>10} {:>10}",
        "plain", "pages", "ratio", "1-page", "zstd text"
    );
    quic::connect_with(&pages, &id, &store, Some(&ticket), &tuning)
        .await?
        .close("enrolled")
        .await;
    ceiling::measure_with(plain, bytes / 4, 1, &tuning).await?; // warms the machine up
    let (mut plains, mut framings) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Who goes first alternates, so that a machine that speeds up or slows down favours nobody.
        let plain_first = round % 2 == 0;
        let mut before = None;
        if plain_first {
            before = Some(ceiling::measure_with(plain, bytes, 1, &tuning).await?);
        }
        let mut link = quic::connect_with(&pages, &id, &store, None, &tuning).await?;
        let framed = push(&mut link, bytes, Encoding::Raw, &random, FRAME).await?;
        let before = match before {
            Some(before) => before,
            None => ceiling::measure_with(plain, bytes, 1, &tuning).await?,
        };
        let cut = push(&mut link, bytes / 4, Encoding::Raw, &random, 4096).await?;
        let packed = push(&mut link, bytes / 4, Encoding::Zstd, &text, FRAME).await?;
        let size = link.datagram_size();
        link.close("measured").await;
        let plain = before.mb_per_s();
        plains.push(plain);
        framings.push(framed);
        println!(
            "{plain:>10.0} {framed:>10.0} {:>8.3} {cut:>10.0} {packed:>10.0}   datagrams {} {size}",
            framed / plain,
            before.datagram_size
        );
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let (plain, framed) = (median(&mut plains), median(&mut framings));
    println!("{plain:>10.0} {framed:>10.0} {:>8.3}   medians", framed / plain);
    let peak = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    for (name, pid) in [("sender", std::process::id()), ("receiver", server.id())] {
        let status = peak(pid);
        println!(
            "{name}: {}",
            status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM unknown")
        );
    }
    server.kill()?;
    server.wait()?;
    Ok(())
}

/// 10⁶ bytes a second, in chunks as a reader of memory would hand them over.
async fn push(link: &mut impl Link, bytes: u64, encoding: Encoding, data: &Bytes, chunk: usize) -> Result<f64, Failure> {
    let mut sender = link.open_pages().await?;
    sender.set_encoding(encoding);
    let begun = Instant::now();
    let frames = bytes / FRAME as u64;
    for i in 0..frames {
        let run = Run::new(1, i * FRAME as u64, (FRAME / 4096) as u32, false)?;
        let chunks = (0..FRAME / chunk).map(|at| data.slice(at * chunk..(at + 1) * chunk)).collect();
        sender.send(&[run], chunks).await?;
    }
    sender.finish().await?;
    Ok((frames * FRAME as u64) as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

fn tempdir() -> Result<std::path::PathBuf, Failure> {
    let dir = std::env::temp_dir().join(format!("migrate-throughput-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
