//! `migrate receive`.

use crate::{
    cli::Receive,
    context::Context,
    engine::Receiver,
    human, interrupt, out,
    report::{self, Deed, Stake},
};
use anyhow::Context as _;
use migrate_engine::{
    destination::Bounds,
    report::{Event, Events, Stdio},
};
use serde_json::json;
use std::{
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Serves migrations until a signal, or one with `--once`.
pub async fn run(arguments: Receive, context: &Context) -> anyhow::Result<u8> {
    let stdio = checked(arguments.stdio)?;
    let shares_stdout = stdio == Stdio::Inherit;
    let _interrupts = interrupt::watch(context, "interrupted: ending; a migration in progress is undone first")?;
    let receiver = Receiver::bind(arguments.listen, &context.state_dir, arguments.ticket_lifetime).await?;
    let bounds = Bounds::new(arguments.peer_timeout, arguments.at_once);
    let mut ticket = String::new();
    loop {
        let now = receiver.ticket();
        if now != ticket {
            announce(context, &receiver, &now, arguments.ticket_file.as_deref())?;
            ticket = now;
        }
        let (events, busy) = watched(context.progress.events());
        let result = receiver.next(stdio.clone(), events, context.cancel.clone(), bounds.clone()).await;
        let idle = !busy.load(Ordering::Relaxed);
        match result {
            Ok(report) => {
                report::success(context, &report, &Deed::Received, shares_stdout, report::DONE);
                if arguments.once && report.outcome != "predicted" {
                    return Ok(report::DONE);
                }
            }
            // Nobody was being served: an end like any other, unless a migration was asked for.
            Err(_) if context.cancel.is_cancelled() && idle && !arguments.once => return Ok(report::DONE),
            // What does not come from a migration will not pass by itself.
            Err(failure) if failure.phase == "listen" => return Err(failure.into()),
            Err(failure) => {
                let code = report::failure(context, &failure, Stake::AtSender);
                if arguments.once {
                    return Ok(code);
                }
            }
        }
        if context.cancel.is_cancelled() {
            return Ok(report::FAILED);
        }
        // A peer that fails at once, over and over, does not get all of this host.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Events, and whether there was one.
fn watched(events: Events) -> (Events, Arc<AtomicBool>) {
    let busy = Arc::new(AtomicBool::new(false));
    let seen = busy.clone();
    let events: Events = Arc::new(move |event: Event| {
        seen.store(true, Ordering::Relaxed);
        events(event);
    });
    (events, busy)
}

/// Says how to reach us; a ticket file is all a script needs.
fn announce(context: &Context, receiver: &Receiver, ticket: &str, file: Option<&Path>) -> anyhow::Result<()> {
    let address = receiver.local_addr();
    let fingerprint = receiver.fingerprint();
    let to = reachable(address);
    if let Some(file) = file {
        write_secret(file, ticket).with_context(|| format!("ticket file {}", file.display()))?;
    }
    if context.json {
        let mut event = json!({
            "event": "listening",
            "address": address,
            "send_to": to,
            "fingerprint": fingerprint,
        });
        match file {
            Some(file) => event["ticket_file"] = json!(file),
            None => event["ticket"] = json!(ticket),
        }
        context.progress.say(event.to_string());
        context.progress.flush();
        return Ok(());
    }
    let ticket = match file {
        Some(file) => format!("\"$(cat {})\"", file.display()),
        None => ticket.to_owned(),
    };
    let within = human::millis(receiver.ticket_lifetime().as_secs_f64() * 1e3);
    let text = format!(
        "Listening on {address}, fingerprint {fingerprint}\n\
         On the host of the program, within {within} and once:\n\n  \
         migrate send PID {to} --ticket {ticket}\n\n\
         Without --ticket from hosts that sent here before, or are in `migrate trust list`.\n"
    );
    if file.is_some() {
        context.progress.say(text.trim_end());
        context.progress.flush();
        return Ok(());
    }
    context.progress.flush();
    Ok(out::stdout(&text)?)
}

/// The address as another host would type it.
fn reachable(address: SocketAddr) -> String {
    let port = address.port();
    let ip = if address.ip().is_unspecified() {
        own_address(address.ip())
    } else {
        Some(address.ip())
    };
    match ip {
        Some(ip) => SocketAddr::new(ip, port).to_string(),
        None => {
            let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let name = name.trim();
            format!("{}:{port}", if name.is_empty() { "THISHOST" } else { name })
        }
    }
}

/// The address this host speaks to others with: of its default route, else of any interface.
fn own_address(unspecified: IpAddr) -> Option<IpAddr> {
    // Connecting a UDP socket only looks up the route: nothing is sent to these addresses, which are for documentation.
    let v4 = || routed((Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv4Addr::new(192, 0, 2, 1), 9).into());
    let v6 = || {
        routed(
            (Ipv6Addr::UNSPECIFIED, 0).into(),
            (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into(),
        )
    };
    // [::] takes IPv4 as well.
    let routed = if unspecified.is_ipv6() { v6().or_else(v4) } else { v4() };
    routed.or_else(|| {
        nix::ifaddrs::getifaddrs().ok()?.find_map(|interface| {
            let address = interface.address?;
            let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => IpAddr::V4(v4.ip()),
                (_, Some(v6)) if unspecified.is_ipv6() && !v6.ip().is_unicast_link_local() => IpAddr::V6(v6.ip()),
                _ => return None,
            };
            (!ip.is_loopback()).then_some(ip)
        })
    })
}

fn routed(from: SocketAddr, to: SocketAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_secret(file: &Path, secret: &str) -> std::io::Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let _ = fs::remove_file(&temporary); // Of an earlier run that had our pid and died here.
    let write = || {
        let mut open = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        open.write_all(format!("{secret}\n").as_bytes())?;
        fs::rename(&temporary, file)
    };
    let result = write();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// The streams as given, if the file can be appended to: better to hear it now than when a program arrives.
pub fn checked(stdio: Stdio) -> anyhow::Result<Stdio> {
    let Stdio::File(file) = stdio else {
        return Ok(stdio);
    };
    let open = fs::OpenOptions::new().append(true).create(true).open(&file);
    open.with_context(|| format!("--stdio {}", file.display()))?;
    Ok(Stdio::File(std::path::absolute(file)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn secrets_are_private_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ticket");
        fs::write(&file, "an older and longer ticket, readable by all").unwrap();
        write_secret(&file, "T").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "T\n");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_secret(&dir.path().join("no/ticket"), "T").is_err());
    }

    #[test]
    fn addresses_to_type() {
        assert_eq!(reachable("10.0.0.2:9000".parse().unwrap()), "10.0.0.2:9000");
        assert_eq!(reachable("[::1]:9000".parse().unwrap()), "[::1]:9000");
        let to = reachable("0.0.0.0:7878".parse().unwrap());
        assert!(to.ends_with(":7878") && !to.starts_with("0.0.0.0"), "{to}");
        assert!(crate::parse::peer(&to).is_ok(), "{to}");
    }

    #[test]
    fn streams() {
        assert_eq!(checked(Stdio::Null).unwrap(), Stdio::Null);
        let error = checked(Stdio::File("/nowhere/log".into())).unwrap_err();
        assert!(format!("{error:#}").contains("--stdio /nowhere/log"), "{error:#}");
    }
}
