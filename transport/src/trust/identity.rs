//! This host's key and certificate.

use std::{fmt, fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use aws_lc_rs::hmac;
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};

use super::{Fingerprint, PeerName, Place, TrustError, ensure_dir, file_error, tls, write_file};

const FILE: &str = "identity.pem";
const CURE: &str = "restore it from a backup, or remove it to get a new identity, which every peer must enrol again";

/// An Ed25519 key and its self-signed certificate. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    pub(super) key: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    name: PeerName,
    reset_key: Arc<hmac::Key>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// The identity kept in the state directory, made there on first use.
    pub fn load_or_create(state_dir: &Path) -> Result<Self, TrustError> {
        ensure_dir(state_dir)?;
        let path = state_dir.join(FILE);
        match Self::load(&path)? {
            Some(identity) => Ok(identity),
            None => {
                // Two first uses at once: one wins the name, and both go on with the winner's.
                write_file(&path, generate()?.as_bytes(), Place::New)?;
                Self::load(&path)?.ok_or_else(|| file_error("read", &path)(io::ErrorKind::NotFound.into()))
            }
        }
    }

    /// An identity that lives in memory only.
    pub fn ephemeral() -> Result<Self, TrustError> {
        Self::from_pem(generate()?.as_bytes()).map_err(TrustError::Generate)
    }

    fn load(path: &Path) -> Result<Option<Self>, TrustError> {
        let pem = match fs::read(path) {
            Ok(pem) => pem,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(file_error("read", path)(e)),
        };
        let mode = fs::metadata(path).map_err(file_error("read", path))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TrustError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        Self::from_pem(&pem).map(Some).map_err(|detail| TrustError::Damaged {
            path: path.to_owned(),
            detail,
            cure: CURE,
        })
    }

    fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| format!("no private key in it: {e}"))?;
        let cert = CertificateDer::from_pem_slice(pem).map_err(|e| format!("no certificate in it: {e}"))?;
        // A key of its own, from which nobody can work back to the identity's.
        let reset_key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.secret_der()), b"migrate stateless reset 1");
        let reset_key = Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset_key.as_ref()));
        let signer = tls::provider()
            .key_provider
            .load_private_key(key)
            .map_err(|e| format!("its key is unusable: {e}"))?;
        if signer.algorithm() != rustls::SignatureAlgorithm::ED25519 {
            return Err("its key is not an Ed25519 key".into());
        }
        let fingerprint = fingerprint_of(&cert).map_err(|e| format!("its certificate is unusable: {e}"))?;
        let certified = CertifiedKey::new(vec![cert.into_owned()], signer);
        certified
            .keys_match()
            .map_err(|_| "its key and certificate do not belong together")?;
        Ok(Self {
            key: Arc::new(certified),
            fingerprint,
            name: PeerName::of_this_host(),
            reset_key,
        })
    }

    /// The name of this identity.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// What peers are told this host is called.
    pub fn name(&self) -> &PeerName {
        &self.name
    }

    /// The key for stateless resets: the same for every endpoint of this identity.
    pub(crate) fn reset_key(&self) -> hmac::Key {
        (*self.reset_key).clone()
    }

    /// Uses another name than the host's.
    pub fn with_name(mut self, name: PeerName) -> Self {
        self.name = name;
        self
    }
}

/// The fingerprint of a certificate's public key.
pub(super) fn fingerprint_of(cert: &CertificateDer<'_>) -> Result<Fingerprint, rustls::Error> {
    Ok(Fingerprint::of_spki(&ParsedCertificate::try_from(cert)?.subject_public_key_info()))
}

/// A new key and certificate, as one PEM text.
fn generate() -> Result<String, TrustError> {
    let failed = |e: rcgen::Error| TrustError::Generate(e.to_string());
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(failed)?;
    let mut params = rcgen::CertificateParams::new(vec![tls::SERVER_NAME.to_owned()]).map_err(failed)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "migrate");
    let cert = params.self_signed(&key).map_err(failed)?;
    Ok(format!("{}{}", key.serialize_pem(), cert.pem()))
}
