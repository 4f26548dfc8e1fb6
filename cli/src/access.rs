//! Access control: the token and TLS.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use elbo_net::{ClientTls, ServerTls};

use crate::failure::usage;

/// The shared secret of a coordinator and its workers. It is never a command-line argument, since every user of a machine can
/// see those.
#[derive(Clone, Debug, Args)]
struct TokenArgs {
    /// File with the token that workers must send (or set ELBO_TOKEN)
    #[arg(long, env = "ELBO_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The certificate of this process.
#[derive(Clone, Debug, Args)]
struct CertArgs {
    /// PEM file with this process's certificate, followed by any intermediate certificates
    #[arg(long, env = "ELBO_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM file with the key of --tls-cert
    #[arg(long, env = "ELBO_TLS_KEY", value_name = "FILE", requires = "tls_cert", hide_env_values = true)]
    tls_key: Option<PathBuf>,
}

/// What a coordinator requires of its callers.
#[derive(Clone, Debug, Args)]
pub(crate) struct GateArgs {
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    cert: CertArgs,
    /// PEM file with a certificate authority; serve only workers with a certificate it signed (mutual TLS)
    #[arg(long, env = "ELBO_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
}

/// Credentials of a worker or a status request.
#[derive(Clone, Debug, Args)]
pub(crate) struct CallerArgs {
    #[command(flatten)]
    token: TokenArgs,
    /// PEM file with the certificate authority of an https:// coordinator [default: the authorities this system trusts]
    #[arg(long, env = "ELBO_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    #[command(flatten)]
    cert: CertArgs,
}

impl TokenArgs {
    /// The content of the token file, or of ELBO_TOKEN.
    fn read(&self) -> anyhow::Result<Option<String>> {
        let token = match &self.token_file {
            Some(path) => {
                warn_of_readers("token", path);
                Some(elbo_store::files::read_given_to_string(path).with_context(|| {
                    format!("reading the token file {}: give a text file this user may read", path.display())
                })?)
            }
            None => match std::env::var("ELBO_TOKEN") {
                Ok(token) => Some(token),
                Err(std::env::VarError::NotPresent) => None,
                Err(std::env::VarError::NotUnicode(_)) => {
                    return Err(usage("ELBO_TOKEN is not text: use printable ASCII characters"));
                }
            },
        };
        let Some(token) = token.map(|token| token.trim().to_owned()) else { return Ok(None) };
        if token.is_empty() {
            return Err(usage("the token is empty: write a secret into the token file, or unset ELBO_TOKEN"));
        }
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(usage(
                "the token has spaces or characters that can't be sent: use one line of printable ASCII, like the \
                 output of `openssl rand -hex 32`",
            ));
        }
        Ok(Some(token))
    }
}

impl CertArgs {
    /// The certificate and its key.
    fn pair(&self) -> Option<(&Path, &Path)> {
        let pair = self.tls_cert.as_deref().zip(self.tls_key.as_deref());
        if let Some((_, key)) = pair {
            warn_of_readers("key", key);
        }
        pair
    }
}

/// Warns about a secret that other users can read. This is not an error, because mounted secrets don't always allow another
/// mode.
fn warn_of_readers(what: &str, path: &Path) {
    if let Some(mode) = readable_by_others(path) {
        tracing::warn!(
            "the {what} in {path} can be read by other users of this machine (mode {mode:04o}): run chmod 600 {path}",
            path = path.display()
        );
    }
}

/// The mode of a file, if other users can read it.
#[cfg(unix)]
fn readable_by_others(path: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    // If another user owns the file, as in a Kubernetes volume with an fsGroup, this process has access through its group.
    let is_given = std::fs::metadata("/proc/self").is_ok_and(|this| this.uid() != metadata.uid());
    let others = if is_given { 0o004 } else { 0o044 };
    let mode = metadata.mode() & 0o7777;
    (metadata.is_file() && mode & others != 0).then_some(mode)
}

#[cfg(not(unix))]
fn readable_by_others(_: &Path) -> Option<u32> {
    None
}

impl GateArgs {
    /// The token that callers must send.
    pub(crate) fn token(&self) -> anyhow::Result<Option<String>> {
        self.token.read()
    }

    /// The server's TLS settings, if it uses TLS.
    pub(crate) fn tls(&self) -> anyhow::Result<Option<ServerTls>> {
        let pair = self.cert.pair();
        Ok(pair.map(|(cert, key)| ServerTls::read(cert, key, self.tls_client_ca.as_deref())).transpose()?)
    }
}

impl CallerArgs {
    /// The token to send.
    pub(crate) fn token(&self) -> anyhow::Result<Option<String>> {
        self.token.read()
    }

    /// The client's TLS settings for the coordinator at `url`; `None` without TLS.
    pub(crate) fn tls(&self, url: &str) -> anyhow::Result<Option<ClientTls>> {
        let own = self.cert.pair();
        if url.starts_with("https://") {
            return Ok(Some(ClientTls::read(self.tls_ca.as_deref(), own)?));
        }
        // A user who gives a certificate or an authority expects TLS.
        if self.tls_ca.is_some() || own.is_some() {
            return Err(usage(format!("--tls-* flags need TLS, but {url} does not use it: use https://")));
        }
        Ok(None)
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_that_other_users_can_read_are_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mode = |mode| {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            readable_by_others(file.path())
        };
        assert_eq!((mode(0o600), mode(0o400), mode(0o620)), (None, None, None));
        assert_eq!((mode(0o644), mode(0o640), mode(0o604)), (Some(0o644), Some(0o640), Some(0o604)));
        assert_eq!(readable_by_others(Path::new("/none")), None);
    }
}
