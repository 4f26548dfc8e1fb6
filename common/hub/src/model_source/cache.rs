//! The cache of fetched models, in the layout of the Hugging Face hub's: contents in `blobs/`, by key, linked from
//! `snapshots/REVISION/`, which `refs/` point to. Other programs' downloads of the same models are found here.
//!
//! A file counts as whole when it has the size and the hash that its source names. Hashing a model takes seconds, so it is
//! done once: `.elbo/KEY.whole` beside `blobs/` notes size and time of the file that was found whole, and only a file that
//! differs from its note is hashed again. `.elbo/` also has what is being fetched, and the lock of whoever fetches: no other
//! program puts files there, so what lies there was written from its beginning by this one.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use futures::StreamExt;
use url::Url;

use super::digest::Digest;
use super::{Remote, RemoteFile, SourceError, Wanted};
use crate::model_files::{self, MODEL_INDEX, is_contrastive, is_plain_name, is_plain_path};

/// Attempts that bring no byte before a file is given up.
const ATTEMPTS: u32 = 5;

/// The directory of what this program alone writes.
const OWN: &str = ".elbo";

/// The place of one model.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    root: PathBuf,
    /// Blobs are named by the hashes of their contents, as the hub's are.
    is_hashed: bool,
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
    /// A model's place in the hub's cache.
    pub(super) fn at(root: PathBuf) -> Self {
        Self { root, is_hashed: true }
    }

    /// The place of what is at a URL.
    pub(super) fn of_url(url: &Url) -> Self {
        let name = blake3::hash(url.as_str().as_bytes()).to_hex();
        Self { root: own_cache().join("models").join(&name[..40]), is_hashed: false }
    }

    /// The directory of a revision.
    pub(super) fn directory(&self, revision: &str) -> PathBuf {
        self.root.join("snapshots").join(revision)
    }

    /// The directory of a branch, tag or commit that was fetched before.
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

    /// Makes a branch or tag point to a revision whose files are all here.
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

    /// The path of a revision's file, which is fetched if it is not here.
    pub(super) async fn fetch(
        &self,
        remote: &Remote,
        revision: &str,
        file: &RemoteFile,
        note: &(impl Fn(String) + Send + Sync),
    ) -> Result<PathBuf, SourceError> {
        // What is written where follows from names that somebody else chose.
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

    /// Sees that the files of a snapshot are whole, as far as the names of their blobs and earlier notes tell, for use
    /// without the source.
    pub(super) async fn check(&self, snapshot: &Path, wanted: Wanted) -> Result<(), SourceError> {
        let failed = |(path, source)| SourceError::Cache { path, source };
        let blobs = self.root.join("blobs").canonicalize();
        for name in model_files::of_directory(snapshot).map_err(failed)? {
            // A file that is no link to a blob has no name that says anything.
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

    /// Whether a file is there, with the size and the hash that its source names.
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

    /// Size and time of a blob when it was found whole.
    fn noted(&self, key: &str) -> Option<(u64, u128)> {
        let text = std::fs::read_to_string(self.own(&format!("{key}.whole"))).ok()?;
        let (size, modified) = text.trim().split_once(' ')?;
        Some((size.parse().ok()?, modified.parse().ok()?))
    }

    /// Notes that a blob is whole. In a cache that can't be written it is found out again the next time.
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

    /// Fetches a file into a partial one, going on where an earlier attempt stopped, and renames it once it is whole. What
    /// does not have the hash its source names is fetched once more from the beginning.
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
        // While this waited for the lock, another process may have fetched the file.
        if self.is_whole(file, blob).await? {
            return Ok(());
        }
        let size = file.size.map_or_else(String::new, |size| format!(" ({:.1} MB)", size as f64 / 1e6));
        let checked = match (&file.digest, file.size) {
            (Some(_), _) => "",
            (None, Some(_)) => ", whose size alone can be checked: the source names no hash",
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
                        "{} came with another hash than its source names: once more from the beginning",
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

/// Size and time of change in nanoseconds.
fn stamp(metadata: &std::fs::Metadata) -> (u64, u128) {
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    (metadata.len(), modified.map_or(0, |time| time.as_nanos()))
}

/// Whether a file has a hash.
async fn is_of(digest: Digest, path: &Path) -> io::Result<bool> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || digest.is_of(&path)).await.map_err(io::Error::other)?
}

/// Adds what a partial file lacks, with as many attempts as bring it further.
async fn complete(
    remote: &Remote,
    revision: &str,
    file: &RemoteFile,
    target: &mut File,
    partial: &Path,
) -> Result<(), SourceError> {
    let failed = |source| SourceError::Cache { path: partial.to_owned(), source };
    let (mut fruitless, mut last) = (0, target.seek(io::SeekFrom::End(0)).map_err(failed)?);
    loop {
        let attempt = append(remote, revision, file, target).await;
        let len = target.metadata().map_err(failed)?.len();
        match attempt {
            Ok(()) if file.size.is_none_or(|size| size == len) => return Ok(()),
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
}

enum AppendError {
    Cache(io::Error),
    Remote(SourceError),
}

/// Adds to the end of a file what it lacks.
async fn append(remote: &Remote, revision: &str, file: &RemoteFile, target: &mut File) -> Result<(), AppendError> {
    let here = target.metadata().map_err(AppendError::Cache)?.len();
    // Where there is no hash to find out with, a partial file of the full size may be anything: it is fetched anew.
    if here > 0 && file.size == Some(here) && file.digest.is_some() {
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

/// Holds a lock that one process has at a time; it is released when the file is closed.
async fn locked(path: &Path) -> io::Result<File> {
    let file = open(path)?;
    let locking = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    locking.await.map_err(io::Error::other)?
}

/// Opens a file as it is, or makes it.
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
        // Processes of different containers may have one number.
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
    async fn a_blob_that_is_not_what_its_name_says_is_damaged_and_one_that_is_gets_hashed_once() {
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
        // Were it hashed each time, a model would take as many seconds to start.
        write("[]");
        cache.note_whole(key, super::stamp(&std::fs::metadata(&blob).unwrap()));
        check().await.unwrap();
    }

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
