//! Decides what is at fault when an image can't be read: the image, or this worker, whose mount, credentials or clock may
//! fail.
//!
//! | a read ends with | at fault | result |
//! |---|---|---|
//! | a passing error (overload, timeouts, broken connections) that repeats for a minute | the storage | the worker leaves |
//! | expired or invalid credentials, a proxy's refusal, a wrong clock, EIO, ESTALE, ENOTCONN, ... | this worker's access | the worker leaves |
//! | a file that has changed since it was listed, is too large, or has no image where it should | the image, at once | `read` |
//! | bytes that can't be decoded (not handled here) | the image, at once | `decode` |
//! | anything else: no such file or key, a page in its place, not permitted, ... | unknown | other images are tried |
//!
//! If the fault is unknown, other images decide. The image is reported as `unread` once another image was read *after* the
//! failure: the one that was read last, or one of those the coordinator names, which are from all over the dataset. If none
//! of them can be read, the mount is missing, the credentials are refused, or the whole dataset is gone: the worker leaves.
//! Reading one other image per failure tells a single missing image from missing access, whichever comes first, and a
//! corpus with many missing images still ends. The coordinator quarantines `unread` images after a second try.
//!
//! A worker that leaves gives its leases back, and no image is quarantined. The engines of a process share what they have
//! read, as they share mounts and credentials.

use std::error::Error;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use elbo_core::causes::find_cause;
use elbo_core::failure::FailureStage;
use elbo_core::sample::Part;
use elbo_data::{Image, ReadError, Reader};
use elbo_store::{Location, StoreError, redact, refusal};

use crate::error::BlockError;

/// What is at fault when an image can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtFault {
    /// The storage, for the moment.
    Storage,
    /// This worker, or its view of the storage.
    Access,
    /// The image.
    Image,
    /// Not known yet.
    Unknown,
}

/// Errors of a disk or a network file system that do not depend on the file: EIO, ENXIO, ENODEV, too many open files in the
/// system or in this process, servers that are gone (ENOLINK, ESHUTDOWN, EHOSTDOWN, EREMOTEIO), ENOMEDIUM, and keys that a
/// file system needs but does not get.
const OF_FILE_SYSTEMS: [i32; 14] = [5, 6, 19, 23, 24, 67, 108, 112, 121, 123, 126, 127, 128, 129];

impl AtFault {
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

/// Whether the file system failed, and not only that the file is missing or may not be read.
fn is_of_file_system(error: &(dyn Error + 'static)) -> bool {
    let Some(io) = find_cause::<std::io::Error>(error) else { return false };
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
    of_network || io.raw_os_error().is_some_and(|code| OF_FILE_SYSTEMS.contains(&code))
}

/// An image that was not read.
#[derive(Debug)]
pub(crate) enum Unread {
    /// The image is at fault.
    Image {
        /// The stage, which says whether other workers may be able to read it.
        stage: FailureStage,
        /// The cause.
        error: ReadError,
    },
    /// The worker can't read any image.
    Access(BlockError),
}

/// The last image that the engines of a process have read.
#[derive(Debug, Default)]
pub struct ReadHistory {
    /// The image that was read last, and when that read began.
    last: Mutex<Option<(Instant, Image)>>,
    /// Held while other images are tried.
    trial: tokio::sync::Mutex<()>,
}

impl ReadHistory {
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
    seen: Arc<ReadHistory>,
}

impl Access {
    /// Access to the images of `source`. `seen` is shared by the process; the coordinator names the `witnesses`.
    pub fn new(source: String, witnesses: Vec<Image>, seen: Arc<ReadHistory>) -> Self {
        Self { source, witnesses, seen }
    }

    /// Reads an image, or decides what is at fault if it can't be read.
    pub(crate) async fn read(&self, reader: &Reader, image: &Image) -> Result<Bytes, Unread> {
        let began = Instant::now();
        let error = match reader.read(image).await {
            Ok(bytes) => {
                if !is_kept(image) {
                    self.seen.note(began, image);
                }
                return Ok(bytes);
            }
            Err(error) => error,
        };
        let failed = Instant::now();
        Err(match AtFault::of(&error) {
            AtFault::Storage => Unread::Access(BlockError::Storage(error)),
            AtFault::Access => Unread::Access(self.lost(error.to_string())),
            AtFault::Image => Unread::Image { stage: FailureStage::Read, error },
            AtFault::Unknown if self.can_read_another(reader, image, failed).await => {
                Unread::Image { stage: FailureStage::Unread, error }
            }
            AtFault::Unknown => {
                let others = match self.witnesses.len() {
                    0 | 1 => "there is no other image to try".to_owned(),
                    count => format!("none of {count} images from all over the dataset can be read either"),
                };
                Unread::Access(self.lost(format!("{error}; {others}{}", self.look_at_source().await)))
            }
        })
    }

    /// Whether another image can be read now, after this one failed.
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
                // A changed file was found. A file that is too large proves nothing, since that may be known without a
                // read.
                Ok(_) | Err(ReadError::Changed { .. } | ReadError::Cell { .. }) => {
                    self.seen.note(began, other);
                    return true;
                }
                Err(error) => tracing::debug!(%error, "another image can't be read either"),
            }
        }
        false
    }

    /// The error with which this worker leaves.
    fn lost(&self, problem: String) -> BlockError {
        let images = redact(&self.source);
        tracing::error!(images, "the images can't be read here, and no image is blamed for it: {problem}");
        BlockError::Access { images, problem }
    }

    /// The problem with the directory of the images, if one can be seen.
    async fn look_at_source(&self) -> String {
        let source = self.source.clone();
        let looking = tokio::task::spawn_blocking(move || look_at(&directory_of(&source)?));
        looking.await.ok().flatten().map_or_else(String::new, |finding| format!(": {finding}"))
    }
}

/// Whether readers keep an image in memory together with its neighbours: then a read says nothing about the storage.
fn is_kept(image: &Image) -> bool {
    matches!(image.part, Some(Part::Cell { .. }))
}

/// The local directory that a source names, or that contains what it names.
fn directory_of(source: &str) -> Option<PathBuf> {
    let Ok(Location::Local(path)) = Location::parse(source) else { return None };
    if path.exists() {
        return if path.is_dir() { Some(path) } else { path.parent().map(Path::to_owned) };
    }
    // The part before wildcards.
    let text = path.to_string_lossy().into_owned();
    match text.find(['{', '*', '[', '?']) {
        Some(first) => text[..first].rfind('/').map(|slash| PathBuf::from(&text[..=slash])),
        None => Some(path),
    }
}

fn look_at(directory: &Path) -> Option<String> {
    let shown = directory.display();
    match std::fs::read_dir(directory).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Some(format!("the directory {shown} is empty here, as if a mount were missing")),
        Ok(false) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some(format!("there is no {shown} here")),
        Err(error) => Some(format!("{shown} can't be opened here ({error})")),
    }
}

#[cfg(test)]
mod tests;
