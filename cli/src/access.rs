//! Who may talk to whom: the token, and TLS.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use elbo_net::{ClientTls, ServerTls};

use crate::failure::usage;

/// The shared secret of a coordinator and its workers. It is never an argument: those are seen by all of a machine.
#[derive(Clone, Debug, Args)]
struct TokenArgs {
    /// File with the token workers must bring (or set ELBO_TOKEN)
    #[arg(long, env = "ELBO_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The certificate of one end.
#[derive(Clone, Debug, Args)]
struct CertArgs {
    /// Certificate to show, PEM, with those between it and its authority
    #[arg(long, env = "ELBO_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of --tls-cert, PEM
    #[arg(long, env = "ELBO_TLS_KEY", value_name = "FILE", requires = "tls_cert", hide_env_values = true)]
    tls_key: Option<PathBuf>,
}

/// What a coordinator asks of those who call.
#[derive(Clone, Debug, Args)]
pub(crate) struct GateArgs {
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    cert: CertArgs,
    /// Serve only workers that show a certificate of this authority (mutual TLS), PEM
    #[arg(long, env = "ELBO_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
}

/// What a worker, or who asks for the status, brings.
#[derive(Clone, Debug, Args)]
pub(crate) struct CallerArgs {
    #[command(flatten)]
    token: TokenArgs,
    /// Authority that has signed the certificate of an https:// coordinator, PEM [default: those this system trusts]
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
                "the token holds blanks or characters that can't be sent: use one line of printable ASCII, as of `openssl rand -hex 32`",
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

/// Warns of a secret that others than its owner can read. That is no error: who mounts secrets can't always choose.
fn warn_of_readers(what: &str, path: &Path) {
    if let Some(mode) = readable_by_others(path) {
        tracing::warn!(
            "the {what} in {path} can be read by other users of this machine (mode {mode:04o}): run chmod 600 {path}",
            path = path.display()
        );
    }
}

/// The mode of a file that others can read.
#[cfg(unix)]
fn readable_by_others(path: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    // A file of somebody else, as in a volume of Kubernetes with an fsGroup, is given to this process by way of its group.
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
    /// The token callers must bring.
    pub(crate) fn token(&self) -> anyhow::Result<Option<String>> {
        self.token.read()
    }

    /// How TLS is served, if it is.
    pub(crate) fn tls(&self) -> anyhow::Result<Option<ServerTls>> {
        let pair = self.cert.pair();
        Ok(pair.map(|(cert, key)| ServerTls::read(cert, key, self.tls_client_ca.as_deref())).transpose()?)
    }
}

impl CallerArgs {
    /// The token to bring.
    pub(crate) fn token(&self) -> anyhow::Result<Option<String>> {
        self.token.read()
    }

    /// How TLS is spoken with the coordinator at `url`; `None` where it is not.
    pub(crate) fn tls(&self, url: &str) -> anyhow::Result<Option<ClientTls>> {
        let own = self.cert.pair();
        if url.starts_with("https://") {
            return Ok(Some(ClientTls::read(self.tls_ca.as_deref(), own)?));
        }
        // Who gives a certificate or an authority counts on being protected.
        if self.tls_ca.is_some() || own.is_some() {
            return Err(usage(format!("--tls-* flags need TLS, which {url} does not ask for: use https://")));
        }
        Ok(None)
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_secret_that_others_can_read_is_told() {
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
