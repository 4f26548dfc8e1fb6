//! A model below a URL of an object store or web server.
//!
//! The sizes of the files are known; their hashes only if a list made with `sha256sum` is beside the model.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use elbo_store::{Location, Store, StoreError};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};
use url::Url;

use super::digest::Digest;
use super::{Body, Listing, RemoteFile, SourceError};
use crate::model_files::{self, MODEL_INDEX};
use crate::weight_files;

/// Files that components may have. Web servers don't list files, so these are requested one by one.
const USUAL: [&str; 8] = [
    "config.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
];

/// The optional list of hashes: lines as `sha256sum` writes them, with paths relative to the model.
const SUMS: &str = "SHA256SUMS";

/// A URL prefix with a model.
#[derive(Debug)]
pub(super) struct Mirror {
    url: Url,
    store: Store,
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.location().fmt(f)
    }
}

impl Mirror {
    /// Opens a URL.
    pub(super) fn open(url: &Url) -> Result<Self, SourceError> {
        Ok(Self { url: url.clone(), store: Store::open(&Location::Remote(url.clone()))? })
    }

    /// The model's files, identified by their etags.
    pub(super) async fn list(&self) -> Result<Listing, SourceError> {
        let store = self.store.inner();
        let mut found: Vec<ObjectMeta> = match self.url.scheme() {
            "http" | "https" => self.probe(&*store).await?,
            _ => store.list(None).try_collect().await.map_err(|source| failed("listing", "", source))?,
        };
        found.sort_by(|a, b| a.location.cmp(&b.location));
        let sums = self.store.read(&Path::from(SUMS)).await?;
        let mut sums = sums.map(|bytes| hashes(&String::from_utf8_lossy(&bytes))).unwrap_or_default();
        let mut revision = blake3::Hasher::new();
        let file = |meta: ObjectMeta| {
            let version = meta.e_tag.clone().unwrap_or_else(|| format!("{} {}", meta.last_modified, meta.size));
            let key = blake3::hash(format!("{}\n{version}", meta.location).as_bytes()).to_hex().to_string();
            revision.update(key.as_bytes());
            let path = meta.location.to_string();
            let digest = sums.remove(&path);
            RemoteFile { path, key, size: Some(meta.size), etag: meta.e_tag, digest }
        };
        let files = found.into_iter().map(file).collect();
        Ok(Listing { files, revision: revision.finalize().to_hex()[..40].to_owned() })
    }

    /// The usual files that exist on a web server.
    async fn probe(&self, store: &dyn ObjectStore) -> Result<Vec<ObjectMeta>, SourceError> {
        let index = Path::from(MODEL_INDEX);
        let Some(bytes) = self.store.read(&index).await? else { return Ok(Vec::new()) };
        let components = model_files::components(&bytes)
            .map_err(|source| SourceError::Index { model: self.store.location().to_string(), source })?;
        let weights = || model_files::STEMS.iter().flat_map(|stem| weight_files::usual_names(stem));
        let usual = components.iter().flat_map(|component| {
            USUAL.into_iter().map(str::to_owned).chain(weights()).map(move |name| format!("{component}/{name}"))
        });
        let all: Vec<String> = usual.chain([MODEL_INDEX.to_owned()]).collect();
        let needed = model_files::needed(&all, &components);
        // Which variant exists is not known in advance, so all variants of a needed component's weights are requested.
        let is_variant = |path: &&String| {
            let directory = |path: &str| path.split_once('/').map(|(component, _)| component.to_owned());
            path.ends_with(".safetensors") && needed.iter().any(|needed| directory(needed) == directory(path))
        };
        let wanted: BTreeSet<String> = needed.iter().chain(all.iter().filter(is_variant)).cloned().collect();
        let mut found = Vec::new();
        for path in wanted {
            match store.head(&Path::from(path.as_str())).await {
                Ok(meta) => found.push(meta),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(failed("reading", &path, source)),
            }
        }
        Ok(found)
    }

    /// A file's content from `from` on, if it is still the version that was listed.
    pub(super) async fn read(&self, file: &RemoteFile, from: u64) -> Result<Body, SourceError> {
        let path = file.path.clone();
        let range = (from > 0).then_some(GetRange::Offset(from));
        let options = GetOptions { range, if_match: file.etag.clone(), ..GetOptions::default() };
        let found = self.store.inner().get_opts(&Path::from(path.as_str()), options).await;
        let found = found.map_err(|source| failed("reading", &path, source))?;
        let from = found.range.start;
        Ok(Body { from, chunks: found.into_stream().map_err(move |source| failed("reading", &path, source)).boxed() })
    }
}

/// The hashes in a list of `sha256sum`: `HASH  PATH`, or `HASH *PATH`.
fn hashes(list: &str) -> HashMap<String, Digest> {
    let lines = list.lines().filter_map(|line| {
        let (hash, path) = line.trim().split_once(' ')?;
        let path = path.trim_start_matches([' ', '*']).trim_start_matches("./");
        Some((path.to_owned(), Digest::sha256(hash)?))
    });
    lines.collect()
}

fn failed(action: &'static str, path: &str, source: object_store::Error) -> SourceError {
    StoreError::Object { action, path: path.to_owned(), source }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_hashes_from_sha256sum_is_parsed() {
        let hash = "ab".repeat(32);
        let list = format!("{hash}  unet/config.json\n{hash} *./vae/model.safetensors\n# remark\n\nshort  x\n");
        let found = hashes(&list);
        assert_eq!(found.len(), 2);
        let expected = Digest::sha256(&hash);
        assert_eq!(found.get("unet/config.json"), expected.as_ref());
        assert_eq!(found.get("vae/model.safetensors"), expected.as_ref());
    }
}
