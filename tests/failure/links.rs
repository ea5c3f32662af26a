//! Links that delay, reorder, lose, or carry little. The program is moved all the same, and nothing of it is lost.

use crate::copies;
use migrate_harness::{Ended, Guest, Relay, Stdio, Weather, two_hosts};
use std::time::Duration;

fn moves_through(weather: Weather, mib: &str, modes: &[&str]) {
    for mode in modes {
        let hosts = two_hosts!();
        let guest = Guest::start(&hosts.a, "ballast", &[("mib", mib), ("dirty", "2")]);
        let receiver = hosts.b.receive(&Stdio::Null);
        let relay = Relay::start(&hosts, &receiver.target, weather);
        let pid = guest.pid.to_string();
        let args = ["send", &pid, &relay.address, "--ticket", &receiver.ticket, "--json", "--mode", mode];
        let sender = hosts.a.migrate(&args).start();
        let ended = sender.wait_for(Duration::from_secs(120));
        let report: serde_json::Value = serde_json::from_str(&sender.stdout()).unwrap_or_default();
        println!(
            "{mode} over {weather:?}: {ended:?}, freeze {} ms, {} ms in all, {} datagrams, {} lost",
            report["downtime_ms"],
            report["total_ms"],
            relay.passed(),
            relay.dropped()
        );
        assert_eq!(
            ended,
            Ended::Code(0),
            "{mode} over {weather:?}: {} {}",
            sender.stdout(),
            sender.stderr()
        );
        assert_eq!(
            receiver.process.wait_for(Duration::from_secs(60)),
            Ended::Code(0),
            "{}",
            receiver.process.stderr()
        );
        assert!(relay.passed() > 500, "it went another way");
        let list = copies(&hosts, &guest);
        assert!(
            list.len() == 1 && list[0].0.name() == "b",
            "{mode} over {weather:?}: {} copies",
            list.len()
        );
        assert!(guest.beats(), "{mode} over {weather:?}: it stands still");
        guest.verify(&format!("{mode} over {weather:?}"));
        guest.quit();
    }
}

#[test]
fn link_that_delays() {
    let weather = Weather {
        delay: Duration::from_millis(40),
        ..Weather::default()
    };
    moves_through(weather, "24", &["hybrid", "post-copy"]);
}

#[test]
fn link_that_reorders_and_loses() {
    let weather = Weather {
        delay: Duration::from_millis(2),
        late: 10,
        lost: 1,
        ..Weather::default()
    };
    moves_through(weather, "16", &["pre-copy", "post-copy"]);
}

#[test]
fn link_that_carries_a_megabyte_a_second() {
    let weather = Weather {
        delay: Duration::from_millis(1),
        rate: 1_000_000,
        ..Weather::default()
    };
    moves_through(weather, "8", &["hybrid", "post-copy"]);
}
