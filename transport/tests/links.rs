//! The QUIC link and the link in memory behave alike.

mod common;

use std::time::Duration;

use common::{Host, joined, suite, within};
use migrate_transport::{memory, quic::Tuning};

#[tokio::test]
async fn quic_passes_the_suite() {
    let (a, b, _listener, _hosts) = within(10, joined(Tuning::default())).await;
    within(15, suite(a, b)).await;
}

#[tokio::test]
async fn quic_passes_the_suite_backwards() {
    let (a, b, _listener, _hosts) = within(10, joined(Tuning::default())).await;
    within(15, suite(b, a)).await;
}

#[tokio::test(start_paused = true)]
async fn memory_passes_the_suite() {
    let (a, b, _wire) = memory::pair(memory::Config::default());
    suite(a, b).await;
}

#[tokio::test(start_paused = true)]
async fn slow_memory_passes_the_suite() {
    let config = memory::Config {
        delay: Duration::from_millis(70),
        bytes_per_second: Some(1 << 20),
        ..Default::default()
    };
    let (a, b, _wire) = memory::pair(config);
    suite(a, b).await;
}

#[tokio::test]
async fn a_ticket_enrols_both() {
    let (source, destination) = (Host::new(), Host::new());
    let listener = destination.listen().await;
    let ticket = destination.tickets.issue().unwrap();
    let (there, here) = tokio::join!(source.connect(&listener, Some(&ticket)), listener.accept());
    drop((there.unwrap(), here.unwrap()));
    let (there, here) = tokio::join!(source.connect(&listener, None), listener.accept());
    drop((there.unwrap(), here.unwrap()));
}
