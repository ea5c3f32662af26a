//! Identities, tickets and the trust store, on disk.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    str::FromStr,
};

use common::Host;
use migrate_transport::trust::{Fingerprint, Identity, PeerName, Ticket, TrustError, TrustStore};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn an_identity_is_made_once_and_private() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("state");
    let first = Identity::load_or_create(&dir).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("identity.pem")), 0o600);
    let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["identity.pem"], "no temporary file is left");
    assert_eq!(Identity::load_or_create(&dir).unwrap().fingerprint(), first.fingerprint());
    assert_ne!(Identity::ephemeral().unwrap().fingerprint(), first.fingerprint());
}

#[test]
fn two_first_uses_agree() {
    let dir = tempfile::tempdir().unwrap();
    let made: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Identity::load_or_create(dir.path()).unwrap().fingerprint()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(made.iter().all(|fingerprint| *fingerprint == made[0]));
}

#[test]
fn a_damaged_identity_is_named_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity.pem");
    Identity::load_or_create(dir.path()).unwrap();
    let whole = fs::read(&path).unwrap();
    let other = tempfile::tempdir().unwrap();
    Identity::load_or_create(other.path()).unwrap();
    let foreign = fs::read_to_string(other.path().join("identity.pem")).unwrap();
    let key = String::from_utf8(whole.clone()).unwrap();
    let mixed = format!(
        "{}{}",
        key.split("-----BEGIN CERT").next().unwrap(),
        &foreign[foreign.find("-----BEGIN CERT").unwrap()..]
    );
    for damaged in [&b""[..], b"hello", &whole[..whole.len() / 2], mixed.as_bytes()] {
        fs::write(&path, damaged).unwrap();
        match Identity::load_or_create(dir.path()).unwrap_err() {
            TrustError::Damaged { path: named, .. } => assert_eq!(named, path),
            other => panic!("{other}"),
        }
        assert_eq!(fs::read(&path).unwrap(), damaged, "it is not replaced");
    }
}

#[test]
fn an_exposed_identity_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    Identity::load_or_create(dir.path()).unwrap();
    fs::set_permissions(dir.path().join("identity.pem"), fs::Permissions::from_mode(0o640)).unwrap();
    let error = Identity::load_or_create(dir.path()).unwrap_err();
    assert!(matches!(error, TrustError::Exposed { mode: 0o640, .. }), "{error}");
    assert!(error.to_string().contains("chmod 600"));
}

#[test]
fn nothing_secret_is_printed() {
    let host = Host::new();
    let ticket = host.tickets.issue().unwrap();
    let word = ticket.to_string();
    let pem = fs::read_to_string(host.dir.path().join("identity.pem")).unwrap();
    let printed = format!("{:?} {:?} {:?} {:?}", host.id, host.tickets, ticket, host.store);
    // The secret is letters 52 to 77 of the base32 part: 32 bytes of fingerprint come first.
    assert!(!printed.contains(&word[56..80]));
    assert!(!printed.contains(pem.lines().nth(1).unwrap()));
    assert!(!printed.to_lowercase().contains("secret"));
}

#[test]
fn tickets_survive_copying_and_nothing_else() {
    let host = Host::new();
    let word = host.tickets.issue().unwrap().to_string();
    assert_eq!(word.len(), 88);
    assert!(word.starts_with("mig1") && word.bytes().all(|c| c.is_ascii_alphanumeric()));
    for spelling in [word.clone(), format!(" {word}\n"), word.to_uppercase()] {
        let back = Ticket::from_str(&spelling).unwrap();
        assert_eq!(back.to_string(), word);
        assert_eq!(back.receiver(), host.id.fingerprint());
    }
    for i in 0..word.len() {
        let mut letters = word.clone().into_bytes();
        letters[i] = if letters[i] == b'c' { b'd' } else { b'c' };
        assert!(Ticket::from_str(std::str::from_utf8(&letters).unwrap()).is_err(), "letter {i}");
        assert!(Ticket::from_str(&word[..i]).is_err());
        assert!(Ticket::from_str(&format!("{}{}", &word[..i], &word[i + 1..])).is_err());
    }
    assert!(Ticket::from_str(&format!("{word}a")).is_err());
    assert!(Ticket::from_str("mig1 ünïcode").is_err());
}

#[test]
fn peers_are_added_listed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = TrustStore::open(dir.path()).unwrap();
    let print = |byte: u8| Fingerprint::from_str(&format!("{byte:02x}").repeat(32)).unwrap();
    let name = |text| PeerName::new(text).unwrap();
    assert_eq!(store.list().unwrap(), []);
    store.add(print(0xab), &name("beta")).unwrap();
    store.add(print(0xac), &name("alpha")).unwrap();
    store.add(print(0x01), &name("alpha")).unwrap();
    let names: Vec<_> = store
        .list()
        .unwrap()
        .into_iter()
        .map(|peer| (peer.name.to_string(), peer.fingerprint))
        .collect();
    assert_eq!(
        names,
        [
            ("alpha".into(), print(0x01)),
            ("alpha".into(), print(0xac)),
            ("beta".into(), print(0xab))
        ]
    );
    assert_eq!(mode(&dir.path().join("trusted")), 0o700);
    assert_eq!(mode(&dir.path().join("trusted").join(print(1).to_string())), 0o600);

    let first_seen = store.get(&print(0xab)).unwrap().unwrap().first_seen;
    let renamed = store.add(print(0xab), &name("gamma")).unwrap();
    assert_eq!((renamed.first_seen, renamed.name.as_str()), (first_seen, "gamma"));

    assert!(matches!(store.remove("alpha"), Err(TrustError::Ambiguous { .. })));
    assert!(matches!(store.remove("nobody"), Err(TrustError::NoSuchPeer { .. })));
    assert!(
        matches!(store.remove("ab"), Err(TrustError::NoSuchPeer { .. })),
        "a prefix is at least four digits"
    );
    assert_eq!(store.remove("ABAB").unwrap().fingerprint, print(0xab));
    assert_eq!(store.remove("0101").unwrap().fingerprint, print(0x01));
    assert_eq!(store.remove("alpha").unwrap().fingerprint, print(0xac));
    assert_eq!(store.list().unwrap(), []);
}

#[test]
fn a_damaged_peer_is_an_error_and_a_stray_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = TrustStore::open(dir.path()).unwrap();
    let fingerprint = Fingerprint::from_str(&"5c".repeat(32)).unwrap();
    store.add(fingerprint, &PeerName::new("db2").unwrap()).unwrap();
    let path = dir.path().join("trusted").join(fingerprint.to_string());
    fs::write(dir.path().join("trusted/.new-1-1"), "half").unwrap();
    assert_eq!(store.list().unwrap().len(), 1);

    let whole = fs::read(&path).unwrap();
    // Cut anywhere, it is damaged, or has no address line yet: never another peer.
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(store.get(&fingerprint), Err(TrustError::Damaged { .. })), "{len}");
        assert!(store.list().is_err());
    }
    let swapped = String::from_utf8(whole).unwrap().replace("5c5c", "5d5d");
    fs::write(&path, swapped).unwrap();
    assert!(matches!(store.get(&fingerprint), Err(TrustError::Damaged { .. })));
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    assert!(matches!(store.get(&fingerprint), Err(TrustError::Damaged { .. })));
}

#[test]
fn names_cannot_disturb_a_terminal() {
    for bad in ["", "a b", "a\nb", "\u{1b}[2J", "ü", &"x".repeat(65)] {
        assert!(PeerName::new(bad).is_err(), "{bad:?}");
        assert!(PeerName::new(PeerName::from_lossy(bad).as_str()).is_ok(), "{bad:?}");
    }
    assert!(Fingerprint::from_str("zz").is_err());
    assert!(Fingerprint::from_str(&"ü".repeat(32)).is_err());
}
