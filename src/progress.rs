//! Events as they come: a progress line on a terminal, lines of JSON for a program, notes otherwise.
//!
//! Events arrive on the engine's threads, which must never wait for a slow terminal (one held with Ctrl-S, a pipe nobody reads). So a
//! thread of its own prints, and progress that it cannot keep up with is dropped; nothing else is.

use crate::{human, out};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use migrate_engine::report::{Event, Events};
use serde::Serialize;
use std::{
    io::IsTerminal,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Progress waiting to be printed beyond which more is dropped.
const BACKLOG: usize = 32;

const WITH_SIZE: &str = "{prefix:10} [{bar:24}] {percent:>3}%  {msg}";
const WITHOUT_SIZE: &str = "{prefix:10} {msg}";

/// How events are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A line on a terminal that is drawn over.
    Line,
    /// JSON, one event a line.
    Json,
    /// Notes only.
    Plain,
}

impl Style {
    /// The line would be torn by log records, so `-v` goes without.
    pub fn choose(json: bool, verbose: u8) -> Style {
        if json {
            Style::Json
        } else if verbose == 0 && std::io::stderr().is_terminal() {
            Style::Line
        } else {
            Style::Plain
        }
    }
}

enum Message {
    /// With the time since the start.
    Event(Event, Duration),
    /// A line of text as it is.
    Line(String),
    /// Answer when everything before has been printed and the progress line is gone.
    Flush(Sender<()>),
}

/// The printing thread.
pub struct Progress {
    sender: Sender<Message>,
    waiting: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
    began: Instant,
    /// Everything but progress, for a report that draws it.
    kept: Option<Kept>,
}

/// What happened, and when: since the start.
pub type Kept = Arc<Mutex<Vec<(Duration, Event)>>>;

/// An event as `--json` prints it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    event: &'a Event,
    /// Milliseconds since the start of the command.
    at_ms: f64,
}

impl Progress {
    /// Starts it. `shared`: the program will print on our terminal once it runs.
    pub fn start(style: Style, shared: bool) -> std::io::Result<Progress> {
        let (sender, receiver) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let printer = Printer::new(style, shared, waiting.clone());
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || printer.run(&receiver))?;
        Ok(Progress {
            sender,
            waiting,
            thread: Mutex::new(Some(thread)),
            began: Instant::now(),
            kept: None,
        })
    }

    /// Keeps what happens from now on.
    pub fn keep(&mut self) -> Kept {
        self.kept.insert(Kept::default()).clone()
    }

    /// For the engine.
    pub fn events(&self) -> Events {
        let (sender, waiting) = (self.sender.clone(), self.waiting.clone());
        let (began, kept) = (self.began, self.kept.clone());
        Arc::new(move |event| {
            let at = began.elapsed();
            let droppable = matches!(event, Event::Progress { .. });
            if let Some(kept) = kept.as_ref().filter(|_| !droppable) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push((at, event.clone()));
            }
            if droppable && waiting.load(Ordering::Relaxed) >= BACKLOG {
                return;
            }
            waiting.fetch_add(1, Ordering::Relaxed);
            let _ = sender.send(Message::Event(event, at));
        })
    }

    /// A line on stderr, in order with the events.
    pub fn say(&self, line: impl Into<String>) {
        let _ = self.sender.send(Message::Line(line.into()));
    }

    /// Waits until all is printed, and clears the progress line: stdout may be written.
    pub fn flush(&self) {
        let (done, wait) = channel();
        if self.sender.send(Message::Flush(done)).is_ok() && wait.recv().is_err() {
            // The thread panicked: there is nothing more to wait for.
            let _ = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}

/// State of the printing thread.
struct Printer {
    style: Style,
    waiting: Arc<AtomicUsize>,
    bar: Option<ProgressBar>,
    phase: &'static str,
    /// What the planner said last.
    outlook: String,
    /// The program that arrives here will share the terminal.
    shares: bool,
    /// It does now, or is about to: nothing is drawn over its output.
    shared: bool,
}

impl Printer {
    fn new(style: Style, shares: bool, waiting: Arc<AtomicUsize>) -> Printer {
        Printer {
            style,
            waiting,
            bar: None,
            phase: "",
            outlook: String::new(),
            shares,
            shared: false,
        }
    }

    fn run(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Event(event, at) => {
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    self.event(&event, at);
                }
                Message::Line(line) => self.line(&line),
                Message::Flush(done) => {
                    self.clear();
                    let _ = done.send(());
                }
            }
        }
    }

    fn event(&mut self, event: &Event, at: Duration) {
        let at_ms = (at.as_secs_f64() * 1e6).round() / 1e3;
        match (self.style, event) {
            (Style::Json, event) => match serde_json::to_string(&Line { event, at_ms }) {
                Ok(json) => self.line(&json),
                Err(error) => tracing::warn!(%error, "an event was not printed"),
            },
            (_, Event::Note { text }) => self.line(&format!("migrate: {}", human::printable(text))),
            (Style::Line, event) => self.draw(event),
            (Style::Plain, _) => {}
        }
    }

    fn line(&self, line: &str) {
        let text = format!("{line}\n");
        match &self.bar {
            Some(bar) => bar.suspend(|| out::stderr(&text)),
            None => out::stderr(&text),
        }
    }

    fn draw(&mut self, event: &Event) {
        match event {
            Event::Phase { phase } => {
                self.phase = phase;
                self.outlook.clear();
                // A new migration: the program of the last one, if it shares the terminal, has to live with this.
                self.shared &= !matches!(*phase, "connect" | "inventory" | "preflight");
                // It may write before it is known to run.
                if self.shares && *phase == "restore" {
                    self.clear();
                    self.shared = true;
                }
                let phase = self.phase;
                self.with_bar(|bar| {
                    bar.set_style(style(WITHOUT_SIZE));
                    bar.set_prefix(phase);
                    bar.set_message("");
                });
            }
            Event::Progress { round, bytes, total, rate } => {
                let message = measures(*round, *bytes, *total, *rate) + &self.outlook;
                let (bytes, total) = (*bytes, *total);
                self.with_bar(|bar| {
                    bar.set_style(style(WITH_SIZE));
                    bar.set_length(total);
                    bar.set_position(bytes.min(total));
                    bar.set_message(message);
                });
            }
            Event::Round(round) => {
                let text = format!("round done: {} in {}", human::bytes(round.bytes), human::millis(round.ms));
                self.with_bar(|bar| bar.set_message(text));
            }
            Event::Plan {
                round,
                dirty_rate,
                rate,
                predicted_downtime_ms,
                ..
            } => {
                self.outlook = outlook(*dirty_rate, *predicted_downtime_ms);
                let text = format!("round {round}, {}{}", human::rate(*rate), self.outlook);
                self.with_bar(|bar| bar.set_message(text));
            }
            Event::Running { .. } => {
                self.clear();
                self.shared = self.shares;
            }
            Event::Note { .. } => {}
        }
    }

    fn with_bar(&mut self, change: impl FnOnce(&ProgressBar)) {
        if self.shared {
            return;
        }
        let phase = self.phase;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style(WITHOUT_SIZE));
            bar.set_prefix(phase);
            bar
        });
        change(bar);
        bar.tick();
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("=> ")
}

/// "round 2, 312 MB/s, 1.20 GB of 4.00 GB".
fn measures(round: u32, bytes: u64, total: u64, rate: u64) -> String {
    let round = if round > 0 { format!("round {round}, ") } else { String::new() };
    format!("{round}{}, {} of {}", human::rate(rate), human::bytes(bytes), human::bytes(total))
}

/// ", 50.1 MB/s dirtied, freeze now 4.20 ms".
fn outlook(dirty_rate: u64, predicted_ms: f64) -> String {
    format!(", {} dirtied, freeze now {}", human::rate(dirty_rate), human::millis(predicted_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_line_says() {
        assert_eq!(
            measures(2, 1_200_000_000, 4_000_000_000, 312_000_000),
            "round 2, 312 MB/s, 1.20 GB of 4.00 GB"
        );
        assert_eq!(measures(0, 0, 0, 0), "0 B/s, 0 B of 0 B");
        assert_eq!(outlook(50_100_000, 4.2), ", 50.1 MB/s dirtied, freeze now 4.20 ms");
    }

    #[test]
    fn progress_is_dropped_when_nobody_prints_and_nothing_else_is() {
        let (sender, receiver) = channel();
        let progress = Progress {
            sender,
            waiting: Arc::default(),
            thread: Mutex::new(None),
            began: Instant::now(),
            kept: None,
        };
        let events = progress.events();
        for bytes in 0..1000 {
            events(Event::Progress {
                round: 1,
                bytes,
                total: 1000,
                rate: 0,
            });
        }
        for _ in 0..100 {
            events(Event::Phase { phase: "freeze" });
        }
        assert_eq!(receiver.try_iter().count(), BACKLOG + 100);
    }

    #[test]
    fn flush_waits() {
        let progress = Progress::start(Style::Plain, false).unwrap();
        progress.events()(Event::Phase { phase: "freeze" });
        progress.flush();
        assert_eq!(progress.waiting.load(Ordering::Relaxed), 0);
    }
}
