//! The same workload through CRIU, where it is installed: `criu dump` on one host, `criu restore` on the other, the images in a directory that both see. Nothing crosses a
//! network: what is measured is less than what a user of it would have to wait for.

use super::bed::Bed;
use migrate_harness::{Hosts, Run};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// Why there is nothing of it.
const MISSING: &str = "criu is not installed (apt-get install criu)";

/// An installed CRIU.
pub struct Criu(PathBuf);

impl Criu {
    /// Looks for it. Err: why it is not measured.
    pub fn find(bed: &Bed) -> Result<Criu, String> {
        match bed {
            Bed::There(_) => Err("CRIU is measured between two hosts on this machine only".into()),
            Bed::Here { .. } => {
                let program = migrate_harness::tool("criu").ok_or(MISSING)?;
                // It knows best whether it can do anything with this kernel.
                let checked = Command::new(&program).arg("check").output();
                let checked = checked.map_err(|e| format!("{}: {e}", program.display()))?;
                let said = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
                if checked.status.success() {
                    Ok(Criu(program))
                } else {
                    Err(format!(
                        "criu is installed, but `criu check` says that it does not work on this kernel: {}",
                        last_errors(&said)
                    ))
                }
            }
        }
    }

    /// Moves a tree from A to B. The report has what its user would count: from the start of the dump to the end of the restore.
    pub fn moved(&self, hosts: &Hosts, pid: i32) -> Result<(Value, Vec<(f64, Value)>), String> {
        let images = hosts.file("criu");
        std::fs::create_dir_all(&images).map_err(|e| format!("{}: {e}", images.display()))?;
        let dir = images.display().to_string();
        let program = self.0.display().to_string();
        let run = |host: &migrate_harness::Host, args: &[&str]| {
            let argv: Vec<String> = [program.as_str(), args[0], "--images-dir", &dir, "--tcp-close"]
                .iter()
                .chain(&args[1..])
                .map(|a| (*a).to_owned())
                .collect();
            let run = Run::of(&host.command(argv).start(), Duration::from_secs(600));
            match run.code {
                0 => Ok(()),
                code => Err(format!("criu {}: code {code}: {}", args[0], last_errors(&run.all()))),
            }
        };
        let began = Instant::now();
        run(&hosts.a, &["dump", "--skip-in-flight", "--tree", &pid.to_string()])?;
        let dumped = began.elapsed();
        run(&hosts.b, &["restore", "--restore-detached"])?;
        let total = began.elapsed();
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let report = json!({ "outcome": "migrated", "downtime_ms": ms(total), "total_ms": ms(total), "dump_ms": ms(dumped) });
        Ok((report, Vec::new()))
    }
}

fn last_errors(text: &str) -> String {
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("Error")).collect();
    errors[errors.len().saturating_sub(3)..].join("; ")
}
