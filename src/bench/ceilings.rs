//! What plain means carry on this machine: the measure of what a migration could.

use super::{bed::Bed, results::Ceilings, run::caught};
use migrate_harness::Hosts;
use std::{
    hint::black_box,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

/// What is carried to know how much takes about a second, and the most.
const PROBE: u64 = 8 << 20;
const MOST: u64 = 512 << 20;
/// A port that only these hosts have.
const TCP: u16 = 7901;

/// Measures all three; what cannot be measured is left out, and said.
pub fn measure(bed: &Bed, note: &impl Fn(String)) -> Ceilings {
    let mut ceilings = Ceilings {
        memcpy: Some(memcpy()),
        ..Ceilings::default()
    };
    match bed {
        Bed::There(_) => note("plain QUIC and TCP are not measured: the other machine only takes migrations".into()),
        Bed::Here { .. } => {
            let both = caught(|| {
                let hosts = Hosts::new().ok_or_else(|| "two hosts could not be made".to_owned())?;
                Ok((quic(&hosts), tcp(&hosts)))
            });
            match both {
                Ok((quic, tcp)) => (ceilings.quic, ceilings.tcp) = (quic, tcp),
                Err(why) => note(format!("plain QUIC and TCP were not measured: {why}")),
            }
        }
    }
    ceilings
}

/// Bytes a second from one buffer into another, neither of which fits into a cache.
fn memcpy() -> f64 {
    const SIZE: usize = 128 << 20;
    let from = vec![1_u8; SIZE];
    let mut to = vec![0_u8; SIZE];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let since = Instant::now();
        black_box(&mut to).copy_from_slice(black_box(&from));
        best = best.min(since.elapsed().as_secs_f64());
    }
    SIZE as f64 / best
}

fn quic(hosts: &Hosts) -> Option<f64> {
    hosts
        .ceiling(PROBE)
        .and_then(|rate| hosts.ceiling((rate as u64).clamp(PROBE, MOST)))
}

fn tcp(hosts: &Hosts) -> Option<f64> {
    let address: SocketAddr = format!("{}:{TCP}", hosts.b.address()).parse().ok()?;
    let listener = hosts.b.inside(|| TcpListener::bind(address)).ok()?;
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().ok()?;
        let mut bytes = vec![0; 256 << 10];
        let mut sum = 0;
        loop {
            match stream.read(&mut bytes).ok()? {
                0 => return Some(sum),
                n => sum += n as u64,
            }
        }
    });
    let began = Instant::now();
    let sent = hosts.a.inside(|| -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        let bytes = vec![7; 256 << 10];
        let mut sent = 0;
        while sent < PROBE || (sent < MOST && began.elapsed() < Duration::from_secs(1)) {
            stream.write_all(&bytes)?;
            sent += bytes.len() as u64;
        }
        Ok(())
    });
    // Without a connection the reader would wait for one for ever.
    sent.ok()?;
    let sum = reader.join().ok().flatten()?;
    Some(sum as f64 / began.elapsed().as_secs_f64())
}
