//! Opening a location, local or on object storage, as a store rooted there.
//!
//! A [`Location`] is opened as a [`Store`] with the settings in [`credentials`]. What passes by itself is waited for
//! ([`retry`]); whether a store can hold a job's ledger is found out before a job starts ([`preflight`]).

mod credentials;
mod error;
mod listing;
mod location;
mod open;
pub mod preflight;
mod redact;
pub mod retry;

use std::path::Path as FsPath;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};

pub use error::{StoreError, describe, refusal};
pub use location::Location;
pub use redact::redact;

/// A store whose paths are relative to one directory or URL prefix.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    location: Location,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the client, which knows credentials.
        write!(f, "Store({})", self.location)
    }
}

impl Store {
    /// Opens an existing location for reading.
    pub fn open(location: &Location) -> Result<Self, StoreError> {
        let inner: Arc<dyn ObjectStore> = match location {
            Location::Local(path) => {
                // object_store accepts a missing root and fails only at the first access.
                std::fs::read_dir(path).map_err(|source| StoreError::Directory {
                    action: "opening",
                    path: path.clone(),
                    source,
                })?;
                Arc::new(local(path)?)
            }
            Location::Remote(url) => open::open(url)?,
        };
        Ok(Self { inner, location: location.clone() })
    }

    /// Opens a location for writing, making a local directory where there is none.
    pub fn create(location: &Location) -> Result<Self, StoreError> {
        if let Location::Local(path) = location {
            std::fs::create_dir_all(path).map_err(|source| StoreError::Directory {
                action: "creating",
                path: path.clone(),
                source,
            })?;
        }
        Self::open(location)
    }

    /// A store over any [`ObjectStore`], for tests that inject faults.
    pub fn from_parts(inner: Arc<dyn ObjectStore>, location: Location) -> Self {
        Self { inner, location }
    }

    /// The store itself, rooted at the location.
    pub fn inner(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner)
    }

    /// Where it is rooted.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// A whole object; `None` where there is none.
    pub async fn read(&self, path: &Path) -> Result<Option<Bytes>, StoreError> {
        let object = self.location.below(path.as_ref());
        let read = retry::run("reading", &object, || async {
            let found = self.inner.get(path).await?;
            let wanted = found.range.end - found.range.start;
            let bytes = found.bytes().await?;
            if bytes.len() as u64 == wanted { Ok(bytes) } else { Err(broken_off(bytes.len() as u64, wanted)) }
        });
        match read.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(StoreError::Object { source, .. }) if is_missing_object(&source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a whole object by one atomic put. The content must be a pure function of the path: a put whose reply is lost is
    /// repeated.
    pub async fn write(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let put = || async { self.inner.put(path, bytes.clone().into()).await };
        retry::run("writing", &self.location.below(path.as_ref()), put).await.map(drop)
    }

    /// The paths of all objects below a prefix, sorted.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Path>, StoreError> {
        let at = Path::from(prefix);
        let list = || self.inner.list(Some(&at)).map_ok(|meta: ObjectMeta| meta.location).try_collect::<Vec<_>>();
        let mut paths = retry::run("listing", &self.location.below(prefix), list).await?;
        paths.sort();
        Ok(paths)
    }

    /// Deletes an object, if it is there.
    pub async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        let delete = || async { self.inner.delete(path).await };
        match retry::run("deleting", &self.location.below(path.as_ref()), delete).await {
            Err(StoreError::Object { source, .. }) if is_missing_object(&source) => Ok(()),
            ended => ended,
        }
    }

    /// Deletes all objects below a prefix.
    pub async fn delete_all(&self, prefix: &str) -> Result<(), StoreError> {
        let paths = futures::stream::iter(self.list(prefix).await?);
        // Each is a round trip to the store, and an old ledger has hundreds.
        paths.map(|path| async move { self.delete(&path).await }).buffer_unordered(16).try_collect().await
    }
}

fn local(path: &FsPath) -> Result<LocalFileSystem, StoreError> {
    LocalFileSystem::new_with_prefix(path)
        .map_err(|e| StoreError::Location { location: path.display().to_string(), reason: e.to_string() })
}

/// Whether there is a bucket, but no such object in it.
fn is_missing_object(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotFound { .. }) && !error::is_bucket_missing(error)
}

/// A body shorter than announced; another attempt may bring it whole.
fn broken_off(got: u64, wanted: u64) -> object_store::Error {
    let text = format!("the answer broke off after {got} of {wanted} bytes");
    let source = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, text);
    object_store::Error::Generic { store: "object store", source: source.into() }
}
