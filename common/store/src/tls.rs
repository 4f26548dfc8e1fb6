//! Encryption of connections to stores and other web servers.

/// Makes ring the default cryptography for all TLS connections of this process. Call it before building a client; calling it
/// again is harmless.
pub fn use_ring() {
    // The call fails if a default is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
