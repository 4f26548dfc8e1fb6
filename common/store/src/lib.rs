//! Opens a location, local or on object storage, as a store rooted there.
//!
//! A [`Location`] is opened as a [`Store`] with the settings in [`credentials`]. Transient failures are retried ([`retry`]).
//! Before a job starts, [`preflight`] checks that the store can hold the job's ledger.

pub mod checksum;
#[cfg(test)]
mod contract_tests;
mod credentials;
mod error;
pub mod files;
mod keys;
mod listing;
mod local;
mod location;
mod open;
pub mod pace;
pub mod parquet_file;
pub mod preflight;
mod profile_keys;
mod redact;
mod redirect;
pub mod retry;
pub mod table;
pub mod tls;
mod transient;
mod web;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, UpdateVersion};
use tokio::sync::watch;

pub use error::{StoreError, describe, refusal};
pub use keys::SkippedKeys;
pub use local::DiskFault;
pub use location::{Location, absolute, is_url};
pub use redact::redact;

use keys::Skipped;
use local::Directory;

/// A store whose paths are relative to one directory or URL prefix.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    location: Location,
    fault: watch::Receiver<Option<DiskFault>>,
    skipped: Arc<Skipped>,
}

/// The observed state of an object, for a put that must not overwrite anything newer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectVersion {
    /// The object did not exist.
    Nothing,
    /// The object had this version.
    Version(UpdateVersion),
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client is left out, since it holds credentials.
        write!(f, "Store({})", self.location)
    }
}

impl Store {
    /// Opens an existing location for reading.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
    /// # let directory = tempfile::tempdir()?;
    /// # let url = directory.path().to_string_lossy();
    /// use elbo_store::{Location, Store};
    /// use object_store::path::Path;
    ///
    /// // Or a URL, such as s3://bucket/labels.
    /// let store = Store::open(&Location::parse(&url)?)?;
    /// store.write(&Path::from("job.json"), "{}".into()).await?;
    /// assert_eq!(store.read(&Path::from("job.json")).await?.as_deref(), Some(&b"{}"[..]));
    /// # Ok::<_, Box<dyn std::error::Error>>(()) })?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(location: &Location) -> Result<Self, StoreError> {
        match location {
            Location::Local(path) => {
                // object_store accepts a missing root and fails only on first access.
                std::fs::read_dir(path).map_err(|source| StoreError::Directory {
                    action: "opening",
                    path: path.clone(),
                    source,
                })?;
                let directory = Directory::open(path).map_err(|e| StoreError::Location {
                    location: path.display().to_string(),
                    reason: e.to_string(),
                })?;
                let fault = directory.fault();
                Ok(Self { fault, ..Self::from_parts(Arc::new(directory), location.clone()) })
            }
            Location::Remote(url) => {
                let skipped = Arc::<Skipped>::default();
                let inner = open::open(url, &skipped)?;
                Ok(Self { skipped, ..Self::from_parts(inner, location.clone()) })
            }
        }
    }

    /// Opens a location for writing. Creates a local directory if it does not exist.
    pub fn create(location: &Location) -> Result<Self, StoreError> {
        if let Location::Local(path) = location {
            let failed = |source| StoreError::Directory { action: "creating", path: path.clone(), source };
            local::create(path).map_err(failed)?;
        }
        Self::open(location)
    }

    /// A store on any [`ObjectStore`], for tests that inject faults.
    pub fn from_parts(inner: Arc<dyn ObjectStore>, location: Location) -> Self {
        Self { inner, location, fault: watch::channel(None).1, skipped: Arc::default() }
    }

    /// The reason why nothing can be written any more, if there is one.
    pub fn fault(&self) -> Option<DiskFault> {
        self.fault.borrow().clone()
    }

    /// Waits until nothing can be written any more.
    pub async fn broken(&self) -> DiskFault {
        let mut fault = self.fault.clone();
        match fault.wait_for(Option::is_some).await.ok().and_then(|fault| fault.clone()) {
            Some(fault) => fault,
            // This store does not detect faults.
            None => std::future::pending().await,
        }
    }

    /// The store itself, rooted at the location.
    pub fn inner(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.inner)
    }

    /// The location it is rooted at.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The keys that listings of this store have passed over so far because they are not valid paths. Object storage allows any
    /// text as a key.
    pub fn skipped_keys(&self) -> SkippedKeys {
        self.skipped.so_far()
    }

    /// Reads a whole object; `None` if it does not exist.
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

    /// Writes a whole object with one atomic put. The content must be a pure function of the path, because a put is repeated if
    /// its reply is lost.
    pub async fn write(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        let put = || async { self.inner.put(path, bytes.clone().into()).await };
        retry::run("writing", &self.location.below(path.as_ref()), put).await.map(drop)
    }

    /// The current state of an object, for [`Store::replace`].
    pub async fn look(&self, path: &Path) -> Result<ObjectVersion, StoreError> {
        let head = || self.inner.head(path);
        match retry::run("reading", &self.location.below(path.as_ref()), head).await {
            Ok(meta) => Ok(ObjectVersion::Version(UpdateVersion { e_tag: meta.e_tag, version: meta.version })),
            Err(StoreError::Object { source, .. }) if is_missing_object(&source) => Ok(ObjectVersion::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Writes a whole object with one atomic put, unless the object has changed since it was `seen`; then it returns `false`
    /// and writes nothing. A put is repeated if its reply is lost, so an object that already has the right content counts as
    /// written.
    pub async fn replace(&self, path: &Path, bytes: Bytes, seen: &ObjectVersion) -> Result<bool, StoreError> {
        let mode = match seen {
            ObjectVersion::Nothing => PutMode::Create,
            ObjectVersion::Version(version) => PutMode::Update(version.clone()),
        };
        let put = || async { self.inner.put_opts(path, bytes.clone().into(), mode.clone().into()).await };
        match retry::run("writing", &self.location.below(path.as_ref()), put).await {
            Ok(_) => Ok(true),
            Err(StoreError::Object { source: Error::Precondition { .. } | Error::AlreadyExists { .. }, .. }) => {
                Ok(self.read(path).await?.as_ref() == Some(&bytes))
            }
            Err(StoreError::Object { source, .. }) if is_missing_object(&source) => Ok(false),
            // The preflight accepts stores that don't support conditional updates.
            Err(StoreError::Object { source: Error::NotImplemented { .. } | Error::NotSupported { .. }, .. }) => {
                self.write(path, bytes).await.map(|()| true)
            }
            Err(error) => Err(error),
        }
    }

    /// The paths of all objects below a prefix, sorted.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Path>, StoreError> {
        Ok(self.sizes(prefix).await?.into_keys().collect())
    }

    /// The objects below a prefix, and their sizes in bytes.
    pub async fn sizes(&self, prefix: &str) -> Result<BTreeMap<Path, u64>, StoreError> {
        let at = Path::from(prefix);
        let item = |meta: ObjectMeta| (meta.location, meta.size);
        let list = || self.inner.list(Some(&at)).map_ok(item).try_collect();
        retry::run("listing", &self.location.below(prefix), list).await
    }

    /// Removes files that interrupted writes, for example in a power cut, left in these directories.
    pub fn sweep(&self, directories: &[&str]) {
        if let Some(root) = self.location.local() {
            local::sweep(root, directories);
        }
    }

    /// Deletes an object if it exists.
    pub async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        let delete = || async { self.inner.delete(path).await };
        match retry::run("deleting", &self.location.below(path.as_ref()), delete).await {
            Err(StoreError::Object { source, .. }) if is_missing_object(&source) => Ok(()),
            ended => ended,
        }
    }

    /// Deletes all objects below a prefix.
    pub async fn delete_all(&self, prefix: &str) -> Result<(), StoreError> {
        self.delete_each(self.list(prefix).await?).await
    }

    /// Deletes the objects that exist.
    pub async fn delete_each(&self, paths: impl IntoIterator<Item = Path>) -> Result<(), StoreError> {
        // Each deletion is a round trip to the store.
        let deletions = paths.into_iter().map(|path| async move { self.delete(&path).await });
        futures::stream::iter(deletions).buffer_unordered(16).try_collect().await
    }
}

/// Whether the bucket exists but the object does not.
fn is_missing_object(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::NotFound { .. }) && !error::is_bucket_missing(error)
}

/// The error for a body shorter than announced. Another attempt may get all of it.
fn broken_off(got: u64, wanted: u64) -> object_store::Error {
    let text = format!("the answer broke off after {got} of {wanted} bytes");
    let source = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, text);
    object_store::Error::Generic { store: "object store", source: source.into() }
}
