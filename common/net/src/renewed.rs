//! What is made of files, and made again when they change: certificates end sooner than jobs, and whoever renews them
//! replaces their files.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::rate_limited_log::RateLimitedLog;
use crate::tls_error::TlsError;

/// What tells that a file is another than before: time, length, and the file itself, since Kubernetes exchanges a link.
type Stamp = Option<(Option<SystemTime>, u64, u64)>;

/// Makes it of the files.
type Make<T> = Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>;

/// Something made of files.
pub(crate) struct Renewed<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    state: Mutex<State<T>>,
    told: RateLimitedLog,
}

struct State<T> {
    current: T,
    stamps: Vec<Stamp>,
    /// How often it was made again.
    generation: u64,
}

impl<T: Clone> Renewed<T> {
    /// Makes it the first time.
    pub(crate) fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // The stamps come first: a file that changes while it is read has another one the next time.
        let stamps = files.iter().map(stamp).collect();
        let current = make()?;
        let state = Mutex::new(State { current, stamps, generation: 0 });
        Ok(Self { files, make: Box::new(make), state, told: RateLimitedLog::default() })
    }

    /// What the files make now, and how often that has changed. Files that can't be used, as while they are being written,
    /// leave what was made before.
    pub(crate) fn current(&self) -> (T, u64) {
        let stamps: Vec<Stamp> = self.files.iter().map(stamp).collect();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if stamps != state.stamps {
            match (self.make)() {
                Ok(made) => {
                    state.current = made;
                    state.stamps = stamps;
                    state.generation += 1;
                    tracing::info!("the TLS files have changed: new connections use the new ones");
                }
                Err(error) if self.told.is_due() => {
                    tracing::warn!(%error, "the TLS files have changed and can't be used: the old ones stay in use");
                }
                Err(_) => {}
            }
        }
        (state.current.clone(), state.generation)
    }
}

fn stamp(path: &PathBuf) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let number = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let number = 0;
    Some((metadata.modified().ok(), metadata.len(), number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_again_when_they_change_and_what_was_good_stays_until_they_are_good_again() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (directory.path().join("cert"), directory.path().join("key"));
        let write = |path: &PathBuf, text: &str| {
            let new = path.with_extension("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, path).unwrap();
        };
        write(&cert, "1");
        write(&key, "1");
        let (c, k) = (cert.clone(), key.clone());
        let make = move || {
            let (cert, key) = (std::fs::read_to_string(&c).unwrap_or_default(), std::fs::read_to_string(&k).unwrap());
            if cert == key { Ok(cert) } else { Err(TlsError::Mismatch { cert: c.clone(), key: k.clone() }) }
        };
        let renewed = Renewed::new(vec![cert.clone(), key.clone()], make).unwrap();
        assert_eq!(renewed.current(), ("1".into(), 0));
        write(&cert, "2");
        assert_eq!(renewed.current(), ("1".into(), 0));
        write(&key, "2");
        assert_eq!(renewed.current(), ("2".into(), 1));
        assert_eq!(renewed.current(), ("2".into(), 1));
        std::fs::remove_file(&cert).unwrap();
        assert_eq!(renewed.current(), ("2".into(), 1));
        write(&cert, "2");
        assert_eq!(renewed.current().0, "2");
    }
}
