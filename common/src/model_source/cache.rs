//! The cache of fetched models, in the layout of the Hugging Face hub's: contents in `blobs/`, by key, linked from
//! `snapshots/REVISION/`, which `refs/` point to. Other programs' downloads of the same models are found here.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use url::Url;

use super::{Remote, RemoteFile, SourceError};
use crate::model_files::{MODEL_INDEX, is_contrastive};

/// Attempts that bring no byte before a file is given up.
const ATTEMPTS: u32 = 5;

/// The place of one model.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
}

/// `$XDG_CACHE_HOME`, or `.cache` of the home directory.
pub(super) fn user_cache() -> PathBuf {
    let home = || std::env::home_dir().unwrap_or_else(std::env::temp_dir).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()).map_or_else(home, PathBuf::from)
}

/// Where this program keeps what it can find or fetch again: `$ELBO_CACHE`, or `elbo` in the user's cache.
pub fn own_cache() -> PathBuf {
    let own = std::env::var_os("ELBO_CACHE").filter(|d| !d.is_empty());
    own.map_or_else(|| user_cache().join("elbo"), PathBuf::from)
}

impl Cache {
    /// A model's place in a directory.
    pub(super) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The place of what is at a URL.
    pub(super) fn of_url(url: &Url) -> Self {
        let name = blake3::hash(url.as_str().as_bytes()).to_hex();
        Self { root: own_cache().join("models").join(&name[..40]) }
    }

    /// The directory of a revision.
    pub(super) fn directory(&self, revision: &str) -> PathBuf {
        self.root.join("snapshots").join(revision)
    }

    /// The directory of a branch, tag or commit that was fetched before.
    pub(super) fn snapshot(&self, name: &str) -> Option<PathBuf> {
        let pointed = std::fs::read_to_string(self.root.join("refs").join(name)).ok();
        let directory = self.directory(pointed.as_deref().map_or(name, str::trim));
        let is_model = directory.join(MODEL_INDEX).is_file() || is_contrastive(&directory);
        is_model.then_some(directory)
    }

    /// Makes a branch or tag point to a revision whose files are all here.
    pub(super) fn point(&self, name: &str, revision: &str) -> Result<(), SourceError> {
        if name == revision {
            return Ok(());
        }
        let path = self.root.join("refs").join(name);
        let temporary = path.with_file_name(format!(".{}.{}", revision, std::process::id()));
        let written = create_parent(&path)
            .and_then(|()| std::fs::write(&temporary, revision))
            .and_then(|()| std::fs::rename(&temporary, &path));
        written.map_err(|source| SourceError::Cache { path, source })
    }

    /// The path of a revision's file, which is fetched if it is not here.
    pub(super) async fn fetch(
        &self,
        remote: &Remote,
        revision: &str,
        file: &RemoteFile,
        note: &(impl Fn(String) + Send + Sync),
    ) -> Result<PathBuf, SourceError> {
        let link = self.directory(revision).join(&file.path);
        if right(file, &link) {
            return Ok(link);
        }
        let blob = self.root.join("blobs").join(&file.key);
        if !right(file, &blob) {
            self.download(remote, revision, file, &blob, note).await?;
        }
        match place(&blob, &link, file.path.split('/').count()) {
            Ok(()) => Ok(link),
            Err(source) => Err(SourceError::Cache { path: link, source }),
        }
    }

    /// Fetches a file into `KEY.incomplete`, going on where an earlier attempt stopped, and renames it when it is whole.
    async fn download(
        &self,
        remote: &Remote,
        revision: &str,
        file: &RemoteFile,
        blob: &Path,
        note: &(impl Fn(String) + Send + Sync),
    ) -> Result<(), SourceError> {
        let partial = blob.with_file_name(format!("{}.incomplete", file.key));
        let failed = |source| SourceError::Cache { path: partial.clone(), source };
        let mut target = locked(&partial).await.map_err(failed)?;
        // While this waited for the lock, another process may have fetched the file.
        if right(file, blob) {
            return Ok(());
        }
        note(match file.size {
            Some(size) => format!("fetching {} ({:.1} MB)", file.path, size as f64 / 1e6),
            None => format!("fetching {}", file.path),
        });
        let (mut fruitless, mut last) = (0, target.seek(io::SeekFrom::End(0)).map_err(failed)?);
        loop {
            let attempt = append(remote, revision, file, &mut target).await;
            let len = target.metadata().map_err(failed)?.len();
            match attempt {
                Ok(()) if file.size.is_none_or(|size| size == len) => break,
                Ok(()) => {
                    // More or less than the listing says: nothing of it can be used.
                    target.set_len(0).map_err(failed)?;
                    let reason = format!("{len} bytes came, {} were expected", file.size.unwrap_or_default());
                    return Err(SourceError::Fetch { what: file.path.clone(), reason, transient: true });
                }
                Err(AppendError::Cache(source)) => return Err(failed(source)),
                Err(AppendError::Remote(error)) => {
                    // A few bytes in each attempt would be an attempt without end.
                    fruitless = if len > last && !error.is_too_slow() { 0 } else { fruitless + 1 };
                    last = len;
                    if fruitless == ATTEMPTS || !error.is_unreachable() {
                        return Err(error);
                    }
                    tokio::time::sleep(Duration::from_millis(250 << fruitless)).await;
                }
            }
        }
        target.sync_all().and_then(|()| std::fs::rename(&partial, blob)).map_err(failed)
    }
}

enum AppendError {
    Cache(io::Error),
    Remote(SourceError),
}

/// Adds to the end of a file what it lacks.
async fn append(remote: &Remote, revision: &str, file: &RemoteFile, target: &mut File) -> Result<(), AppendError> {
    let here = target.metadata().map_err(AppendError::Cache)?.len();
    if here > 0 && file.size == Some(here) {
        return Ok(());
    }
    // Without a size, or beyond it, nobody knows whether what is here is a beginning.
    let from = if file.size.is_some_and(|size| here < size) { here } else { 0 };
    let mut body = remote.read(revision, file, from).await.map_err(AppendError::Remote)?;
    target.set_len(body.from).map_err(AppendError::Cache)?;
    target.seek(io::SeekFrom::Start(body.from)).map_err(AppendError::Cache)?;
    while let Some(chunk) = body.chunks.next().await {
        target.write_all(&chunk.map_err(AppendError::Remote)?).map_err(AppendError::Cache)?;
    }
    Ok(())
}

/// Opens a file that no other process writes meanwhile.
async fn locked(path: &Path) -> io::Result<File> {
    create_parent(path)?;
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    let locking = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    locking.await.map_err(io::Error::other)?
}

/// Whether a file is there, in its full size.
fn right(file: &RemoteFile, path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| file.size.is_none_or(|size| m.len() == size))
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

/// Links a snapshot's file, `depth` levels below the snapshot's directory, to its blob.
fn place(blob: &Path, link: &Path, depth: usize) -> io::Result<()> {
    create_parent(link)?;
    let temporary = link.with_file_name(format!(
        ".{}.{}",
        link.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let _ = std::fs::remove_file(&temporary);
    #[cfg(unix)]
    {
        let up = "../".repeat(depth + 1);
        let name = blob.file_name().unwrap_or_default().to_string_lossy();
        std::os::unix::fs::symlink(format!("{up}blobs/{name}"), &temporary)?;
    }
    #[cfg(not(unix))]
    {
        let _ = depth;
        std::fs::hard_link(blob, &temporary)?;
    }
    std::fs::rename(&temporary, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_fetched_before_is_found_whatever_the_kind_of_model() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        for (revision, file) in [("1a", "model_index.json"), ("2b", "config.json"), ("3c", "open_clip_config.json")] {
            assert_eq!(cache.snapshot(revision), None);
            std::fs::create_dir_all(cache.directory(revision)).unwrap();
            assert_eq!(cache.snapshot(revision), None);
            std::fs::write(cache.directory(revision).join(file), "{}").unwrap();
            cache.point("main", revision).unwrap();
            assert_eq!(cache.snapshot("main"), Some(cache.directory(revision)));
        }
    }
}
