//! Whose fault it is that an image can't be read: the image's, or this worker's, whose mount, credentials or clock may fail.
//!
//! | a read ends with | at fault | what follows |
//! |---|---|---|
//! | a passing error (overload, timeouts, broken connections), after a minute of repetition | the storage | the worker leaves |
//! | credentials that have expired or are none, a proxy's refusal, a wrong clock, EIO, ESTALE, ENOTCONN, ... | this worker's access | the worker leaves |
//! | a file that has changed since it was listed, is too large, or has no image where it should | the image, at once | `read` |
//! | bytes that can't be decoded (not told here) | the image, at once | `decode` |
//! | anything else: no such file or key, a page in its place, not permitted, ... | not known | other images are tried |
//!
//! Of what is not known only others can tell: an image is reported, as `unread`, once another image was read *after* it could not
//! be; the one that was read last, or else one of those the coordinator names, which lie all over the dataset. Where none of them
//! can be read, the mount is missing, the credentials are refused, or the whole dataset is gone: the worker leaves. That one read
//! for every failed one tells a single missing image from missing access, whatever comes first, and a corpus in which many
//! images are missing still ends. The coordinator gives up what is `unread` after a second look.
//!
//! A worker that leaves gives its leases back and blames nothing. The engines of a process share what they have read, as they
//! share mounts and credentials.

use std::error::Error;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use elbo_core::sample::Part;
use elbo_data::{Image, ReadError, Reader};
use elbo_store::{Location, StoreError, redact, refusal};

use crate::error::BlockError;

/// Who is at fault when an image can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The storage, for the moment.
    Storage,
    /// This worker, or what it sees of the storage.
    Access,
    /// The image.
    Image,
    /// That has to be found out.
    Unknown,
}

/// Errors of a disk or a network file system, whatever file is asked for: EIO, ENXIO, ENODEV, too many open files in the system
/// or in this process, servers that are gone (ENOLINK, ESHUTDOWN, EHOSTDOWN, EREMOTEIO), ENOMEDIUM, and keys that a file system
/// wants and does not get.
const OF_FILE_SYSTEMS: [i32; 14] = [5, 6, 19, 23, 24, 67, 108, 112, 121, 123, 126, 127, 128, 129];

impl Fault {
    fn of(error: &ReadError) -> Self {
        if error.is_transient() {
            return Self::Storage;
        }
        let ReadError::Store(error) = error else { return Self::Image };
        match error {
            StoreError::Object { source, .. } if refusal(source).is_some() || is_of_file_system(source) => Self::Access,
            StoreError::Settings { .. } | StoreError::Directory { .. } => Self::Access,
            StoreError::Object { .. } | StoreError::Location { .. } => Self::Unknown,
        }
    }
}

/// Whether the file system failed, rather than that there is no such file or it may not be read.
fn is_of_file_system(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            let of_network = matches!(
                io.kind(),
                ErrorKind::StaleNetworkFileHandle
                    | ErrorKind::NotConnected
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::ConnectionRefused
                    | ErrorKind::ConnectionReset
                    | ErrorKind::HostUnreachable
                    | ErrorKind::NetworkUnreachable
                    | ErrorKind::NetworkDown
                    | ErrorKind::OutOfMemory
            );
            return of_network || io.raw_os_error().is_some_and(|code| OF_FILE_SYSTEMS.contains(&code));
        }
        cause = error.source();
    }
    false
}

/// An image that was not read.
#[derive(Debug)]
pub(crate) struct Unread {
    /// Where it failed: `read`, or `unread` where others may be able to read it.
    pub(crate) stage: &'static str,
    /// Why.
    pub(crate) error: ReadError,
}

/// What the engines of a process have read.
#[derive(Debug, Default)]
pub struct Seen {
    /// The image that was read last, and when that began.
    last: Mutex<Option<(Instant, Image)>>,
    /// Held while it is found out whether others can be read.
    trial: tokio::sync::Mutex<()>,
}

impl Seen {
    fn last(&self) -> MutexGuard<'_, Option<(Instant, Image)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, began: Instant, image: &Image) {
        let mut last = self.last();
        if last.as_ref().is_none_or(|(before, _)| *before < began) {
            *last = Some((began, image.clone()));
        }
    }

    fn has_read_since(&self, moment: Instant) -> bool {
        self.last().as_ref().is_some_and(|(began, _)| *began >= moment)
    }
}

/// A worker's access to the images of a job.
#[derive(Debug)]
pub struct Access {
    source: String,
    witnesses: Vec<Image>,
    seen: Arc<Seen>,
}

impl Access {
    /// Access to the images of `source` in a process that has `seen` some, where the coordinator names `witnesses`.
    pub fn new(source: String, witnesses: Vec<Image>, seen: Arc<Seen>) -> Self {
        Self { source, witnesses, seen }
    }

    /// Reads an image, or says what can be blamed on it; an error where the worker can read none.
    pub(crate) async fn read(&self, reader: &Reader, image: &Image) -> Result<Result<Bytes, Unread>, BlockError> {
        let began = Instant::now();
        let error = match reader.read(image).await {
            Ok(bytes) => {
                if !is_kept(image) {
                    self.seen.note(began, image);
                }
                return Ok(Ok(bytes));
            }
            Err(error) => error,
        };
        let failed = Instant::now();
        match Fault::of(&error) {
            Fault::Storage => Err(BlockError::Storage(error)),
            Fault::Access => Err(self.lost(error.to_string())),
            Fault::Image => Ok(Err(Unread { stage: "read", error })),
            Fault::Unknown if self.can_read_another(reader, image, failed).await => {
                Ok(Err(Unread { stage: "unread", error }))
            }
            Fault::Unknown => {
                let others = match self.witnesses.len() {
                    0 | 1 => "there is no other image to try".to_owned(),
                    count => format!("none of {count} images from all over the dataset can be read either"),
                };
                Err(self.lost(format!("{error}; {others}{}", self.look_at_source().await)))
            }
        }
    }

    /// Whether another image can be read now, after this one could not be.
    async fn can_read_another(&self, reader: &Reader, image: &Image, failed: Instant) -> bool {
        let _mine = self.seen.trial.lock().await;
        if self.seen.has_read_since(failed) {
            return true;
        }
        let last = self.seen.last().clone().map(|(_, last)| last);
        for other in last.iter().chain(&self.witnesses).filter(|other| *other != image) {
            let began = Instant::now();
            let read = if is_kept(other) { Reader::new().read(other).await } else { reader.read(other).await };
            match read {
                // What has changed was found. Of what is too large that may be said without a look.
                Ok(_) | Err(ReadError::Changed { .. } | ReadError::Cell { .. }) => {
                    self.seen.note(began, other);
                    return true;
                }
                Err(error) => tracing::debug!(%error, "another image can't be read either"),
            }
        }
        false
    }

    /// What this worker says as it leaves.
    fn lost(&self, problem: String) -> BlockError {
        let images = redact(&self.source);
        tracing::error!(images, "the images can't be read here, and no image is blamed for it: {problem}");
        BlockError::Access { images, problem }
    }

    /// What is wrong with the directory of the images, where that can be seen.
    async fn look_at_source(&self) -> String {
        let source = self.source.clone();
        let looking = tokio::task::spawn_blocking(move || look_at(&directory_of(&source)?));
        looking.await.ok().flatten().map_or_else(String::new, |finding| format!(": {finding}"))
    }
}

/// Whether readers keep an image in memory with those beside it: that they have it says nothing of the storage.
fn is_kept(image: &Image) -> bool {
    matches!(image.part, Some(Part::Cell { .. }))
}

/// The local directory a source names, or in which what it names lies.
fn directory_of(source: &str) -> Option<PathBuf> {
    let Ok(Location::Local(path)) = Location::parse(source) else { return None };
    if path.exists() {
        return if path.is_dir() { Some(path) } else { path.parent().map(Path::to_owned) };
    }
    // What comes before wildcards.
    let text = path.to_string_lossy().into_owned();
    match text.find(['{', '*', '[', '?']) {
        Some(first) => text[..first].rfind('/').map(|slash| PathBuf::from(&text[..=slash])),
        None => Some(path),
    }
}

fn look_at(directory: &Path) -> Option<String> {
    let shown = directory.display();
    match std::fs::read_dir(directory).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Some(format!("the directory {shown} is empty here, as where a mount is missing")),
        Ok(false) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some(format!("there is no {shown} here")),
        Err(error) => Some(format!("{shown} can't be opened here ({error})")),
    }
}

#[cfg(test)]
mod tests;
