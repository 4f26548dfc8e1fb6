//! Opening a location, local or on object storage, as a store rooted there.

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

/// A location that can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The location is not a path or URL of a kind we know.
    #[error("'{location}' is not a usable location: {reason}; give a directory or a URL like s3://bucket/prefix")]
    Location {
        /// As given.
        location: String,
        /// What is wrong.
        reason: String,
    },
    /// A local directory can't be made or opened.
    #[error("{action} the directory {path}: {source}")]
    Directory {
        /// What was tried.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// An object can't be read, written or listed.
    #[error("{action} {path}: {source}")]
    Object {
        /// What was tried.
        action: &'static str,
        /// The object, relative to the store's root.
        path: String,
        /// Why it failed.
        source: object_store::Error,
    },
}

impl StoreError {
    /// Whether another attempt may succeed.
    pub fn is_transient(&self) -> bool {
        use object_store::Error;
        match self {
            Self::Object { source, .. } => matches!(source, Error::Generic { .. } | Error::JoinError { .. }),
            Self::Location { .. } | Self::Directory { .. } => false,
        }
    }
}

/// A store whose paths are relative to one directory or URL prefix.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    location: Location,
}

/// A directory or a URL prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// An absolute local directory or file.
    Local(PathBuf),
    /// Anything [`object_store`] can parse.
    Remote(Url),
}

impl Location {
    /// Reads a path or URL as a user types it.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::Location { location: text.to_owned(), reason };
        match Url::parse(text) {
            Ok(url) if url.scheme() == "file" => {
                url.to_file_path().map(Self::Local).map_err(|()| wrong("it is not a local path".into()))
            }
            // A one-letter scheme is a drive letter, not a URL.
            Ok(url) if url.scheme().len() > 1 => Ok(Self::Remote(url)),
            _ if text.is_empty() => Err(wrong("it is empty".into())),
            _ => std::path::absolute(text).map(Self::Local).map_err(|e| wrong(e.to_string())),
        }
    }

    /// The local path, if it is one.
    pub fn local(&self) -> Option<&FsPath> {
        match self {
            Self::Local(path) => Some(path),
            Self::Remote(_) => None,
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(f),
            Self::Remote(url) => {
                // Credentials in a URL must reach no log and no file.
                let mut url = url.clone();
                let _ = url.set_password(None);
                let _ = url.set_username("");
                url.set_query(None);
                url.fmt(f)
            }
        }
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
            Location::Remote(url) => remote(url)?,
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
        let object = |source| StoreError::Object { action: "reading", path: path.to_string(), source };
        match self.inner.get(path).await {
            Ok(found) => found.bytes().await.map(Some).map_err(object),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(object(source)),
        }
    }

    /// Writes a whole object by one atomic put.
    pub async fn write(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        self.inner.put(path, bytes.into()).await.map(drop).map_err(|source| StoreError::Object {
            action: "writing",
            path: path.to_string(),
            source,
        })
    }

    /// The paths of all objects below a prefix, sorted.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Path>, StoreError> {
        use futures::TryStreamExt;
        let at = Path::from(prefix);
        let mut paths: Vec<_> = self
            .inner
            .list(Some(&at))
            .map_ok(|meta| meta.location)
            .try_collect()
            .await
            .map_err(|source| StoreError::Object { action: "listing", path: prefix.to_owned(), source })?;
        paths.sort();
        Ok(paths)
    }

    /// Deletes an object, if it is there.
    pub async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        match self.inner.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(StoreError::Object { action: "deleting", path: path.to_string(), source }),
        }
    }

    /// Deletes all objects below a prefix.
    pub async fn delete_all(&self, prefix: &str) -> Result<(), StoreError> {
        for path in self.list(prefix).await? {
            self.delete(&path).await?;
        }
        Ok(())
    }
}

fn local(path: &FsPath) -> Result<LocalFileSystem, StoreError> {
    LocalFileSystem::new_with_prefix(path)
        .map_err(|e| StoreError::Location { location: path.display().to_string(), reason: e.to_string() })
}

fn remote(url: &Url) -> Result<Arc<dyn ObjectStore>, StoreError> {
    // AWS_*, GOOGLE_*, AZURE_*: the builders know their own names and skip the rest.
    let environment = std::env::vars().map(|(k, v)| (k.to_ascii_lowercase(), v));
    let (store, prefix) = object_store::parse_url_opts(url, environment).map_err(|e| StoreError::Location {
        location: Location::Remote(url.clone()).to_string(),
        reason: e.to_string(),
    })?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}
