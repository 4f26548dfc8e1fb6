//! The files below a directory or a URL prefix, in the order of their keys.

use std::path::{Path as FsPath, PathBuf};
use std::time::UNIX_EPOCH;

use elbo_store::files;
use elbo_store::{Location, SkippedKeys, Store, StoreError, describe};
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;
use url::Url;

use super::collector::{Collector, Found};
use super::pattern::Target;
use super::{DatasetError, EXTENSIONS, Reader, Reason};

/// The kind of a file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Image,
    Shard,
    Table,
}

impl Kind {
    pub(super) fn of(name: &str) -> Option<Self> {
        match name.rsplit_once('.')?.1.to_ascii_lowercase().as_str() {
            "tar" => Some(Self::Shard),
            "parquet" => Some(Self::Table),
            extension => EXTENSIONS.contains(&extension).then_some(Self::Image),
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Image => "images",
            Self::Shard => "tar shards",
            Self::Table => "Parquet files",
        }
    }
}

/// A file of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) key: String,
    pub(super) location: String,
    pub(super) size: u64,
    pub(super) etag: Option<String>,
}

impl File {
    /// An error about this file.
    pub(super) fn wrong(&self, problem: impl Into<String>) -> DatasetError {
        DatasetError::Container { file: self.location.clone(), problem: problem.into() }
    }
}

/// Takes the files of a source: images become samples, and files that contain images are kept for later.
pub(super) struct Intake<'a, 'b> {
    source_name: String,
    collector: &'a mut Collector<'b>,
    /// The kind of the files, and the first file.
    kind: Option<(Kind, String)>,
    containers: Vec<File>,
}

impl<'a, 'b> Intake<'a, 'b> {
    pub(super) fn new(source_name: String, collector: &'a mut Collector<'b>) -> Self {
        Self { source_name, collector, kind: None, containers: Vec::new() }
    }

    pub(super) fn expect_duplicates(&mut self) {
        self.collector.expect_duplicates();
    }

    /// Takes a file; returns whether more are wanted.
    fn add(&mut self, file: File) -> Result<bool, DatasetError> {
        let Some(kind) = Kind::of(&file.key) else {
            self.collector.note(extension_of(&file.key), &file.key);
            return Ok(true);
        };
        let (first, example) = self.kind.get_or_insert_with(|| (kind, file.key.clone()));
        if *first != kind {
            let extension = example.rsplit_once('.').map_or("", |(_, extension)| extension).to_owned();
            return Err(DatasetError::Mixed {
                source_name: self.source_name.trim_end_matches('/').to_owned(),
                first: format!("{} ({example})", first.noun()),
                other: format!("{} ({})", kind.noun(), file.key),
                extension,
            });
        }
        if kind != Kind::Image {
            self.containers.push(file);
            return Ok(true);
        }
        let File { key, location, size, etag } = file;
        self.collector.add(Found { key, location, size, etag, ..Found::default() })
    }

    /// Takes a file that may be hidden; returns whether more are wanted.
    fn add_unless_hidden(&mut self, file: File) -> Result<bool, DatasetError> {
        if is_hidden(&file.key) {
            self.pass_over(Reason::Hidden, &file.key);
            return Ok(true);
        }
        self.add(file)
    }

    /// Adds a passed-over item.
    fn pass_over(&mut self, reason: Reason, key: &str) {
        self.collector.note(reason, key);
    }

    /// Removes all files.
    pub(super) fn clear(&mut self) {
        self.collector.clear();
        self.containers.clear();
        self.kind = None;
    }

    /// The kind of the files, and the files that contain images.
    pub(super) fn finish(self) -> Result<(Kind, Vec<File>), DatasetError> {
        let Some((kind, _)) = self.kind else {
            let passed_over = self.collector.take_account();
            return Err(DatasetError::NoImages { source_name: self.source_name, passed_over });
        };
        if kind != Kind::Image {
            self.collector.expect_duplicates();
        }
        Ok((kind, self.containers))
    }
}

/// The order of a store's objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// In the order of the store, which for nearly all stores is by key.
    AsListed,
    /// Sorted in memory.
    Sorted,
}

/// Why a walk ended early.
#[derive(Debug)]
pub(super) enum WalkError {
    /// The store does not list its objects by key, so they must be sorted.
    OutOfOrder,
    Dataset(DatasetError),
}

impl<E: Into<DatasetError>> From<E> for WalkError {
    fn from(error: E) -> Self {
        Self::Dataset(error.into())
    }
}

/// Takes the files of `target` below `base`.
pub(super) async fn walk(
    base: &Location,
    target: &Target,
    reader: &Reader,
    order: Order,
    intake: &mut Intake<'_, '_>,
) -> Result<(), WalkError> {
    let (name, glob) = match target {
        Target::Base => ("", None),
        Target::Name(name) => (name.as_str(), None),
        Target::Glob(glob) => (glob.directory.as_str(), Some(glob)),
    };
    let wanted = |key: &str| glob.is_none_or(|glob| glob.matches(key));
    match base {
        // This blocks, but the listing runs on its own thread, before anything else in a job.
        Location::Local(root) => walk_local(root, name, wanted, intake)?,
        Location::Remote(url) if glob.is_none() && Kind::of(name).is_some() => {
            intake.add(find_remote(reader, url, name).await?)?;
        }
        Location::Remote(url) => {
            let store = reader.below(url)?;
            walk_remote(&store, url, name, wanted, order, intake).await?;
            let SkippedKeys { count, examples } = store.skipped_keys();
            if count > 0 {
                intake.collector.add_to_account(Reason::UnusableKey, count, examples);
            }
        }
    }
    Ok(())
}

/// Directories that operating systems and storage devices leave behind.
const LEFT_BEHIND: [&str; 4] = ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"];

/// Whether any part of a path is hidden.
pub(super) fn is_hidden(path: &str) -> bool {
    path.split('/').any(|name| name.starts_with('.') || LEFT_BEHIND.contains(&name))
}

/// The reason for passing over a file with this extension.
pub(super) fn extension_of(path: &str) -> Reason {
    let name = path.rsplit('/').next().unwrap_or_default();
    Reason::Extension(name.rsplit_once('.').map_or("", |(_, extension)| extension).to_ascii_lowercase())
}

/// A directory being walked, with its remaining entries in order and its real path.
struct Directory {
    path: PathBuf,
    key: String,
    entries: std::vec::IntoIter<String>,
    hidden: Vec<String>,
    real: PathBuf,
}

impl Directory {
    fn open(path: PathBuf, key: String, above: &[Self]) -> Result<Self, DatasetError> {
        let unreadable = |source| DatasetError::Unreadable { path: path.clone(), source };
        let real = path.canonicalize().map_err(unreadable)?;
        if above.iter().any(|directory| directory.real == real) {
            return Err(DatasetError::Cycle(path));
        }
        let (mut entries, mut hidden) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(&path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let Some(mut name) = entry.file_name().to_str().map(str::to_owned) else {
                return Err(DatasetError::Name(entry.path()));
            };
            if is_hidden(&name) {
                hidden.push(name);
                continue;
            }
            let kind = entry.file_type().map_err(unreadable)?;
            if kind.is_dir() || (kind.is_symlink() && entry.path().is_dir()) {
                // Keys are compared as a whole: the files in `a` come after `a-b` and before `a0`.
                name.push('/');
            }
            entries.push(name);
        }
        entries.sort_unstable();
        hidden.sort_unstable();
        Ok(Self { path, key, entries: entries.into_iter(), hidden, real })
    }
}

/// Walks the file or directory `name` below `root`, depth first. Only the directories on the current path are in memory.
fn walk_local(
    root: &FsPath,
    name: &str,
    wanted: impl Fn(&str) -> bool,
    intake: &mut Intake<'_, '_>,
) -> Result<(), DatasetError> {
    let start = root.join(name);
    let start = if name.is_empty() { root.to_owned() } else { start };
    match std::fs::metadata(&start) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DatasetError::Missing(start.display().to_string()));
        }
        Err(source) => return Err(DatasetError::Unreadable { path: start, source }),
        Ok(metadata) if metadata.is_dir() => {}
        Ok(metadata) => {
            if let Some(what) = files::irregular(&metadata) {
                return Err(DatasetError::Irregular { path: start, what });
            }
            if Kind::of(name).is_none() {
                return Err(DatasetError::IsFile(start.display().to_string()));
            }
            return intake.add(local_file(start, name.to_owned(), Some(&metadata))?).map(drop);
        }
    }
    let key = if name.is_empty() { String::new() } else { format!("{}/", name.trim_end_matches('/')) };
    let mut open = vec![Directory::open(start, key, &[])?];
    while let Some(directory) = open.last_mut() {
        for name in std::mem::take(&mut directory.hidden) {
            let key = format!("{}{name}", directory.key);
            if wanted(&key) {
                intake.pass_over(Reason::Hidden, &key);
            }
        }
        let Some(name) = directory.entries.next() else {
            open.pop();
            continue;
        };
        let (path, key) = (directory.path.join(&name), format!("{}{name}", directory.key));
        if key.ends_with('/') {
            let below = Directory::open(path, key, &open)?;
            open.push(below);
        } else if wanted(&key) {
            // A broken link is listed like any bad image, and quarantined when it is read.
            let metadata = std::fs::metadata(&path).ok();
            if let Some(what) = metadata.as_ref().and_then(files::irregular) {
                intake.pass_over(Reason::Irregular(what.to_owned()), &key);
            } else if !intake.add(local_file(path, key, metadata.as_ref())?)? {
                break;
            }
        }
    }
    Ok(())
}

/// A local file.
fn local_file(path: PathBuf, key: String, metadata: Option<&std::fs::Metadata>) -> Result<File, DatasetError> {
    let size = metadata.map_or(0, std::fs::Metadata::len);
    let etag = metadata.and_then(local_etag);
    match path.into_os_string().into_string() {
        Ok(location) => Ok(File { key, location, size, etag }),
        Err(path) => Err(DatasetError::Name(path.into())),
    }
}

/// Modification time in nanoseconds and size, in hexadecimal: it changes with the content, and stays the same in a copy that
/// keeps times.
pub(super) fn local_etag(metadata: &std::fs::Metadata) -> Option<String> {
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{:x}-{:x}", modified.as_nanos(), metadata.len()))
}

async fn find_remote(reader: &Reader, base: &Url, name: &str) -> Result<File, DatasetError> {
    let location = url_of(base, name);
    let object = reader.head(&location).await.map_err(|error| match error {
        StoreError::Object { source: object_store::Error::NotFound { .. }, .. } => {
            DatasetError::Missing(location.clone())
        }
        error => error.into(),
    })?;
    Ok(File { key: name.to_owned(), location, size: object.size, etag: object.e_tag })
}

/// Walks the objects below `name`.
pub(super) async fn walk_remote(
    store: &Store,
    base: &Url,
    name: &str,
    wanted: impl Fn(&str) -> bool,
    order: Order,
    intake: &mut Intake<'_, '_>,
) -> Result<(), WalkError> {
    let prefix = (!name.is_empty()).then(|| Path::from(name));
    let mut files = std::pin::pin!(objects(store, base, prefix.as_ref(), &wanted));
    if order == Order::Sorted {
        let mut files: Vec<_> = files.try_collect().await?;
        files.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        for file in files {
            if !intake.add_unless_hidden(file)? {
                break;
            }
        }
        return Ok(());
    }
    let mut last = String::new();
    while let Some(file) = files.try_next().await? {
        if file.key < last {
            tracing::warn!("{} lists its objects out of order: they are sorted in memory", store.location());
            return Err(WalkError::OutOfOrder);
        }
        last.clone_from(&file.key);
        if !intake.add_unless_hidden(file)? {
            break;
        }
    }
    Ok(())
}

/// The wanted objects below a prefix.
fn objects<'a>(
    store: &'a Store,
    base: &'a Url,
    prefix: Option<&Path>,
    wanted: &'a impl Fn(&str) -> bool,
) -> impl futures::Stream<Item = Result<File, DatasetError>> + 'a {
    let failed = move |source| match base.scheme() {
        "http" | "https" => DatasetError::Unlistable { url: store.location().to_string(), reason: describe(&source) },
        _ => StoreError::Object { action: "listing", path: store.location().to_string(), source }.into(),
    };
    store.inner().list(prefix).map_err(failed).try_filter_map(move |object| {
        let key = object.location.to_string();
        let taken = wanted(&key);
        let file = || File { location: url_of(base, &key), size: object.size, etag: object.e_tag, key: key.clone() };
        let file = taken.then(file);
        async move { Ok(file) }
    })
}

/// The URL of an object below `base`, without credentials: workers use their own.
pub(super) fn url_of(base: &Url, key: &str) -> String {
    let mut url = base.clone();
    let _ = url.set_password(None);
    if !url.scheme().starts_with("abfs") {
        // In abfs://container@account the user is the container.
        let _ = url.set_username("");
    }
    url.set_query(None);
    url.set_fragment(None);
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(key.split('/'));
    }
    url.to_string()
}
