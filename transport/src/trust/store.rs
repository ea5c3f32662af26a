//! The peers this host trusts, one small file each.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{Fingerprint, PeerName, Place, TrustError, ensure_dir, file_error, write_file};

const DIR: &str = "trusted";
const FIRST_LINE: &str = "migrate trusted peer 1";
const CURE: &str = "remove the file and enrol the peer again with a ticket";
/// A peer file is a few lines; more is damage.
const MAX_FILE: u64 = 16 << 10;
/// Addresses remembered for one peer, the newest last.
const MAX_ADDRESSES: usize = 16;

/// A peer this host trusts: it may send processes here, and be sent some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedPeer {
    /// Its identity.
    pub fingerprint: Fingerprint,
    /// What it called itself, or what it was added as.
    pub name: PeerName,
    /// When it was enrolled.
    pub first_seen: SystemTime,
    /// Under which HOST:PORT it was reached. An address seen here must show this identity again.
    pub addresses: Vec<String>,
}

/// The trust store of a state directory. It reads the files each time, so that `migrate trust remove` holds at once for a receiver that is
/// running.
#[derive(Debug, Clone)]
pub struct TrustStore {
    dir: PathBuf,
}

impl TrustStore {
    /// The store of this state directory; made if it is missing.
    pub fn open(state_dir: &Path) -> Result<Self, TrustError> {
        ensure_dir(state_dir)?;
        let dir = state_dir.join(DIR);
        ensure_dir(&dir)?;
        Ok(Self { dir })
    }

    /// All peers, by name.
    pub fn list(&self) -> Result<Vec<TrustedPeer>, TrustError> {
        let mut peers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(file_error("read", &self.dir))? {
            let name = entry.map_err(file_error("read", &self.dir))?.file_name();
            // Anything else is a temporary name of a write that a crash cut short.
            if let Some(fingerprint) = name.to_str().and_then(|text| Fingerprint::from_str(text).ok()) {
                peers.extend(self.get(&fingerprint)?);
            }
        }
        peers.sort_by(|a, b| (a.name.as_str(), a.fingerprint).cmp(&(b.name.as_str(), b.fingerprint)));
        Ok(peers)
    }

    /// The peer of this identity, if it is trusted.
    pub fn get(&self, fingerprint: &Fingerprint) -> Result<Option<TrustedPeer>, TrustError> {
        use io::Read;
        let path = self.path(fingerprint);
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(file_error("read", &path)(e)),
        };
        let mut text = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut text).map_err(file_error("read", &path))?;
        let parsed = String::from_utf8(text)
            .map_err(|_| "it is not text".to_owned())
            .and_then(|text| parse(&text));
        match parsed {
            Ok(peer) if peer.fingerprint == *fingerprint => Ok(Some(peer)),
            Ok(_) => Err(TrustError::Damaged {
                path,
                detail: "its name is not its fingerprint".into(),
                cure: CURE,
            }),
            Err(detail) => Err(TrustError::Damaged { path, detail, cure: CURE }),
        }
    }

    /// Trusts an identity. One that is trusted already keeps its first date and its addresses, and takes the new name.
    pub fn add(&self, fingerprint: Fingerprint, name: &PeerName) -> Result<TrustedPeer, TrustError> {
        self.enrol(fingerprint, name, None)
    }

    /// As [`add`](Self::add), and remembers the address under which it was reached.
    pub(crate) fn enrol(&self, fingerprint: Fingerprint, name: &PeerName, address: Option<&str>) -> Result<TrustedPeer, TrustError> {
        if let Some(address) = address {
            // An address belongs to one identity: whoever had it before, a ticket has just said otherwise.
            for mut other in self.list()?.into_iter().filter(|peer| peer.fingerprint != fingerprint) {
                let before = other.addresses.len();
                other.addresses.retain(|known| known != address);
                if other.addresses.len() != before {
                    self.write(&other)?;
                }
            }
        }
        let known = self.get(&fingerprint)?;
        let (first_seen, mut addresses) = known.map_or_else(|| (SystemTime::now(), Vec::new()), |peer| (peer.first_seen, peer.addresses));
        if let Some(address) = address.filter(|address| is_word(address)) {
            addresses.retain(|known| known != address);
            addresses.push(address.to_owned());
            let surplus = addresses.len().saturating_sub(MAX_ADDRESSES);
            addresses.drain(..surplus);
        }
        let peer = TrustedPeer {
            fingerprint,
            name: name.clone(),
            first_seen,
            addresses,
        };
        self.write(&peer)?;
        Ok(peer)
    }

    /// Stops trusting the peer with this name, or the one whose fingerprint begins so (at least 4 digits).
    pub fn remove(&self, name_or_prefix: &str) -> Result<TrustedPeer, TrustError> {
        let lower = name_or_prefix.to_ascii_lowercase();
        let fits = |peer: &TrustedPeer| {
            peer.name.as_str() == name_or_prefix || (lower.len() >= 4 && peer.fingerprint.to_string().starts_with(&lower))
        };
        let mut matches: Vec<_> = self.list()?.into_iter().filter(fits).collect();
        match matches.len() {
            0 => Err(TrustError::NoSuchPeer {
                given: name_or_prefix.to_owned(),
            }),
            1 => {
                let peer = matches.swap_remove(0);
                let path = self.path(&peer.fingerprint);
                fs::remove_file(&path).map_err(file_error("remove", &path))?;
                Ok(peer)
            }
            _ => {
                let matches = matches
                    .iter()
                    .map(|peer| format!("{} {}", peer.name, peer.fingerprint.short()))
                    .collect();
                Err(TrustError::Ambiguous {
                    given: name_or_prefix.to_owned(),
                    matches,
                })
            }
        }
    }

    fn path(&self, fingerprint: &Fingerprint) -> PathBuf {
        self.dir.join(fingerprint.to_string())
    }

    fn write(&self, peer: &TrustedPeer) -> Result<(), TrustError> {
        write_file(&self.path(&peer.fingerprint), render(peer).as_bytes(), Place::Replace).map(drop)
    }
}

fn is_word(text: &str) -> bool {
    (1..=300).contains(&text.len()) && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

fn render(peer: &TrustedPeer) -> String {
    let seconds = peer.first_seen.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut text = format!(
        "{FIRST_LINE}\nfingerprint {}\nname {}\nfirst-seen {seconds}\n",
        peer.fingerprint, peer.name
    );
    peer.addresses.iter().for_each(|address| text += &format!("address {address}\n"));
    text
}

fn parse(text: &str) -> Result<TrustedPeer, String> {
    // The last line must be whole, so that a file cut short is seen.
    let body = text.strip_suffix('\n').ok_or("its last line is cut short")?;
    let mut lines = body.split('\n');
    if lines.next() != Some(FIRST_LINE) {
        return Err(format!("its first line is not \"{FIRST_LINE}\""));
    }
    let (mut fingerprint, mut name, mut first_seen, mut addresses) = (None, None, None, Vec::new());
    for line in lines {
        let (key, value) = line.split_once(' ').ok_or("a line without a value")?;
        match key {
            "fingerprint" => fingerprint = Some(Fingerprint::from_str(value).map_err(|e| e.to_string())?),
            "name" => name = Some(PeerName::new(value).map_err(|e| e.to_string())?),
            "first-seen" => {
                let seconds = value.parse().map_err(|_| "first-seen is not a number of seconds")?;
                first_seen = Some(
                    UNIX_EPOCH
                        .checked_add(Duration::from_secs(seconds))
                        .ok_or("first-seen is beyond all dates")?,
                );
            }
            "address" if is_word(value) && addresses.len() < MAX_ADDRESSES => addresses.push(value.to_owned()),
            _ => return Err(format!("an unexpected line {:?}", key.chars().take(40).collect::<String>())),
        }
    }
    Ok(TrustedPeer {
        fingerprint: fingerprint.ok_or("no fingerprint line")?,
        name: name.ok_or("no name line")?,
        first_seen: first_seen.ok_or("no first-seen line")?,
        addresses,
    })
}
