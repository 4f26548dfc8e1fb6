//! The Hugging Face hub: two kinds of GET requests, and the environment variables of its own library.
//!
//! The `hf-hub` crate is not used because it adds about 45 crates, for uploads and Xet transfers.

use elbo_core::causes::causes;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use elbo_store::Location;
use elbo_store::pace::{Pace, TooSlow};
use futures::{StreamExt, TryStreamExt};
use reqwest::header::{AUTHORIZATION, RANGE};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use url::Url;

use super::cache::{Cache, user_cache};
use super::digest::Digest;
use super::{Body, Listing, RemoteFile, SourceError};

/// A repository and its revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubModel {
    /// `owner/name`.
    pub name: String,
    /// A branch, tag or commit.
    pub revision: String,
}

impl HubModel {
    /// Parses `owner/name[@revision]`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let part = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(known)
        };
        match name.split_once('/') {
            Some((owner, model)) if part(owner) && part(model) => {}
            _ => return Err("a model of the hub has an owner and a name".into()),
        }
        if !revision.split('/').all(part) {
            return Err(format!("'{revision}' is not a revision"));
        }
        Ok(Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}", self.name)?;
        if self.revision == "main" { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// A model on a hub.
pub(super) struct Hub {
    model: HubModel,
    client: Client,
    endpoint: Url,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("model", &self.model).field("endpoint", &self.endpoint.as_str()).finish()
    }
}

impl fmt::Display for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.model, Location::Remote(self.endpoint.clone()))
    }
}

/// `GET /api/models/{name}/revision/{revision}?blobs=true`.
#[derive(Deserialize)]
struct ModelInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl Hub {
    /// The hub that the environment describes: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`.
    pub(super) fn from_environment(model: HubModel) -> Result<Self, SourceError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let home = variable("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from);
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| std::fs::read_to_string(token_file).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let failed = |reason: String| SourceError::Fetch { what: endpoint.clone(), reason, transient: false };
        let url = Url::parse(&endpoint).map_err(|e| failed(format!("HF_ENDPOINT is not a URL: {e}")))?;
        elbo_store::tls::use_ring();
        let client = Client::builder()
            .user_agent(concat!("elbo/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(20))
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(|e| failed(chain(&e)))?;
        Ok(Self {
            model,
            client,
            endpoint: url,
            token,
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|v| !["0", "false", "no", "off"].contains(&v.as_str())),
        })
    }

    /// Whether only the cache may be used.
    pub(super) fn is_offline(&self) -> bool {
        self.offline
    }

    /// The model's cache.
    pub(super) fn cache(&self) -> Cache {
        Cache::at(self.cache.join(format!("models--{}", self.model.name.replace('/', "--"))))
    }

    /// The model's files at its revision.
    pub(super) async fn list(&self) -> Result<Listing, SourceError> {
        let name = self.model.name.split('/');
        let mut url = self.url(["api", "models"].into_iter().chain(name).chain(["revision", &self.model.revision]));
        url.set_query(Some("blobs=true"));
        let what = self.model.to_string();
        let broken = |reason: String| SourceError::Fetch { what: what.clone(), reason, transient: false };
        let bytes = self.get(url, &what, 0).await?.bytes().await.map_err(|e| interrupted(&what, &e))?;
        let info: ModelInfo = serde_json::from_slice(&bytes).map_err(|e| broken(format!("no listing: {e}")))?;
        if !is_key(&info.sha) {
            return Err(broken(format!("'{}' is not a commit", info.sha)));
        }
        let file = |sibling: Sibling| {
            let Sibling { rfilename: path, size, blob_id, lfs } = sibling;
            // Large files are pointers in Git, whose hash does not identify the content.
            let digest = match &lfs {
                Some(lfs) => Digest::sha256(&lfs.sha256),
                None => blob_id.as_deref().and_then(Digest::git_blob),
            };
            let key = lfs.map(|lfs| lfs.sha256).or(blob_id).filter(|key| is_key(key));
            // The extra letter makes it longer than a hash, so that it is not taken for one.
            let named = || format!("n{}", blake3::hash(format!("{}/{path}", info.sha).as_bytes()).to_hex());
            let key = key.unwrap_or_else(named);
            RemoteFile { path, key, size, etag: None, digest }
        };
        Ok(Listing { files: info.siblings.into_iter().map(file).collect(), revision: info.sha })
    }

    /// A file's content from `from` on, or from the beginning if the hub does not support ranges.
    pub(super) async fn read(&self, revision: &str, file: &RemoteFile, from: u64) -> Result<Body, SourceError> {
        let name = self.model.name.split('/');
        let url = self.url(name.chain(["resolve", revision]).chain(file.path.split('/')));
        let what = format!("{} of {}", file.path, self.model);
        let response = self.get(url, &what, from).await?;
        let from = if response.status() == StatusCode::PARTIAL_CONTENT { from } else { 0 };
        let path = what.clone();
        let slow = move |slow: TooSlow| SourceError::from(slow.reading(&path, "hub"));
        let chunks = response.bytes_stream().map_err(move |e| interrupted(&what, &e)).boxed();
        let chunks = Pace::REMOTE.body(chunks, slow);
        Ok(Body { from, chunks })
    }

    fn url<'a>(&self, segments: impl Iterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    async fn get(&self, url: Url, what: &str, from: u64) -> Result<Response, SourceError> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            // Storage that the hub redirects to does not get this header.
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let response = request.send().await.map_err(|e| interrupted(what, &e))?;
        let (endpoint, model) = (self.endpoint.as_str().trim_end_matches('/').to_owned(), self.model.name.clone());
        match response.status() {
            status if status.is_success() => Ok(response),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(SourceError::Refused { endpoint, model, status: status.as_u16() })
            }
            StatusCode::NOT_FOUND => {
                Err(SourceError::NotFound { endpoint, model, revision: self.model.revision.clone() })
            }
            status => {
                let transient = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                let reason = format!("{endpoint} answers {status}");
                Err(SourceError::Fetch { what: what.to_owned(), reason, transient })
            }
        }
    }
}

/// Whether an untrusted name can be used as a file name here.
fn is_key(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric())
}

fn interrupted(what: &str, error: &reqwest::Error) -> SourceError {
    SourceError::Fetch { what: what.to_owned(), reason: chain(error), transient: !error.is_builder() }
}

/// An error with its causes, without the URL, which may contain a signature.
fn chain(error: &reqwest::Error) -> String {
    causes(error).skip(1).fold("no answer".to_owned(), |text, cause| format!("{text}: {cause}"))
}
