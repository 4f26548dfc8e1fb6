//! Why TLS can't be had from files.

use std::path::PathBuf;

/// Files TLS can't be had from.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("reading {}: {source}; give {flag} a PEM file this user may read", path.display())]
    Read {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file holds no certificate.
    #[error("{} holds no usable certificate ({reason}): {flag} takes a PEM file with -----BEGIN CERTIFICATE-----", path.display())]
    Certificate {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file holds no key.
    #[error("{} holds no usable private key ({reason}): --tls-key takes an unencrypted PEM file with -----BEGIN PRIVATE KEY-----", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
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
    /// The system has no roots.
    #[error("this system has no root certificates: give the coordinator's with --tls-ca")]
    NoRoots,
    /// The library refused what these checks let through.
    #[error("TLS can't be set up: {0}")]
    Setup(String),
}
