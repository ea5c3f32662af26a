//! The QUIC link and the link in memory behave alike.

mod common;

use std::time::Duration;

use common::{joined, suite, within};
use migrate_transport::{Link, LinkError, PageReceiver, PageSender, Run, Section, memory, quic::Tuning};

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

#[tokio::test(start_paused = true)]
async fn delay_and_bandwidth_are_kept_in_virtual_time() {
    let (mut a, mut b, wire) = memory::pair(memory::Config {
        delay: Duration::from_secs(3),
        ..Default::default()
    });
    let begun = tokio::time::Instant::now();
    a.send(Section::new(1, 1, vec![0; 992])).await.unwrap();
    b.recv().await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 3);
    wire.set_delay(Duration::ZERO);
    wire.set_bandwidth(Some(100));
    a.send(Section::new(1, 1, vec![0; 992])).await.unwrap();
    b.recv().await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 13);
    assert_eq!((a.bytes_sent(), b.bytes_sent(), wire.bytes()), (2000, 0, 2000));
}

#[tokio::test(start_paused = true)]
async fn a_cut_wire_is_noticed_by_both_after_the_time_out() {
    let (mut a, mut b, wire) = memory::pair(memory::Config {
        delay: Duration::from_secs(1),
        ..Default::default()
    });
    let begun = tokio::time::Instant::now();
    a.send(Section::new(1, 1, &b"under way"[..])).await.unwrap();
    wire.cut();
    let (x, y) = tokio::join!(a.recv(), b.recv());
    assert!(
        [x, y]
            .into_iter()
            .all(|end| matches!(end, Err(LinkError::Closed { clean: false, .. })))
    );
    assert_eq!(begun.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_wire_is_cut_after_so_many_bytes() {
    let (mut a, mut b, wire) = memory::pair(memory::Config::default());
    wire.cut_after(2 * (8 + 100) + 50);
    for _ in 0..3 {
        a.send(Section::new(1, 1, vec![0; 100])).await.unwrap();
    }
    assert!(b.recv().await.is_ok() && b.recv().await.is_ok());
    assert!(b.recv().await.is_err_and(|error| error.is_closed()));
    let mut pages = match a.open_pages().await {
        Ok(pages) => pages,
        Err(error) => return assert!(error.is_closed()),
    };
    assert!(
        pages
            .send(&[Run::new(0, 0, 1, true).unwrap()], vec![])
            .await
            .is_err_and(|error| error.is_closed())
    );
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_is_slow_holds_its_sender_back() {
    let (mut a, mut b, wire) = memory::pair(memory::Config {
        window: 1 << 20,
        ..Default::default()
    });
    let mut sender = a.open_pages().await.unwrap();
    let page = bytes::Bytes::from(vec![1; 4096]);
    let run = Run::new(0, 0, 1, false).unwrap();
    let push = async {
        loop {
            sender.send(&[run], vec![page.clone()]).await.unwrap();
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(1), push).await.is_err());
    assert!(wire.bytes() <= 1 << 20);
    let mut receiver = b.accept_pages().await.unwrap();
    assert!(receiver.recv().await.unwrap().is_some());
}
