//! `migrate trust list|add|remove`.

use crate::{context::Context, engine, human, out, report};
use serde_json::json;

/// Prints the trusted hosts and our own fingerprint.
pub fn list(context: &Context) -> anyhow::Result<u8> {
    let trusted = engine::trust_list(&context.state_dir)?;
    if context.json {
        out::json(&trusted)?;
        return Ok(report::DONE);
    }
    let mut text = format!("this host: {}\n", trusted.own);
    if trusted.peers.is_empty() {
        text.push_str("no other host is trusted\n");
    } else {
        let mut rows = vec![["FINGERPRINT", "NAME", "ADDED"].map(String::from).to_vec()];
        rows.extend(
            trusted
                .peers
                .into_iter()
                .map(|peer| vec![peer.fingerprint, human::printable(&peer.name), human::ago(peer.added)]),
        );
        text.push_str(&human::table(&rows));
    }
    out::stdout(&text)?;
    Ok(report::DONE)
}

/// Trusts a host.
pub fn add(fingerprint: &str, name: Option<&str>, context: &Context) -> anyhow::Result<u8> {
    let peer = engine::trust_add(&context.state_dir, fingerprint, name)?;
    say(context, "trusted", &peer)
}

/// Trusts a host no longer.
pub fn remove(peer: &str, context: &Context) -> anyhow::Result<u8> {
    let peer = engine::trust_remove(&context.state_dir, peer)?;
    say(context, "removed", &peer)
}

fn say(context: &Context, outcome: &str, peer: &engine::TrustedPeer) -> anyhow::Result<u8> {
    if context.json {
        out::json(&json!({ "outcome": outcome, "peer": peer, "exit_code": report::DONE }))?;
    } else {
        out::stdout(&format!("{outcome} {} {}\n", peer.fingerprint, human::printable(&peer.name)))?;
    }
    Ok(report::DONE)
}
