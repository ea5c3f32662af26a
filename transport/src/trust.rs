//! Who this host is, and whom it trusts.
//!
//! Whoever may send a process here runs code here, so both ends of every connection are always known. Under the state directory (mode
//! 0700):
//!
//! ```text
//! identity.pem            0600  this host's Ed25519 key and its self-signed certificate, made on first use
//! trusted/<fingerprint>   0600  one peer each: its name, when it was first seen, under which addresses it is reached
//! ```
//!
//! Every file is written under a temporary name, synced, and linked or renamed into place: a reader sees all of it or none. A file that is
//! damaged is an error that names the file; it is never replaced silently, as that would change who this host is, or whom it trusts.
//!
//! A [`Ticket`] makes two hosts know each other. `receive` prints it, the person carries it to the other host, and `send` proves there that
//! it holds it. It is good for one use, within ten minutes or as the receiver has it, by the receiver's clock.

mod identity;
mod store;
mod ticket;
pub(crate) mod tls;

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

pub use identity::Identity;
pub use store::{TrustStore, TrustedPeer};
pub use ticket::{Clock, Ticket, Tickets};
pub(crate) use ticket::{Proof, TicketVerdict};

/// The SHA-256 of a public key (its SubjectPublicKeyInfo): the name of an identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub(crate) [u8; 32]);

impl Fingerprint {
    pub(crate) fn of_spki(spki: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, spki);
        let mut out = [0; 32];
        out.copy_from_slice(digest.as_ref());
        Self(out)
    }

    /// The raw hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 digits: enough to tell a person's few hosts apart, and to name one to `trust remove`.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = TrustError;

    fn from_str(text: &str) -> Result<Self, TrustError> {
        let bad = || TrustError::Fingerprint {
            given: text.chars().take(80).collect(),
        };
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16);
            match pair {
                [hi, lo] => *byte = (digit(*hi).ok_or_else(bad)? << 4 | digit(*lo).ok_or_else(bad)?) as u8,
                _ => return Err(bad()),
            }
        }
        Ok(Self(out))
    }
}

/// What a host calls itself: 1 to 64 of `A-Z a-z 0-9 . _ : -`, so that it can be printed anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerName(String);

impl PeerName {
    /// A checked name.
    pub fn new(text: &str) -> Result<Self, TrustError> {
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"._:-".contains(&c));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(TrustError::Name {
                given: text.chars().take(80).collect(),
            })
        }
    }

    /// The nearest legal name to any text.
    pub fn from_lossy(text: &str) -> Self {
        let legal: String = text
            .trim()
            .chars()
            .take(64)
            .map(|c| if c.is_ascii_alphanumeric() || "._:-".contains(c) { c } else { '-' })
            .collect();
        Self(if legal.is_empty() { "unnamed".to_owned() } else { legal })
    }

    /// This host's name, as the kernel has it.
    pub fn of_this_host() -> Self {
        Self::from_lossy(&fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with the state directory, a ticket or a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} is damaged ({detail}): {cure}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
        /// What to do.
        cure: &'static str,
    },
    /// Others can read a secret.
    #[error("{} can be read by others (mode {mode:04o}): run chmod 600 on it, or remove it to get a new identity", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A key could not be made.
    #[error("cannot make an identity: {0}")]
    Generate(String),
    /// Not a fingerprint.
    #[error("\"{given}\" is not a fingerprint: expected 64 hexadecimal digits")]
    Fingerprint {
        /// What was given.
        given: String,
    },
    /// Not a name.
    #[error("\"{given}\" cannot be a peer's name: use 1 to 64 letters, digits or . _ : -")]
    Name {
        /// What was given.
        given: String,
    },
    /// No peer of that name.
    #[error("no trusted peer is called, or has a fingerprint that begins with, \"{given}\": see `migrate trust list`")]
    NoSuchPeer {
        /// What was given.
        given: String,
    },
    /// More than one peer fits.
    #[error("\"{given}\" fits {} peers ({}): give more of the fingerprint", matches.len(), matches.join(", "))]
    Ambiguous {
        /// What was given.
        given: String,
        /// The peers it fits.
        matches: Vec<String>,
    },
    /// A ticket with a typing mistake.
    #[error("this is not a whole ticket ({0}): copy it again, from \"mig1\" to the end")]
    Ticket(&'static str),
}

pub(crate) fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TrustError {
    move |source| TrustError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Makes a private directory, and those above it, if it is missing.
fn ensure_dir(path: &Path) -> Result<(), TrustError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(file_error("make the directory", path))
}

/// How a new file takes its place.
enum Place {
    /// Over whatever is there.
    Replace,
    /// Only if nothing is there yet.
    New,
}

/// Writes a private file so that it is either whole or not there. Returns false if [`Place::New`] found one.
fn write_file(path: &Path, content: &[u8], place: Place) -> Result<bool, TrustError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let dir = path.parent().unwrap_or(Path::new("."));
    let temporary = dir.join(format!(".new-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let fail = file_error("write", path);
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        let placed = match place {
            Place::Replace => fs::rename(&temporary, path).map(|()| true),
            Place::New => match fs::hard_link(&temporary, path) {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(e),
            },
        }?;
        File::open(dir)?.sync_all()?;
        Ok(placed)
    })();
    if !matches!((&result, &place), (Ok(_), Place::Replace)) {
        let _ = fs::remove_file(&temporary); // best effort: the name is unique and never read
    }
    result.map_err(fail)
}
