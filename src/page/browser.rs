//! The pages in a browser, headless: nothing is wider than the page, no chart is empty, no label lies on another or beyond the drawing,
//! text can be read in light and dark, and nothing is loaded.

use super::{bench, html::escape, migration, sample};
use migrate_harness::need;
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Widths of a desktop, two tablets and two phones.
const WIDTHS: [u32; 5] = [1280, 840, 768, 390, 360];

/// Looks at the pages in their frames, and writes what it finds into the document.
const LOOK: &str = include_str!("look.js");

/// A browser at work on one file; what it wrote on stdout.
fn browse(chromium: &Path, dir: &Path, dark: bool, arguments: &[String]) -> String {
    let out = dir.join("out");
    let mut child = Command::new(chromium)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
        ])
        .args([
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
        ])
        .arg("--host-resolver-rules=MAP * ~NOTFOUND")
        .arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }))
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .args(arguments)
        .env("HOME", dir)
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(dir.join("err")).unwrap())
        .process_group(0)
        .spawn()
        .unwrap();
    let since = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if since.elapsed() > Duration::from_secs(60) * migrate_harness::patience() {
            break None;
        }
        thread::sleep(Duration::from_millis(50));
    };
    // What it started, too.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.wait();
    let err = || fs::read_to_string(dir.join("err")).unwrap_or_default();
    assert!(ended.is_some_and(|s| s.success()), "{}: {ended:?}\n{}", chromium.display(), err());
    fs::read_to_string(&out).unwrap()
}

/// The pages to look at.
fn pages() -> [(&'static str, String); 2] {
    [
        ("bench", bench(&sample::results())),
        (
            "migration",
            migration(&sample::sent(), &sample::machine(), "migration of process 4242 to 10.0.0.2:7878"),
        ),
    ]
}

/// What the look at all pages in all widths found.
fn look(chromium: &Path, dark: bool) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let mut frames = String::new();
    for (name, page) in pages() {
        for width in WIDTHS {
            frames.push_str(&format!(
                "<iframe data-name=\"{name}\" style=\"width:{width}px;height:900px;border:0\" srcdoc=\"{}\"></iframe>\n",
                escape(&page)
            ));
        }
    }
    let outer = dir.path().join("outer.html");
    let html = format!("<!DOCTYPE html>\n<meta charset=\"utf-8\">\n{frames}<pre id=\"found\"></pre>\n<script>\n{LOOK}</script>\n");
    fs::write(&outer, html).unwrap();
    let arguments = [
        "--virtual-time-budget=5000".into(),
        "--dump-dom".into(),
        format!("file://{}", outer.display()),
    ];
    let dom = browse(chromium, dir.path(), dark, &arguments);
    let found = dom.split_once("<pre id=\"found\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let found = found.unwrap_or_else(|| panic!("no answer of the browser: {dom}")).0;
    let found = found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&found).unwrap_or_else(|e| panic!("{e}: {found}"))
}

#[test]
fn in_a_browser() {
    let chromium = need!("chromium");
    let mut brightness = Vec::new();
    for dark in [false, true] {
        let found = look(&chromium, dark);
        assert_eq!(found.len(), WIDTHS.len() * pages().len());
        for one in found {
            let what = format!("{} at {} px, {}", one["name"], one["width"], if dark { "dark" } else { "light" });
            let figures = one["figures"].as_u64().unwrap();
            assert!(figures >= 4, "{what}: {figures} charts");
            assert_eq!(one["charts"], figures, "{what}: one drawing of each chart is to be seen");
            assert_eq!(one["loaded"], 0, "{what}: it loaded something");
            assert_eq!(one["problems"].as_array().unwrap(), &Vec::<Value>::new(), "{what}");
            brightness.push((dark, one["brightness"].as_f64().unwrap()));
        }
    }
    assert!(
        brightness.iter().all(|(dark, b)| if *dark { *b < 0.1 } else { *b > 0.9 }),
        "{brightness:?}"
    );
    // For people: MIGRATE_PAGES=DIR keeps the pages, and pictures of them.
    if let Some(dir) = std::env::var_os("MIGRATE_PAGES") {
        keep(&chromium, &PathBuf::from(dir));
    }
}

fn keep(chromium: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (name, page) in pages() {
        let file = to.join(format!("{name}.html"));
        fs::write(&file, &page).unwrap();
        for (dark, width, height) in [(false, 1280, 5000), (true, 1280, 5000), (false, 500, 7000), (true, 500, 7000)] {
            let dir = tempfile::tempdir().unwrap();
            let png = to.join(format!("{name}-{width}{}.png", if dark { "-dark" } else { "" }));
            let arguments = [
                "--hide-scrollbars".into(),
                format!("--window-size={width},{height}"),
                format!("--screenshot={}", png.display()),
                format!("file://{}", file.display()),
            ];
            browse(chromium, dir.path(), dark, &arguments);
        }
    }
}
