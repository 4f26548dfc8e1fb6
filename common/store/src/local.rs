//! A local directory as a store, with durable writes and conditional replacement.
//!
//! [`LocalFileSystem`] writes a file beside its destination and renames it into place. This store also flushes the file and its
//! directory before the write returns, so that a power cut loses nothing that was reported as written. `LocalFileSystem` has no
//! put that replaces an object only if it is unchanged ([`PutMode::Update`]); here a lock makes comparing and putting one step.

use elbo_core::causes::causes;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path as FsPath, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UpdateVersion, UploadPart,
};
use tokio::sync::watch;

/// The file that is locked while an object is compared and replaced.
const LOCK: &str = ".elbo.lock";
/// How long to wait for the lock. Another process holds it only for one write, unless that process hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pause between attempts to take the lock.
const PAUSE: Duration = Duration::from_millis(5);

/// A disk that accepts no more writes until someone fixes it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskFault {
    /// The disk is full.
    #[error(
        "the disk that holds {} is full: free some space there, then run the same command again, which resumes the job",
        .0.display()
    )]
    Full(PathBuf),
    /// The disk is read-only, perhaps because it failed.
    #[error(
        "the file system that holds {} is read-only: mount it for writing (look at the kernel's log if nobody made it \
         read-only), then run the same command again, which resumes the job",
        .0.display()
    )]
    ReadOnly(PathBuf),
}

impl DiskFault {
    /// The fault behind an error, if there is one.
    fn of(error: &Error, root: &FsPath) -> Option<Self> {
        causes(error).find_map(|cause| match cause.downcast_ref::<std::io::Error>()?.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(Self::Full(root.to_owned())),
            ErrorKind::ReadOnlyFilesystem => Some(Self::ReadOnly(root.to_owned())),
            _ => None,
        })
    }
}

/// Creates a directory and its missing parents durably.
pub(super) fn create(path: &FsPath) -> std::io::Result<()> {
    let is_missing = |path: &&FsPath| !path.as_os_str().is_empty() && !path.exists();
    let missing: Vec<_> = path.ancestors().take_while(is_missing).collect();
    std::fs::create_dir_all(path)?;
    for made in missing {
        // A directory that can't be opened for reading is created all the same, but not flushed.
        let above = made.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(FsPath::new("."));
        if let Ok(above) = File::open(above) {
            above.sync_all()?;
        }
    }
    Ok(())
}

/// Removes the temporary files (`name#1`) that interrupted writes left in these directories below `root`. A write still in
/// progress there fails.
pub(super) fn sweep(root: &FsPath, directories: &[&str]) {
    for directory in directories {
        let entries = std::fs::read_dir(root.join(directory)).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| is_staged(&entry.file_name().to_string_lossy())) {
            // A leftover file does no harm.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Whether this is the name of a temporary file that [`LocalFileSystem`] writes before renaming it.
fn is_staged(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A local directory as a store.
#[derive(Debug)]
pub(super) struct Directory {
    inner: LocalFileSystem,
    root: PathBuf,
    fault: watch::Sender<Option<DiskFault>>,
}

impl Directory {
    /// Opens an existing directory.
    pub(super) fn open(root: &FsPath) -> Result<Self> {
        let inner = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        Ok(Self { inner, root: root.to_owned(), fault: watch::Sender::new(None) })
    }

    /// Reports whether the disk accepts writes.
    pub(super) fn fault(&self) -> watch::Receiver<Option<DiskFault>> {
        self.fault.subscribe()
    }

    /// Takes the lock. On a file system without locks, returns `None`: comparing and putting are then two steps.
    async fn lock(&self) -> Result<Option<File>> {
        let failed = |source: std::io::Error| Error::Generic { store: "LocalFileSystem", source: source.into() };
        let path = self.root.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let began = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) if began.elapsed() < PATIENCE => tokio::time::sleep(PAUSE).await,
                Err(TryLockError::WouldBlock) => {
                    let what = format!(
                        "another process has held {} for {} s: if a coordinator of this output hangs, stop it",
                        path.display(),
                        PATIENCE.as_secs()
                    );
                    return Err(failed(std::io::Error::new(ErrorKind::TimedOut, what)));
                }
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    tracing::warn!("{} can't be locked: {error}", path.display());
                    return Ok(None);
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }

    /// Replaces an object if it is still the version that was seen.
    async fn update(&self, path: &Path, payload: PutPayload, seen: UpdateVersion) -> Result<PutResult> {
        let _lock = self.lock().await?;
        let found = match self.inner.head(path).await {
            Ok(found) => found.e_tag,
            Err(Error::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        if found.is_none() || found != seen.e_tag {
            let source = format!("it is {found:?} and was {:?}", seen.e_tag).into();
            return Err(Error::Precondition { path: path.to_string(), source });
        }
        self.inner.put_opts(path, payload, PutOptions::default()).await
    }
}

/// Removes the lock file, which is not an object, from a listing.
fn without_lock(listed: BoxStream<'static, Result<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
    let is_lock = |item: &Result<ObjectMeta>| item.as_ref().is_ok_and(|object| object.location.as_ref() == LOCK);
    listed.filter(move |item| std::future::ready(!is_lock(item))).boxed()
}

/// Passes an outcome on, and records a disk fault that it reports.
fn note<T>(outcome: Result<T>, root: &FsPath, fault: &watch::Sender<Option<DiskFault>>) -> Result<T> {
    if let Some(found) = outcome.as_ref().err().and_then(|error| DiskFault::of(error, root)) {
        fault.send_if_modified(|known| known.replace(found).is_none());
    }
    outcome
}

impl fmt::Display for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Directory {
    async fn put_opts(&self, path: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
        let put = match std::mem::take(&mut options.mode) {
            PutMode::Update(seen) => self.update(path, payload, seen).await,
            mode => self.inner.put_opts(path, payload, PutOptions { mode, ..options }).await,
        };
        note(put, &self.root, &self.fault)
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let upload = note(self.inner.put_multipart_opts(path, options).await, &self.root, &self.fault)?;
        Ok(Box::new(Upload { inner: upload, root: self.root.clone(), fault: self.fault.clone() }))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(path, options).await
    }

    async fn get_ranges(&self, path: &Path, ranges: &[std::ops::Range<u64>]) -> Result<Vec<bytes::Bytes>> {
        self.inner.get_ranges(path, ranges).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (root, fault) = (self.root.clone(), self.fault.clone());
        self.inner.delete_stream(paths).map(move |deleted| note(deleted, &root, &fault)).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        without_lock(self.inner.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        without_lock(self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut listed = self.inner.list_with_delimiter(prefix).await?;
        listed.objects.retain(|object| object.location.as_ref() != LOCK);
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        note(self.inner.copy_opts(from, to, options).await, &self.root, &self.fault)
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        note(self.inner.rename_opts(from, to, options).await, &self.root, &self.fault)
    }
}

/// A file written in parts.
#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    root: PathBuf,
    fault: watch::Sender<Option<DiskFault>>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, root, fault) = (self.inner.put_part(data), self.root.clone(), self.fault.clone());
        async move { note(part.await, &root, &fault) }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        note(self.inner.complete().await, &self.root, &self.fault)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    async fn text(store: &Directory, path: &Path) -> String {
        String::from_utf8(store.get(path).await.unwrap().bytes().await.unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_changed_object_is_not_replaced() {
        let directory = TempDir::new().unwrap();
        let store = Directory::open(directory.path()).unwrap();
        let path = Path::from("a/b.parquet");
        let first = store.put(&path, "first".into()).await.unwrap();
        let seen = UpdateVersion { e_tag: first.e_tag, version: None };
        let update =
            |text: &'static str| store.put_opts(&path, text.into(), PutOptions::from(PutMode::Update(seen.clone())));
        update("second").await.unwrap();
        let late = update("late").await.unwrap_err();
        assert!(matches!(late, Error::Precondition { .. }), "{late}");
        assert_eq!(text(&store, &path).await, "second");
        store.delete(&path).await.unwrap();
        assert!(matches!(update("later").await.unwrap_err(), Error::Precondition { .. }));
    }

    #[tokio::test]
    async fn of_many_concurrent_replacements_one_succeeds() {
        let directory = TempDir::new().unwrap();
        let path = Path::from("a");
        let first = Directory::open(directory.path()).unwrap().put(&path, "first".into()).await.unwrap();
        let rivals = (0..8).map(|rival| {
            // Each opens the store anew, as a separate process would.
            let store = Directory::open(directory.path()).unwrap();
            let seen = UpdateVersion { e_tag: first.e_tag.clone(), version: None };
            let path = path.clone();
            async move {
                store.put_opts(&path, format!("{rival}").into(), PutOptions::from(PutMode::Update(seen))).await.is_ok()
            }
        });
        let won: Vec<bool> = futures::future::join_all(rivals).await;
        assert_eq!(won.iter().filter(|won| **won).count(), 1);
        let winner = won.iter().position(|won| *won).unwrap().to_string();
        assert_eq!(text(&Directory::open(directory.path()).unwrap(), &path).await, winner);
    }

    #[test]
    fn only_leftovers_of_interrupted_writes_are_swept() {
        let directory = TempDir::new().unwrap();
        let names = ["shard-00001.parquet", "shard-00001.parquet#1", "notes#a", "x#"];
        std::fs::create_dir(directory.path().join("predictions")).unwrap();
        names.iter().for_each(|name| std::fs::write(directory.path().join("predictions").join(name), name).unwrap());
        sweep(directory.path(), &["predictions", "nowhere"]);
        let left = std::fs::read_dir(directory.path().join("predictions")).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["notes#a", "shard-00001.parquet", "x#"]);
    }

    #[test]
    fn a_full_or_read_only_disk_is_distinguished_from_other_failures() {
        let of = |kind: ErrorKind| {
            let source = std::io::Error::from(kind);
            DiskFault::of(&Error::Generic { store: "LocalFileSystem", source: source.into() }, FsPath::new("/out"))
        };
        assert_eq!(of(ErrorKind::StorageFull), Some(DiskFault::Full("/out".into())));
        assert_eq!(of(ErrorKind::QuotaExceeded), Some(DiskFault::Full("/out".into())));
        assert_eq!(of(ErrorKind::ReadOnlyFilesystem), Some(DiskFault::ReadOnly("/out".into())));
        assert_eq!(of(ErrorKind::PermissionDenied), None);
    }
}
