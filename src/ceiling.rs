//! `migrate ceiling`: the same QUIC endpoint without trust, protocol or processes, for `make bench`.

use crate::{cli::Ceiling, out, report};
use migrate_transport::ceiling;

/// Serves until it is interrupted, or measures once.
pub async fn run(command: Ceiling) -> anyhow::Result<u8> {
    match command {
        Ceiling::Serve { addr } => {
            let server = ceiling::serve(addr).await?;
            tokio::signal::ctrl_c().await?;
            drop(server);
        }
        Ceiling::Measure { addr, bytes } => {
            let t = ceiling::measure(addr, bytes).await?;
            let rate = t.bytes as f64 / t.elapsed.as_secs_f64();
            out::json(&serde_json::json!({ "bytes_per_second": rate, "datagram_bytes": t.datagram_size }))?;
        }
    }
    Ok(report::DONE)
}
