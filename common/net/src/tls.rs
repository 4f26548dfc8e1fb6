//! TLS from PEM files, which may be replaced at any time, and explanations of its failures.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::listen::{Connection, LimitedListener};
use crate::renewed::Renewed;
use crate::tls_error::TlsError;

/// The time limit for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A TLS problem between a client and a server's port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsProblem {
    /// `https://` to a port without TLS.
    #[error("it speaks no TLS: use http://, or start the coordinator with --tls-cert and --tls-key")]
    Plaintext,
    /// `http://` to a port with TLS.
    #[error("it speaks TLS: use https:// (and --tls-ca, if its certificate is not from a public authority)")]
    Encrypted,
    /// Another authority signed the certificate.
    #[error("its certificate is not signed by {0}: give the certificate of the authority that signed it with --tls-ca")]
    Issuer(&'static str),
    /// The certificate is for another host.
    #[error(
        "its certificate is not for the name '{0}': use a name that is in the certificate, or have one made for this name"
    )]
    Name(String),
    /// The certificate has expired.
    #[error("its certificate has expired: renew it (and check this machine's clock)")]
    Expired,
    /// The certificate is not valid yet.
    #[error("its certificate is not valid yet: check this machine's clock")]
    Early,
    /// The server requires a client certificate.
    #[error("it wants a certificate of this worker: give one with --tls-cert and --tls-key")]
    Anonymous,
    /// The server rejects the client's certificate.
    #[error("it does not accept this worker's certificate ({0}): give one that its --tls-client-ca has signed")]
    Unwelcome(String),
    /// Another error.
    #[error("TLS fails: {0}")]
    Other(String),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { flag, path: path.to_owned(), source })
}

/// The certificates in a PEM file, and the file's content.
fn certificates(flag: &'static str, path: &Path) -> Result<(Vec<CertificateDer<'static>>, Vec<u8>), TlsError> {
    let pem = read(flag, path)?;
    let broken = |reason: String| TlsError::Certificate { flag, path: path.to_owned(), reason };
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| broken(e.to_string()))?;
    if found.is_empty() {
        return Err(broken("there is none in it".into()));
    }
    Ok((found, pem))
}

/// Authorities from a PEM file, all of which must be usable.
fn authorities(flag: &'static str, path: &Path) -> Result<(RootCertStore, Vec<u8>), TlsError> {
    let (found, pem) = certificates(flag, path)?;
    let mut roots = RootCertStore::empty();
    for certificate in found {
        roots.add(certificate).map_err(|e| TlsError::Certificate {
            flag,
            path: path.to_owned(),
            reason: e.to_string(),
        })?;
    }
    Ok((roots, pem))
}

/// A certificate with its key.
#[derive(Clone)]
struct Own {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    pem: Identity,
}

impl Own {
    fn read(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let (chain, cert_pem) = certificates("--tls-cert", cert)?;
        let key_pem = read("--tls-key", key)?;
        let broken = |reason: String| TlsError::Key { path: key.to_owned(), reason };
        let secret = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|e| broken(e.to_string()))?;
        match CertifiedKey::from_der(chain.clone(), secret.clone_key(), &provider()) {
            Ok(_) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                return Err(TlsError::Mismatch { cert: cert.to_owned(), key: key.to_owned() });
            }
            Err(rustls::Error::InvalidCertificate(e)) => {
                let (path, reason) = (cert.to_owned(), e.to_string());
                return Err(TlsError::Certificate { flag: "--tls-cert", path, reason });
            }
            Err(e) => return Err(broken(e.to_string())),
        }
        Ok(Self { chain, key: Arc::new(secret), pem: Identity::from_pem(cert_pem, key_pem) })
    }
}

/// The protocol that both ends use over TLS.
const ALPN: &[u8] = b"h2";

fn setup(error: rustls::Error) -> TlsError {
    TlsError::Setup(error.to_string())
}

/// The server's side of TLS. It is read again when its files change. Its key is never shown.
#[derive(Clone)]
pub struct ServerTls(Arc<Renewed<Arc<ServerConfig>>>);

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads a certificate and its key. With `client_ca`, only clients with a certificate from that authority are served.
    pub fn read(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let files = [Some(cert), Some(key), client_ca].into_iter().flatten().map(Path::to_owned).collect();
        let (cert, key, client_ca) = (cert.to_owned(), key.to_owned(), client_ca.map(Path::to_owned));
        let make = move || server_config(&cert, &key, client_ca.as_deref()).map(Arc::new);
        Ok(Self(Arc::new(Renewed::new(files, make)?)))
    }

    /// The connections accepted by `door` whose TLS handshake succeeds, for a gRPC server.
    pub fn incoming(self, door: LimitedListener) -> impl futures::Stream<Item = io::Result<TlsStream<Connection>>> {
        futures::stream::unfold((self, door, JoinSet::new()), |(tls, mut door, mut handshakes)| async move {
            loop {
                tokio::select! {
                    (connection, peer) = door.next() => {
                        let tls = tls.clone();
                        // Each handshake has its own task, so a slow or silent client does not block others.
                        handshakes.spawn(async move { (tls.handshake(connection).await, peer) });
                    }
                    Some(ended) = handshakes.join_next() => match ended {
                        Ok((Ok(stream), _)) => return Some((Ok(stream), (tls, door, handshakes))),
                        Ok((Err(error), peer)) => tracing::debug!(%peer, %error, "no TLS with a client"),
                        Err(error) => tracing::debug!(%error, "a TLS handshake ended early"),
                    },
                }
            }
        })
    }

    async fn handshake(self, connection: Connection) -> io::Result<TlsStream<Connection>> {
        let current = tokio::task::spawn_blocking(move || self.0.current());
        let (config, _) = current.await.map_err(io::Error::other)?;
        tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(config).accept(connection)).await?
    }
}

fn server_config(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<ServerConfig, TlsError> {
    let own = Own::read(cert, key)?;
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(setup)?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let (roots, _) = authorities("--tls-client-ca", ca)?;
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| TlsError::Setup(e.to_string()))?)
        }
    };
    let mut config = builder.with_single_cert(own.chain, own.key.clone_key()).map_err(setup)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// The client's side of TLS. It is read again when its files change. Its key is never shown.
#[derive(Clone)]
pub struct ClientTls(Arc<Renewed<Client>>);

/// A client's configuration.
#[derive(Clone)]
struct Client {
    tonic: ClientTlsConfig,
    rustls: Arc<ClientConfig>,
    trusted: &'static str,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTls").finish_non_exhaustive()
    }
}

impl ClientTls {
    /// Trusts the authorities in `ca`, or those of the system. Shows the certificate in `own`, which is a certificate and its
    /// key.
    pub fn read(ca: Option<&Path>, own: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        let (cert, key) = own.unzip();
        let files = [ca, cert, key].into_iter().flatten().map(Path::to_owned).collect();
        let own = own.map(|(cert, key)| (cert.to_owned(), key.to_owned()));
        let ca = ca.map(Path::to_owned);
        let make = move || Client::read(ca.as_deref(), own.as_ref().map(|(cert, key)| (&**cert, &**key)));
        Ok(Self(Arc::new(Renewed::new(files, make)?)))
    }

    /// The configuration for the gRPC client, and a number that changes when the files have changed.
    pub fn config(&self) -> (ClientTlsConfig, u64) {
        let (client, generation) = self.0.current();
        (client.tonic, generation)
    }
}

impl Client {
    fn read(ca: Option<&Path>, own: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        let tonic = ClientTlsConfig::new().timeout(HANDSHAKE);
        let (roots, mut tonic, trusted) = match ca {
            Some(path) => {
                let (roots, pem) = authorities("--tls-ca", path)?;
                (roots, tonic.ca_certificate(Certificate::from_pem(pem)), "an authority in --tls-ca")
            }
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    return Err(TlsError::NoRoots);
                }
                (roots, tonic.with_native_roots(), "an authority this system trusts")
            }
        };
        let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
        let builder = builder.map_err(setup)?.with_root_certificates(roots);
        let mut rustls = match own {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let own = Own::read(cert, key)?;
                tonic = tonic.identity(own.pem);
                builder.with_client_auth_cert(own.chain, own.key.clone_key()).map_err(setup)?
            }
        };
        rustls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { tonic, rustls: Arc::new(rustls), trusted })
    }

    fn explain(&self, host: &str, error: &rustls::Error) -> TlsProblem {
        use rustls::Error;
        match error {
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => TlsProblem::Issuer(self.trusted),
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => TlsProblem::Name(host.to_owned()),
            Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                TlsProblem::Expired
            }
            Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
                TlsProblem::Early
            }
            Error::AlertReceived(AlertDescription::CertificateRequired) => TlsProblem::Anonymous,
            Error::AlertReceived(
                alert @ (AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::DecryptError
                | AlertDescription::UnsupportedCertificate),
            ) => TlsProblem::Unwelcome(format!("{alert:?}")),
            other => TlsProblem::Other(other.to_string()),
        }
    }
}

/// The first bytes of an HTTP/2 client, including settings.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A server's reaction to a greeting over TLS.
enum Heard {
    /// No response, as if there were no server.
    Nothing,
    /// Not TLS.
    Plaintext,
    /// TLS, with or without an error.
    Tls(Option<rustls::Error>),
}

/// Finds out what is wrong between a client and a port that does not answer its calls. The client uses `tls`, or no TLS. `None`
/// if TLS is not the cause.
pub async fn diagnose(host: &str, port: u16, tls: Option<&ClientTls>) -> Option<TlsProblem> {
    let client = tls.map(|tls| tls.0.current().0);
    let config = match &client {
        Some(client) => Arc::clone(&client.rustls),
        // The certificate does not matter: the question is only whether it speaks TLS.
        None => Arc::new(
            ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .ok()?
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth(),
        ),
    };
    let heard = tokio::time::timeout(HANDSHAKE, greet(host, port, config)).await.unwrap_or(Heard::Nothing);
    match (&client, heard) {
        (None, Heard::Tls(_)) => Some(TlsProblem::Encrypted),
        (Some(_), Heard::Plaintext) => Some(TlsProblem::Plaintext),
        (Some(client), Heard::Tls(Some(error))) => Some(client.explain(host, &error)),
        (Some(_), Heard::Nothing) => {
            let plain = tokio::time::timeout(Duration::from_secs(2), speaks_plainly(host, port)).await;
            plain.is_ok_and(|plain| plain).then_some(TlsProblem::Plaintext)
        }
        _ => None,
    }
}

async fn greet(host: &str, port: u16, config: Arc<ClientConfig>) -> Heard {
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let connecting = TcpStream::connect((name.clone(), port)).await;
    let (Ok(name), Ok(stream)) = (ServerName::try_from(name), connecting) else { return Heard::Nothing };
    let outcome = async {
        let mut stream = TlsConnector::from(config).connect(name, stream).await?;
        // With TLS 1.3, a server that requires a client certificate reports it only now.
        answer(&mut stream).await
    };
    match outcome.await {
        Ok(_) => Heard::Tls(None),
        Err(error) => match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            None => Heard::Nothing,
            Some(rustls::Error::InvalidMessage(_)) => Heard::Plaintext,
            Some(error) => Heard::Tls(Some(error.clone())),
        },
    }
}

/// The first bytes of a server's response to a greeting.
async fn answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> std::io::Result<[u8; 9]> {
    let mut bytes = [0; 9];
    // A server that has hung up may have sent the reason before.
    let written = stream.write_all(GREETING).await;
    let flushed = stream.flush().await;
    stream.read_exact(&mut bytes).await?;
    written.and(flushed).map(|()| bytes)
}

/// Whether a port answers HTTP/2 without TLS: it sends settings, which are frames of type 4.
async fn speaks_plainly(host: &str, port: u16) -> bool {
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let Ok(mut stream) = TcpStream::connect((name, port)).await else { return false };
    answer(&mut stream).await.is_ok_and(|frame| frame[3] == 4)
}
