//! Finds a model: in a directory, on the Hugging Face hub, or at a URL of an object store.
//!
//! Remote files are fetched into a cache once and used from there; without a network, the cache is used alone. Only the files
//! that a job reads are fetched ([`crate::model_files`]).

mod cache;
mod digest;
mod hub;
mod mirror;

use std::fmt;
use std::path::{Path, PathBuf};

use url::Url;

pub use self::cache::own_cache;

use self::cache::Cache;
use self::digest::Digest;
use self::hub::{Hub, HubModel};
use self::mirror::Mirror;
use crate::model_files::{self, MODEL_INDEX};
use elbo_store::{Location, StoreError};

/// A model that can't be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The text is not a valid model.
    #[error("--model {text}: {reason}; give a directory, hf://owner/name[@revision] or a URL like s3://bucket/model")]
    Text {
        /// The text as given.
        text: String,
        /// The reason.
        reason: String,
    },
    /// The directory does not exist.
    #[error("there is no model directory {0}: give --model a directory in diffusers layout, or hf://owner/name")]
    NoDirectory(PathBuf),
    /// The model is a single file.
    #[error(
        "{0} is a file, and --model needs a directory in diffusers layout: convert it with diffusers' \
         `from_single_file` and `save_pretrained`"
    )]
    File(PathBuf),
    /// The model is in no known layout.
    #[error("{0} has no model_index.json: a model is in diffusers' layout, or a CLIP, SigLIP or OpenCLIP model")]
    NoIndex(String),
    /// `model_index.json` is invalid.
    #[error("model_index.json of {model}: {source}")]
    Index {
        /// The model.
        model: String,
        /// The reason.
        source: serde_json::Error,
    },
    /// The hub requires authentication.
    #[error(
        "{endpoint} refuses to give {model} ({status}): set HF_TOKEN to a token that may read it, accept its licence \
         at {endpoint}/{model}, and check the name, since models that don't exist are refused too"
    )]
    Refused {
        /// The hub.
        endpoint: String,
        /// `owner/name`.
        model: String,
        /// The HTTP status.
        status: u16,
    },
    /// The hub has no such model or revision.
    #[error("{endpoint} has no model {model} at revision {revision}: check the name and the revision")]
    NotFound {
        /// The hub.
        endpoint: String,
        /// `owner/name`.
        model: String,
        /// The branch, tag or commit.
        revision: String,
    },
    /// The hub gave an unexpected response.
    #[error("fetching {what}: {reason}; try again, or fetch the model elsewhere and give its directory")]
    Fetch {
        /// The file or listing.
        what: String,
        /// The reason.
        reason: String,
        /// Whether another attempt may succeed.
        transient: bool,
    },
    /// Twice, a file's hash differed from the one its source names.
    #[error(
        "fetching {path} of {source_name}: it came twice with another hash than its source names, so it is damaged there or \
         on the way: try again later, or fetch the model elsewhere and give its directory"
    )]
    Hash {
        /// The file.
        path: String,
        /// The hub or URL.
        source_name: String,
    },
    /// A file in the cache has changed.
    #[error(
        "{0} in the model cache is cut off or changed: remove it, and run this again where the model can be fetched"
    )]
    Damaged(PathBuf),
    /// A file's name leads out of the model's directory.
    #[error(
        "the model names a file {0:?}, which could lie outside its directory: fetch the model from a source you trust"
    )]
    Name(String),
    /// The model is not in the cache, and fetching is not allowed.
    #[error("{0} is not in the cache, and HF_HUB_OFFLINE is set: unset it to fetch the model")]
    Offline(String),
    /// An error of the object store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The cache can't be written.
    #[error("writing {path} in the model cache: {source}; set HF_HOME (ELBO_CACHE for URLs) to a place with room")]
    Cache {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

impl SourceError {
    /// Whether almost no data arrived.
    fn is_too_slow(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_too_slow())
    }

    /// Whether the source did not respond, so that the cache may be used.
    fn is_unreachable(&self) -> bool {
        match self {
            Self::Fetch { transient, .. } => *transient,
            Self::Store(StoreError::Object { source, .. }) => !matches!(
                source,
                object_store::Error::NotFound { .. }
                    | object_store::Error::Unauthenticated { .. }
                    | object_store::Error::PermissionDenied { .. }
            ),
            _ => false,
        }
    }
}

/// Which of a model's files are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Every file that a job reads.
    Everything,
    /// Only the configurations: they have the noise schedule and a class-conditional model's classes.
    Configuration,
}

impl Wanted {
    /// Whether a file is needed.
    fn includes(self, path: &str) -> bool {
        self == Self::Everything || path.starts_with("scheduler/") || path.ends_with("config.json")
    }
}

/// The local directories of a job's models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobModels {
    /// The job's model.
    pub model: PathBuf,
    /// The model of the shortlist.
    pub shortlist: Option<PathBuf>,
}

impl JobModels {
    /// Finds or fetches the models of a job.
    pub async fn find(
        model: &ModelSource,
        shortlist: Option<&ModelSource>,
        note: impl Fn(String) + Send + Sync,
    ) -> Result<Self, SourceError> {
        let model = model.resolve(Wanted::Everything, &note).await?;
        let shortlist = match shortlist {
            Some(shortlist) => Some(shortlist.resolve(Wanted::Everything, &note).await?),
            None => None,
        };
        Ok(Self { model, shortlist })
    }
}

/// The location of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A local directory.
    Directory(PathBuf),
    /// A prefix of an object store.
    Url(Url),
    /// A repository of the Hugging Face hub.
    Hub(HubModel),
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Url(url) => Location::Remote(url.clone()).fmt(f),
            Self::Hub(model) => model.fmt(f),
        }
    }
}

impl ModelSource {
    /// Parses a directory, a URL or `hf://owner/name[@revision]`.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Text { text: text.to_owned(), reason };
        if let Some(name) = text.strip_prefix("hf://") {
            return HubModel::parse(name).map(Self::Hub).map_err(wrong);
        }
        match Location::parse(text) {
            Ok(Location::Local(path)) => Ok(Self::Directory(path)),
            Ok(Location::Remote(url)) => Ok(Self::Url(url)),
            Err(error) => Err(wrong(error.to_string())),
        }
    }

    /// The directory with the model's files, which are fetched if they are remote. `note` receives progress messages.
    pub async fn resolve(&self, wanted: Wanted, note: impl Fn(String) + Send + Sync) -> Result<PathBuf, SourceError> {
        let (remote, cache, revision) = match self {
            Self::Directory(path) => return check(path),
            Self::Url(url) => (Remote::Mirror(Mirror::open(url)?), Cache::of_url(url), "main"),
            Self::Hub(model) => {
                let hub = Hub::from_environment(model.clone())?;
                let cache = hub.cache();
                if hub.is_offline() {
                    let snapshot = cache.snapshot(&model.revision);
                    let snapshot = snapshot.ok_or_else(|| SourceError::Offline(model.to_string()))?;
                    cache.check(&snapshot, wanted).await?;
                    return Ok(snapshot);
                }
                (Remote::Hub(hub), cache, model.revision.as_str())
            }
        };
        match remote.list().await {
            Ok(listing) => self.fill(&cache, &remote, &listing, revision, wanted, note).await,
            Err(error) if error.is_unreachable() => match cache.snapshot(revision) {
                Some(snapshot) => {
                    cache.check(&snapshot, wanted).await?;
                    note(format!("{error}; using the copy in {}", snapshot.display()));
                    Ok(snapshot)
                }
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn fill(
        &self,
        cache: &Cache,
        remote: &Remote,
        listing: &Listing,
        revision: &str,
        wanted: Wanted,
        note: impl Fn(String) + Send + Sync,
    ) -> Result<PathBuf, SourceError> {
        let find = |path: &str| listing.files.iter().find(|file| file.path == path);
        let paths: Vec<String> = listing.files.iter().map(|file| file.path.clone()).collect();
        let needed = match find(MODEL_INDEX) {
            Some(index) => {
                let index = cache.fetch(remote, &listing.revision, index, &note).await?;
                let bytes = std::fs::read(&index).map_err(|source| SourceError::Cache { path: index, source })?;
                let components = model_files::components(&bytes)
                    .map_err(|source| SourceError::Index { model: self.to_string(), source })?;
                model_files::needed(&paths, &components)
            }
            None if model_files::CONTRASTIVE.iter().any(|name| find(name).is_some()) => {
                model_files::needed_contrastive(&paths)
            }
            None => return Err(SourceError::NoIndex(self.to_string())),
        };
        for path in needed {
            if let Some(file) = find(&path).filter(|_| wanted.includes(&path)) {
                cache.fetch(remote, &listing.revision, file, &note).await?;
            }
        }
        if wanted == Wanted::Everything {
            cache.point(revision, &listing.revision)?;
        }
        Ok(cache.directory(&listing.revision))
    }
}

/// Checks a local model for common mistakes.
fn check(path: &Path) -> Result<PathBuf, SourceError> {
    if path.is_file() {
        return Err(SourceError::File(path.to_owned()));
    }
    if !path.is_dir() {
        return Err(SourceError::NoDirectory(path.to_owned()));
    }
    if !path.join(MODEL_INDEX).is_file() && !model_files::is_contrastive(path) {
        return Err(SourceError::NoIndex(path.display().to_string()));
    }
    Ok(path.to_owned())
}

/// The files of a remote model.
#[derive(Clone, Debug)]
struct Listing {
    /// Identifies this content: a commit, or a hash of all files' keys.
    revision: String,
    files: Vec<RemoteFile>,
}

/// A remote file.
#[derive(Clone, Debug)]
struct RemoteFile {
    path: String,
    /// Identifies the content; valid as a file name.
    key: String,
    size: Option<u64>,
    /// The store's identifier of this version.
    etag: Option<String>,
    /// The expected hash of its content, if the source names one.
    digest: Option<Digest>,
}

/// The bytes of a file from an offset on.
struct Body {
    from: u64,
    chunks: futures::stream::BoxStream<'static, Result<bytes::Bytes, SourceError>>,
}

/// A source that files are fetched from.
#[derive(Debug)]
enum Remote {
    Hub(Hub),
    Mirror(Mirror),
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub(hub) => hub.fmt(f),
            Self::Mirror(mirror) => mirror.fmt(f),
        }
    }
}

impl Remote {
    async fn list(&self) -> Result<Listing, SourceError> {
        match self {
            Self::Hub(hub) => hub.list().await,
            Self::Mirror(mirror) => mirror.list().await,
        }
    }

    /// A file's content from about `from` on. The body says where it actually starts.
    async fn read(&self, revision: &str, file: &RemoteFile, from: u64) -> Result<Body, SourceError> {
        match self {
            Self::Hub(hub) => hub.read(revision, file, from).await,
            Self::Mirror(mirror) => mirror.read(file, from).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_parsed_and_displayed_as_given() {
        for text in ["/models/sd", "s3://bucket/sd", "hf://a/b@v1.0"] {
            assert_eq!(ModelSource::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(ModelSource::parse("hf://a/b").unwrap().to_string(), "hf://a/b");
        for text in ["models/sd:v2", "sd:v2", "hf:a/b"] {
            assert!(
                matches!(ModelSource::parse(text).unwrap(), ModelSource::Directory(path) if path.ends_with(text)),
                "{text}"
            );
        }
        for text in ["hf://b", "hf://a/b/c", "hf://a/../c", "hf://a/b@", "hf://a/b@../x", "hf:///b", ""] {
            assert!(ModelSource::parse(text).unwrap_err().to_string().contains("hf://owner/name"), "{text}");
        }
    }
}
