//! A value that is built from files, and rebuilt when they change. Certificates expire before jobs end, and are renewed by
//! replacing their files.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::rate_limited_log::RateLimitedLog;
use crate::tls_error::TlsError;

/// Identifies a version of a file: time, length, and the file itself, since Kubernetes replaces a link.
type Stamp = Option<(Option<SystemTime>, u64, u64)>;

/// Builds the value from the files.
type Make<T> = Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>;

/// A value built from files.
pub(crate) struct Renewed<T> {
    files: Vec<PathBuf>,
    make: Make<T>,
    state: Mutex<State<T>>,
    told: RateLimitedLog,
}

struct State<T> {
    current: T,
    stamps: Vec<Stamp>,
    /// How often the value was rebuilt.
    generation: u64,
}

impl<T: Clone> Renewed<T> {
    /// Builds the value for the first time.
    pub(crate) fn new(
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // The stamps are taken first, so that a file that changes while it is read is noticed next time.
        let stamps = files.iter().map(stamp).collect();
        let current = make()?;
        let state = Mutex::new(State { current, stamps, generation: 0 });
        Ok(Self { files, make: Box::new(make), state, told: RateLimitedLog::default() })
    }

    /// The current value, and how often it has changed. If the files are invalid, for example while they are being written, the
    /// previous value stays.
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
    fn files_are_read_again_when_they_change_and_invalid_ones_keep_the_previous_value() {
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
