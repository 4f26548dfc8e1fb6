//! Errors in reading TLS files.

use std::path::PathBuf;

/// A TLS file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("reading {}: {source}; give {flag} a PEM file this user may read", path.display())]
    Read {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A file holds no certificate.
    #[error("{} holds no usable certificate ({reason}): {flag} takes a PEM file with -----BEGIN CERTIFICATE-----", path.display())]
    Certificate {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A file holds no key.
    #[error("{} holds no usable private key ({reason}): --tls-key takes an unencrypted PEM file with -----BEGIN PRIVATE KEY-----", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Certificate and key do not belong together.
    #[error("the key in {} is not that of the certificate in {}: give the pair that was made together", key.display(), cert.display())]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The system has no root certificates.
    #[error("this system has no root certificates: give the coordinator's with --tls-ca")]
    NoRoots,
    /// The TLS library refused files that passed these checks.
    #[error("TLS can't be set up: {0}")]
    Setup(String),
}
