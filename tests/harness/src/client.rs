//! Clients that ask a program from the network of its hosts: HTTP, and the protocol of Redis.

use crate::{Hosts, Process, Stdio, host::Host, tools::patience};
use nix::sched::{CloneFlags, setns};
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// One answered request.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// Which host answered, 0 for A.
    pub host: usize,
    /// The number in the answer.
    pub count: u64,
    /// When it was asked for.
    pub asked: Instant,
    /// When it came.
    pub came: Instant,
}

/// Asks one of two addresses over and over, each time by a new connection, the one that answered last first, and keeps every answer.
pub struct Client {
    answers: Arc<Mutex<Vec<Answer>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Asks an HTTP server whose pages are numbers: port `port` of A and B from host A's network, every `every`.
    pub fn http(hosts: &Hosts, port: u16, every: Duration) -> Client {
        Client::start(hosts, port, every, |address| Ok(number(&get(address, "/")?)))
    }

    /// The same at any two addresses, from this network.
    pub fn between(addresses: [SocketAddr; 2], every: Duration) -> Client {
        Client::ask(addresses, None, every, |address| Ok(number(&get(address, "/")?)))
    }

    /// One page.
    pub fn get(address: SocketAddr, path: &str) -> io::Result<String> {
        get(address, path)
    }

    /// Counts a key of a Redis server up, in the same way.
    pub fn redis(hosts: &Hosts, port: u16, every: Duration) -> Client {
        Client::start(hosts, port, every, |address| Ok(number(&command(address, &["INCR", "asked"])?)))
    }

    fn start(hosts: &Hosts, port: u16, every: Duration, ask: fn(SocketAddr) -> io::Result<Option<u64>>) -> Client {
        let addresses = [&hosts.a, &hosts.b].map(|h| SocketAddr::new(h.address().parse().expect("an address"), port));
        let net = File::open(format!("/proc/{}/ns/net", hosts.a.init())).expect("the host's network");
        Client::ask(addresses, Some(net), every, ask)
    }

    fn ask(addresses: [SocketAddr; 2], net: Option<File>, every: Duration, ask: fn(SocketAddr) -> io::Result<Option<u64>>) -> Client {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (answers, stop) = (Arc::clone(&answers), Arc::clone(&stop));
            thread::spawn(move || {
                if let Some(net) = net {
                    setns(net, CloneFlags::CLONE_NEWNET).expect("setns");
                }
                let mut turn = 0;
                let mut failed: Option<Instant> = None;
                while !stop.load(Ordering::SeqCst) {
                    let asked = failed.unwrap_or_else(Instant::now);
                    match ask(addresses[turn]).ok().flatten() {
                        Some(count) => {
                            failed = None;
                            let answer = Answer {
                                host: turn,
                                count,
                                asked,
                                came: Instant::now(),
                            };
                            answers.lock().unwrap_or_else(|e| e.into_inner()).push(answer);
                            thread::sleep(every);
                        }
                        None => {
                            failed = Some(asked);
                            turn = 1 - turn;
                            thread::sleep(Duration::from_micros(200));
                        }
                    }
                }
            })
        };
        Client {
            answers,
            stop,
            thread: Some(thread),
        }
    }

    /// Every answer so far.
    pub fn answers(&self) -> Vec<Answer> {
        self.answers.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Waits until a host has answered `more` further requests.
    pub fn wait_for(&self, host: usize, more: usize) {
        let count = || self.answers().iter().filter(|a| a.host == host).count();
        let goal = count() + more;
        crate::within("answers to the client", Duration::from_secs(30), || (count() >= goal).then_some(()));
    }

    /// The longest time from a question to its answer, tries that failed included.
    pub fn longest_wait(&self) -> Duration {
        longest(&self.answers()).unwrap_or_default()
    }

    /// The same of what was asked from then on; none if nothing was answered.
    pub fn longest_wait_since(&self, since: Instant) -> Option<Duration> {
        let mut answers = self.answers();
        answers.retain(|a| a.asked >= since);
        longest(&answers)
    }

    /// Fails the test unless the answers count on without a gap or a repeat.
    #[track_caller]
    pub fn expect_counts_on(&self) {
        let answers = self.answers();
        assert!(!answers.is_empty(), "no request was answered");
        for pair in answers.windows(2) {
            assert_eq!(pair[1].count, pair[0].count + 1, "the counter did not count on: {pair:?}");
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn longest(answers: &[Answer]) -> Option<Duration> {
    answers.iter().map(|a| a.came - a.asked).max()
}

fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let limit = Duration::from_secs(5) * patience();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(500))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: counter\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    Ok(body.to_string())
}

/// The first number of an answer, whatever surrounds it.
fn number(body: &str) -> Option<u64> {
    let digits: String = body
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().ok()
}

/// A connection to a Redis server in a host's network; each command on a connection of its own, so that none is open during a move.
pub struct Redis<'a> {
    host: &'a Host,
    address: SocketAddr,
}

impl<'a> Redis<'a> {
    /// Starts a server that anybody may ask, with these arguments too, and waits until it answers. What it keeps and logs is in a directory of the hosts'.
    pub fn start(hosts: &Hosts, host: &'a Host, port: u16, more: &[&str]) -> Process<'a> {
        Redis::start_with(hosts, host, port, more, |c| c.stdio(Stdio::File(hosts.file("redis-log"))))
    }

    /// The same, with a word about how it is started.
    pub fn start_with(
        hosts: &Hosts,
        host: &'a Host,
        port: u16,
        more: &[&str],
        how: impl FnOnce(crate::Command<'a>) -> crate::Command<'a>,
    ) -> Process<'a> {
        let dir = hosts.file("redis");
        fs::create_dir_all(&dir).expect("a directory");
        let (port_text, dir_text) = (port.to_string(), dir.display().to_string());
        let mut argv = vec!["redis-server", "--port", &port_text, "--dir", &dir_text, "--appendonly", "no"];
        argv.extend(["--bind", "0.0.0.0", "--protected-mode", "no", "--enable-debug-command", "yes"]);
        argv.extend(more);
        let server = how(host.command(argv)).cwd(&dir).start();
        Redis::of(host, port).wait();
        server
    }

    /// The server on this port of the host.
    pub fn of(host: &'a Host, port: u16) -> Redis<'a> {
        Redis {
            host,
            address: SocketAddr::new(host.address().parse().expect("an address"), port),
        }
    }

    /// One command, and its answer as text.
    pub fn ask(&self, words: &[&str]) -> io::Result<String> {
        let address = self.address;
        self.host.inside(move || command(address, words))
    }

    /// Waits until it answers.
    pub fn wait(&self) {
        crate::within("answer of redis-server", Duration::from_secs(30), || self.ask(&["PING"]).ok());
    }
}

/// One command to a Redis server, and its answer as text.
fn command(address: SocketAddr, words: &[&str]) -> io::Result<String> {
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(60) * patience()))?;
    (&stream).write_all(command.as_bytes())?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (kind, rest) = line.trim_end().split_at_checked(1).ok_or(io::ErrorKind::UnexpectedEof)?;
    match kind {
        "$" => {
            let len: usize = rest.parse().map_err(io::Error::other)?;
            let mut bytes = vec![0; len];
            reader.read_exact(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        "-" => Err(io::Error::other(rest.to_string())),
        _ => Ok(rest.to_string()),
    }
}
