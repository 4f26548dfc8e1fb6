//! The cache of fetched models. Its layout is that of the Hugging Face hub's cache: contents are in `blobs/`, named by key;
//! `snapshots/REVISION/` links to them; `refs/` point to snapshots. So models downloaded by other programs are found here.
//!
//! A file is whole if it has the size and the hash that its source names. Hashing a model takes seconds, so it is done once:
//! `.elbo/KEY.whole` beside `blobs/` records the size and time of a file that was found whole, and only a file that differs
//! from its record is hashed again. `.elbo/` also holds partial downloads and the lock of the process that fetches. No other
//! program writes there, so this program wrote every file there from its beginning.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use elbo_store::retry;
use futures::StreamExt;
use url::Url;

use super::digest::Digest;
use super::{Remote, RemoteFile, SourceError, Wanted};
use crate::model_files::{self, MODEL_INDEX, is_contrastive, is_plain_name, is_plain_path};

/// Attempts without progress before a file is given up.
const ATTEMPTS: usize = 5;

/// The directory that only this program writes to.
const OWN: &str = ".elbo";

/// The cache of one model.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
    /// Whether blobs are named by the hashes of their contents, as the hub's are.
    is_hashed: bool,
}

/// `$XDG_CACHE_HOME`, or `.cache` of the home directory.
pub(super) fn user_cache() -> PathBuf {
    let home = || std::env::home_dir().unwrap_or_else(std::env::temp_dir).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").filter(|d| !d.is_empty()).map_or_else(home, PathBuf::from)
}

/// The directory for files that this program can find or fetch again: `$ELBO_CACHE`, or `elbo` in the user's cache.
pub fn own_cache() -> PathBuf {
    let own = std::env::var_os("ELBO_CACHE").filter(|d| !d.is_empty());
    own.map_or_else(|| user_cache().join("elbo"), PathBuf::from)
}

impl Cache {
    /// A model in the hub's cache.
    pub(super) fn at(root: PathBuf) -> Self {
        Self { root, is_hashed: true }
    }

    /// The cache for a model at a URL.
    pub(super) fn of_url(url: &Url) -> Self {
        let name = blake3::hash(url.as_str().as_bytes()).to_hex();
        Self { root: own_cache().join("models").join(&name[..40]), is_hashed: false }
    }

    /// The directory of a revision.
    pub(super) fn directory(&self, revision: &str) -> PathBuf {
        self.root.join("snapshots").join(revision)
    }

    /// The directory of a branch, tag or commit, if it was fetched before.
    pub(super) fn snapshot(&self, name: &str) -> Option<PathBuf> {
        let pointed = std::fs::read_to_string(self.root.join("refs").join(name)).ok();
        let revision = pointed.as_deref().map_or(name, str::trim);
        if !is_plain_path(revision) {
            return None;
        }
        let directory = self.directory(revision);
        let is_model = directory.join(MODEL_INDEX).is_file() || is_contrastive(&directory);
        is_model.then_some(directory)
    }

    /// Points a branch or tag to a revision whose files are all in the cache.
    pub(super) fn point(&self, name: &str, revision: &str) -> Result<(), SourceError> {
        if name == revision {
            return Ok(());
        }
        let path = self.root.join("refs").join(name);
        let temporary = path.with_file_name(format!(".{revision}.{}", uuid::Uuid::new_v4()));
        let written = create_parent(&path)
            .and_then(|()| std::fs::write(&temporary, revision))
            .and_then(|()| std::fs::rename(&temporary, &path));
        written.map_err(|source| SourceError::Cache { path, source })
    }

    /// The path of a revision's file. The file is fetched if it is not in the cache.
    pub(super) async fn fetch(
        &self,
        remote: &Remote,
        revision: &str,
        file: &RemoteFile,
        note: &(impl Fn(String) + Send + Sync),
    ) -> Result<PathBuf, SourceError> {
        // These names are untrusted and decide where files are written.
        if !is_plain_path(&file.path) || !is_plain_name(&file.key) || !is_plain_name(revision) {
            return Err(SourceError::Name(file.path.clone()));
        }
        let link = self.directory(revision).join(&file.path);
        if self.is_whole(file, &link).await? {
            return Ok(link);
        }
        let blob = self.root.join("blobs").join(&file.key);
        if !self.is_whole(file, &blob).await? {
            self.download(remote, revision, file, &blob, note).await?;
        }
        match place(&blob, &link, file.path.split('/').count()) {
            Ok(()) => Ok(link),
            Err(source) => Err(SourceError::Cache { path: link, source }),
        }
    }

    /// Checks that the files of a snapshot are whole, as far as their blobs' names and the records allow. Used when the source
    /// is unavailable.
    pub(super) async fn check(&self, snapshot: &Path, wanted: Wanted) -> Result<(), SourceError> {
        let failed = |(path, source)| SourceError::Cache { path, source };
        let blobs = self.root.join("blobs").canonicalize();
        for name in model_files::of_directory(snapshot).map_err(failed)? {
            // Only the name of a blob tells its hash; other files can't be checked.
            let Ok(blob) = snapshot.join(&name).canonicalize() else { continue };
            if !wanted.includes(&name) || blob.parent().map(Path::to_owned) != blobs.as_ref().ok().cloned() {
                continue;
            }
            let Some(key) = blob.file_name().and_then(|key| key.to_str()).map(str::to_owned) else { continue };
            let digest = self.is_hashed.then(|| Digest::of_blob_name(&key)).flatten();
            let size = self.noted(&key).map(|noted| noted.0);
            let file = RemoteFile { path: name, key, size, etag: None, digest };
            if !self.is_whole(&file, &blob).await? {
                return Err(SourceError::Damaged(blob));
            }
        }
        Ok(())
    }

    /// Whether a file exists with the size and the hash that its source names.
    async fn is_whole(&self, file: &RemoteFile, path: &Path) -> Result<bool, SourceError> {
        let Ok(metadata) = std::fs::metadata(path) else { return Ok(false) };
        if !metadata.is_file() || file.size.is_some_and(|size| metadata.len() != size) {
            return Ok(false);
        }
        let Some(digest) = &file.digest else { return Ok(true) };
        let stamp = stamp(&metadata);
        if self.noted(&file.key) == Some(stamp) {
            return Ok(true);
        }
        let whole = is_of(digest.clone(), path).await;
        let whole = whole.map_err(|source| SourceError::Cache { path: path.to_owned(), source })?;
        if whole {
            self.note_whole(&file.key, stamp);
        }
        Ok(whole)
    }

    fn own(&self, name: &str) -> PathBuf {
        self.root.join(OWN).join(name)
    }

    /// The recorded size and time of a blob that was found whole.
    fn noted(&self, key: &str) -> Option<(u64, u128)> {
        let text = std::fs::read_to_string(self.own(&format!("{key}.whole"))).ok()?;
        let (size, modified) = text.trim().split_once(' ')?;
        Some((size.parse().ok()?, modified.parse().ok()?))
    }

    /// Records that a blob is whole. If the cache is read-only, it is checked again next time.
    fn note_whole(&self, key: &str, (size, modified): (u64, u128)) {
        let path = self.own(&format!("{key}.whole"));
        let temporary = self.own(&format!("{}.tmp", uuid::Uuid::new_v4()));
        let written = create_parent(&path)
            .and_then(|()| std::fs::write(&temporary, format!("{size} {modified}\n")))
            .and_then(|()| std::fs::rename(&temporary, &path));
        if let Err(error) = written {
            tracing::debug!(%error, path = %path.display(), "a model's file is not noted as whole");
        }
    }

    /// Fetches a file into a partial file, resuming an earlier attempt, and renames it once it is whole. A file with the wrong
    /// hash is fetched once more from the beginning.
    async fn download(
        &self,
        remote: &Remote,
        revision: &str,
        file: &RemoteFile,
        blob: &Path,
        note: &(impl Fn(String) + Send + Sync),
    ) -> Result<(), SourceError> {
        let partial = self.own(&format!("{}.part", file.key));
        let failed = |source| SourceError::Cache { path: partial.clone(), source };
        let _lock = locked(&self.own("lock")).await.map_err(failed)?;
        // Another process may have fetched the file while this one waited for the lock.
        if self.is_whole(file, blob).await? {
            return Ok(());
        }
        let size = file.size.map_or_else(String::new, |size| format!(" ({:.1} MB)", size as f64 / 1e6));
        let checked = match (&file.digest, file.size) {
            (Some(_), _) => "",
            (None, Some(_)) => ", for which only the size can be checked: the source names no hash",
            (None, None) => ", which can't be checked: the source names neither size nor hash",
        };
        note(format!("fetching {}{size}{checked}", file.path));
        let mut is_second = false;
        loop {
            let mut target = open(&partial).map_err(failed)?;
            complete(remote, revision, file, &mut target, &partial).await?;
            target.sync_all().map_err(failed)?;
            let metadata = target.metadata().map_err(failed)?;
            drop(target);
            match &file.digest {
                Some(digest) if !is_of(digest.clone(), &partial).await.map_err(failed)? => {
                    std::fs::remove_file(&partial).map_err(failed)?;
                    if is_second {
                        return Err(SourceError::Hash { path: file.path.clone(), source_name: remote.to_string() });
                    }
                    note(format!(
                        "{} came with another hash than its source names: fetching it again from the beginning",
                        file.path
                    ));
                    is_second = true;
                }
                _ => {
                    create_parent(blob).and_then(|()| std::fs::rename(&partial, blob)).map_err(failed)?;
                    self.note_whole(&file.key, stamp(&metadata));
                    return Ok(());
                }
            }
        }
    }
}

/// Size, and modification time in nanoseconds.
fn stamp(metadata: &std::fs::Metadata) -> (u64, u128) {
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    (metadata.len(), modified.map_or(0, |time| time.as_nanos()))
}

/// Whether a file has this hash.
async fn is_of(digest: Digest, path: &Path) -> io::Result<bool> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || digest.is_of(&path)).await.map_err(io::Error::other)?
}

/// Completes a partial file, retrying as long as there is progress.
async fn complete(
    remote: &Remote,
    revision: &str,
    file: &RemoteFile,
    target: &mut File,
    partial: &Path,
) -> Result<(), SourceError> {
    let failed = |source| SourceError::Cache { path: partial.to_owned(), source };
    let pauses = || retry::pauses(Duration::from_millis(500)).take(ATTEMPTS - 1);
    let (mut left, mut last) = (pauses(), target.seek(io::SeekFrom::End(0)).map_err(failed)?);
    loop {
        let attempt = append(remote, revision, file, target).await;
        let len = target.metadata().map_err(failed)?.len();
        match attempt {
            Ok(()) if file.size.is_none_or(|size| size == len) => return Ok(()),
            Ok(()) => {
                // A size other than listed: the content can't be used.
                target.set_len(0).map_err(failed)?;
                let reason = format!("{len} bytes came, {} were expected", file.size.unwrap_or_default());
                return Err(SourceError::Fetch { what: file.path.clone(), reason, transient: true });
            }
            Err(AppendError::Cache(source)) => return Err(failed(source)),
            Err(AppendError::Remote(error)) => {
                // If each attempt brings only a few bytes, the attempts are not renewed.
                if len > last && !error.is_too_slow() {
                    left = pauses();
                }
                last = len;
                let Some(pause) = left.next().filter(|_| error.is_unreachable()) else { return Err(error) };
                tokio::time::sleep(pause).await;
            }
        }
    }
}

enum AppendError {
    Cache(io::Error),
    Remote(SourceError),
}

/// Appends the missing part of a file.
async fn append(remote: &Remote, revision: &str, file: &RemoteFile, target: &mut File) -> Result<(), AppendError> {
    let here = target.metadata().map_err(AppendError::Cache)?.len();
    // Without a hash, a partial file of the full size can't be checked, so it is fetched again.
    if here > 0 && file.size == Some(here) && file.digest.is_some() {
        return Ok(());
    }
    // If the size is unknown or exceeded, the existing part may not belong to the file.
    let from = if file.size.is_some_and(|size| here < size) { here } else { 0 };
    let mut body = remote.read(revision, file, from).await.map_err(AppendError::Remote)?;
    target.set_len(body.from).map_err(AppendError::Cache)?;
    target.seek(io::SeekFrom::Start(body.from)).map_err(AppendError::Cache)?;
    while let Some(chunk) = body.chunks.next().await {
        target.write_all(&chunk.map_err(AppendError::Remote)?).map_err(AppendError::Cache)?;
    }
    Ok(())
}

/// Takes an exclusive lock, which is released when the file is closed.
async fn locked(path: &Path) -> io::Result<File> {
    let file = open(path)?;
    let locking = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    locking.await.map_err(io::Error::other)?
}

/// Opens a file without truncating it, or creates it.
fn open(path: &Path) -> io::Result<File> {
    create_parent(path)?;
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)
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
        // A random name, since processes in different containers may have the same process id.
        uuid::Uuid::new_v4()
    ));
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

    #[cfg(unix)]
    #[tokio::test]
    async fn a_blob_with_a_wrong_hash_is_damaged_and_a_good_one_is_hashed_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        let (blobs, snapshot) = (dir.path().join("blobs"), cache.directory("1a"));
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        // `printf '{}' | git hash-object --stdin`
        let key = "9e26dfeeb6e641a33dae4961196235bdb965b21b";
        let blob = blobs.join(key);
        std::os::unix::fs::symlink(format!("../../blobs/{key}"), snapshot.join("config.json")).unwrap();
        let check = async || cache.check(&snapshot, Wanted::Everything).await;
        let write = |text: &str| std::fs::write(&blob, text).unwrap();
        write("[]");
        assert!(matches!(check().await, Err(SourceError::Damaged(path)) if path.ends_with(key)));
        write("{}");
        check().await.unwrap();
        let stamp = stamp(&std::fs::metadata(&blob).unwrap());
        assert_eq!(cache.noted(key), Some(stamp));
        write("{");
        assert!(matches!(check().await, Err(SourceError::Damaged(_))));
        // Hashing it every time would add seconds to each start.
        write("[]");
        cache.note_whole(key, super::stamp(&std::fs::metadata(&blob).unwrap()));
        check().await.unwrap();
    }

    #[test]
    fn fetched_models_of_every_kind_are_found() {
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
