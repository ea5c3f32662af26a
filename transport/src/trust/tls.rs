//! TLS 1.3 by pinned keys: no authorities, no names, no dates. A certificate is a wrapper for a public key; what counts is the key's
//! fingerprint, and that the peer signs the handshake with it.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs as aws, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::SingleCertAndKey,
};

use super::{Fingerprint, Identity, identity::fingerprint_of};

/// The name in the TLS hello. Means nothing, and so tells an eavesdropper nothing.
pub const SERVER_NAME: &str = "migrate";
/// The application protocol. A server without it is not a receiver.
pub const ALPN: &[u8] = b"migrate/1";

/// aws-lc-rs, with AES-128-GCM first: the fastest where the processor has AES, and the link is limited by it.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws::default_provider();
    provider.cipher_suites.retain(|suite| suite.tls13().is_some());
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Which servers a client talks to.
#[derive(Debug, Clone)]
pub enum Pin {
    /// Exactly this one.
    Exactly(Fingerprint),
    /// Any of these.
    AnyOf(Vec<Fingerprint>),
    /// Whoever answers. For measurements, where nothing but random numbers is sent.
    Anybody,
}

/// Accepts a server by its fingerprint, and remembers the one it saw, so that a refusal can name it.
#[derive(Debug)]
pub struct PinnedServer {
    pin: Pin,
    seen: Mutex<Option<Fingerprint>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedServer {
    pub fn new(pin: Pin) -> Arc<Self> {
        Arc::new(Self {
            pin,
            seen: Mutex::default(),
            algorithms: provider().signature_verification_algorithms,
        })
    }

    /// The identity presented, whether accepted or not. Only a claim until the handshake is complete.
    pub fn seen(&self) -> Option<Fingerprint> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let fingerprint = fingerprint_of(end_entity)?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(fingerprint);
        let accepted = match &self.pin {
            Pin::Exactly(expected) => fingerprint == *expected,
            Pin::AnyOf(trusted) => trusted.contains(&fingerprint),
            Pin::Anybody => true,
        };
        if accepted {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Makes every client prove that it owns a key. Whether that key is welcome is decided after the handshake, because a stranger may still
/// bring a ticket.
#[derive(Debug)]
pub struct AnyProvenClient {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnyProvenClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        fingerprint_of(end_entity).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// The client's half of TLS.
pub fn client_config(id: &Identity, server: Arc<PinnedServer>, alpn: &[u8]) -> Result<rustls::ClientConfig, Error> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(server)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(id.key.clone())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// The server's half of TLS.
pub fn server_config(id: &Identity, alpn: &[u8]) -> Result<rustls::ServerConfig, Error> {
    let provider = provider();
    let clients = AnyProvenClient {
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(clients))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(id.key.clone())));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The fingerprint of the certificate that a finished handshake proved.
pub fn proven_peer(identity: Option<Box<dyn std::any::Any>>) -> Option<Fingerprint> {
    let chain = identity?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    fingerprint_of(chain.first()?).ok()
}
