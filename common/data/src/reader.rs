//! Reads single images from any location.

use std::collections::HashMap;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use elbo_core::sample::{Part, Sample};
use elbo_core::text::{printable, shown};
use elbo_store::files;
use elbo_store::pace::{Pace, Paced, Progress, read_up_to};
use elbo_store::{Location, Store, StoreError, retry};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStoreExt, ObjectStoreScheme};
use url::Url;

use super::rows::{CellError, Cells};
use crate::budget::{Budget, Memory};

/// The location of an image, as it was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The file: an absolute local path or a URL.
    pub location: String,
    /// The position in that file; `None` if the image is the whole file.
    pub part: Option<Part>,
    /// Size in bytes; 0 if unknown.
    pub size: u64,
    /// The file's entity tag.
    pub etag: Option<String>,
}

impl From<&Sample> for Image {
    fn from(sample: &Sample) -> Self {
        let Sample { location, part, size, etag, .. } = sample.clone();
        Self { location, part, size, etag }
    }
}

/// An image that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is not what was listed.
    #[error("{} has changed since it was listed: restore it, or list the images again with --fresh", printable(file))]
    Changed {
        /// The file.
        file: String,
    },
    /// It is too large.
    #[error(
        "the image has {size} bytes, more than the {limit} an image may have: shrink it, or remove it from the dataset"
    )]
    TooLarge {
        /// Its size.
        size: u64,
        /// The maximum size.
        limit: u64,
    },
    /// The cell of a Parquet file holds no image.
    #[error("row {row} of {} holds no image: {}", printable(file), shown(problem))]
    Cell {
        /// The file.
        file: String,
        /// The row, counted from 0.
        row: u64,
        /// What is wrong.
        problem: String,
    },
}

impl ReadError {
    /// Whether another attempt may succeed. If so, the error says nothing about the image.
    pub fn is_transient(&self) -> bool {
        match self {
            // One slow image says nothing about the others.
            Self::Store(error) => error.is_transient() && !error.is_too_slow(),
            _ => false,
        }
    }
}

/// Reads images. Keeps one store per bucket, since a store holds the connections and credentials, which are too expensive to
/// create for every image.
#[derive(Debug)]
pub struct Reader {
    stores: Mutex<HashMap<Url, Store>>,
    cells: Cells,
    /// Maximum size of an image in bytes.
    limit: u64,
    /// Memory for the images, taken until they are dropped.
    memory: Budget,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader without open stores.
    pub fn new() -> Self {
        let Memory { files, kept, .. } = Memory::default();
        Self { stores: Mutex::default(), cells: Cells::new(kept), limit: u64::MAX, memory: files }
    }

    /// Refuses images of more than `limit` bytes before they are in memory.
    pub fn with_limit(self, limit: u64) -> Self {
        Self { limit, ..self }
    }

    /// Waits for memory before each image is read. The bytes of an image hold their share until they are dropped.
    pub fn within(self, memory: &Memory) -> Self {
        Self { cells: Cells::new(memory.kept), memory: memory.files.clone(), ..self }
    }

    /// Reads a whole image. If it does not exist, the error's source is [`object_store::Error::NotFound`].
    pub async fn read(&self, image: &Image) -> Result<Bytes, ReadError> {
        if image.size > self.limit {
            return Err(ReadError::TooLarge { size: image.size, limit: self.limit });
        }
        let range = match &image.part {
            None => None,
            Some(Part::Member { offset }) => Some(*offset..offset.saturating_add(image.size)),
            Some(Part::Cell { row, column }) => return self.read_cell(image, *row, column).await,
        };
        let named = |source| StoreError::Object { action: "reading", path: image.location.clone(), source };
        match Location::parse(&image.location)? {
            Location::Local(path) => {
                let size = match image.size {
                    0 => {
                        let path = path.clone();
                        let asked = Pace::LOCAL.blocking(move |_| std::fs::metadata(path).map_or(0, |file| file.len()));
                        asked.await.map_err(named)?
                    }
                    size => size,
                };
                let share = self.memory.take(size.min(self.limit)).await;
                let (expected, limit) = (range.is_none().then_some(image.size).filter(|size| *size > 0), self.limit);
                let location = image.location.clone();
                let read = move |progress: &Progress| read_local(&path, range, expected, limit, location, progress);
                Ok(share.bind(Pace::LOCAL.blocking(read).await.map_err(named)??))
            }
            Location::Remote(url) => {
                let (store, path) = self.locate(&url)?;
                self.read_remote(image, &store, &path, range).await
            }
        }
    }

    async fn read_remote(
        &self,
        image: &Image,
        store: &Store,
        path: &Path,
        range: Option<Range<u64>>,
    ) -> Result<Bytes, ReadError> {
        let (inner, whole) = (store.inner(), range.is_none());
        // Stores don't support empty ranges.
        let is_empty = range.as_ref().is_some_and(Range::is_empty);
        let range = range.filter(|_| !is_empty).map(GetRange::Bounded);
        let options = GetOptions { range, if_match: image.etag.clone(), head: is_empty, ..GetOptions::default() };
        // Without a tag, only the size shows that the file has changed.
        let expected = (whole && image.etag.is_none()).then_some(image.size).filter(|size| *size > 0);
        let mut size = image.size;
        loop {
            // Take memory before the request, since a server does not wait.
            let share = self.memory.take(size).await;
            let get = || async {
                let object = inner.get_opts(path, options.clone()).await?;
                match object.meta.size {
                    _ if is_empty => Ok(Ok(Bytes::new())),
                    found if expected.is_some_and(|expected| expected != found) || (whole && found > size) => {
                        Ok(Err(found))
                    }
                    _ => object.bytes().await.map(Ok),
                }
            };
            match retry::run("reading", &image.location, get).await {
                Ok(Ok(bytes)) => return Ok(share.bind(bytes)),
                Ok(Err(_)) if expected.is_some() => {
                    return Err(ReadError::Changed { file: image.location.clone() });
                }
                Ok(Err(found)) if found > self.limit => {
                    return Err(ReadError::TooLarge { size: found, limit: self.limit });
                }
                // Its size was not known: request it again, with enough memory.
                Ok(Err(found)) => size = found,
                Err(StoreError::Object { source: object_store::Error::Precondition { .. }, .. }) => {
                    return Err(ReadError::Changed { file: image.location.clone() });
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn read_cell(&self, image: &Image, row: u64, column: &str) -> Result<Bytes, ReadError> {
        let (store, path) = self.locate_file(&image.location).await?;
        let wrong = |error| match error {
            CellError::Store(error) => error.into(),
            CellError::Changed => ReadError::Changed { file: image.location.clone() },
            CellError::Cell(problem) => ReadError::Cell { file: image.location.clone(), row, problem },
        };
        // The tag of a local file has its modification time, which may differ between machines.
        let etag = image.etag.as_deref().filter(|_| store.location().local().is_none());
        let bytes = self.cells.read(&store, &path, etag, row, column, &self.memory).await.map_err(wrong)?;
        match bytes.len() as u64 {
            size if size > self.limit => Err(ReadError::TooLarge { size, limit: self.limit }),
            // Copy the bytes, since they are part of a cached run.
            size => Ok(self.memory.take(size).await.bind(Bytes::copy_from_slice(&bytes))),
        }
    }

    /// Size and tag of an image in a store, without reading it.
    pub(super) async fn head(&self, url: &str) -> Result<ObjectMeta, StoreError> {
        let (store, path) = self.locate_any(url)?;
        let inner = store.inner();
        retry::run("asking for", url, || inner.head(&path)).await
    }

    /// [`Reader::locate_any`], but refuses local files that are not regular, since reading a pipe would block.
    pub(super) async fn locate_file(&self, location: &str) -> Result<(Store, Path), StoreError> {
        if let Location::Local(path) = Location::parse(location)? {
            let opened = Pace::LOCAL.blocking(move |_| files::open(&path).map(drop)).await;
            let opened = opened.and_then(|opened| opened.map_err(|e| io_error(location, e)));
            opened.map_err(|source| StoreError::Object { action: "reading", path: location.to_owned(), source })?;
        }
        self.locate_any(location)
    }

    /// The store of a file, and its path there.
    pub(super) fn locate_any(&self, location: &str) -> Result<(Store, Path), StoreError> {
        match Location::parse(location)? {
            Location::Local(path) => {
                let failed = |source| StoreError::Object { action: "reading", path: location.to_owned(), source };
                let within = Path::from_absolute_path(&path).map_err(|e| failed(e.into()))?;
                let root = Store::open(&Location::Local(PathBuf::from("/")))?;
                let paced = Paced::new(root.inner(), Pace::LOCAL);
                Ok((Store::from_parts(Arc::new(paced), root.location().clone()), within))
            }
            Location::Remote(url) => self.locate(&url),
        }
    }

    /// The store of a URL, and its path there.
    pub(super) fn locate(&self, url: &Url) -> Result<(Store, Path), StoreError> {
        let failed =
            |source| StoreError::Object { action: "reading", path: Location::Remote(url.clone()).to_string(), source };
        let (root, path) = split(url).map_err(failed)?;
        Ok((self.store(root)?, path))
    }

    /// A store of everything below a URL.
    pub(super) fn below(&self, url: &Url) -> Result<Store, StoreError> {
        Store::open(&Location::Remote(url.clone()))
    }

    fn store(&self, root: Url) -> Result<Store, StoreError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&root) {
            return Ok(store.clone());
        }
        let store = Store::open(&Location::Remote(root.clone()))?;
        stores.insert(root, store.clone());
        Ok(store)
    }
}

/// Reads one whole file by its location; use a [`Reader`] for many.
pub async fn read_object(location: &str) -> Result<Bytes, ReadError> {
    Reader::new().read(&Image { location: location.to_owned(), part: None, size: 0, etag: None }).await
}

/// Reads a local file, or a range of it. Its modification time may differ between machines, but its `expected` size may not.
fn read_local(
    path: &FsPath,
    range: Option<Range<u64>>,
    expected: Option<u64>,
    limit: u64,
    location: String,
    progress: &Progress,
) -> Result<Bytes, ReadError> {
    let failed = |e: std::io::Error| StoreError::Object {
        action: "reading",
        path: location.clone(),
        source: io_error(&location, e),
    };
    let mut file = files::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let changed = || ReadError::Changed { file: location.clone() };
    if expected.is_some_and(|expected| expected != size) {
        return Err(changed());
    }
    let (start, length) = range.map_or((0, size), |range| (range.start, range.end - range.start));
    if length > limit {
        return Err(ReadError::TooLarge { size: length, limit });
    }
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let bytes = read_up_to(&mut file, length, progress).map_err(failed)?;
    if (bytes.len() as u64) < length { Err(changed()) } else { Ok(bytes.into()) }
}

fn io_error(path: &str, error: std::io::Error) -> object_store::Error {
    let path = path.to_owned();
    match error.kind() {
        std::io::ErrorKind::NotFound => object_store::Error::NotFound { path, source: error.into() },
        std::io::ErrorKind::PermissionDenied => object_store::Error::PermissionDenied { path, source: error.into() },
        _ => object_store::Error::Generic { store: "LocalFileSystem", source: error.into() },
    }
}

/// The URL of the bucket and the object's path in it.
fn split(url: &Url) -> Result<(Url, Path), object_store::Error> {
    let (_, path) = ObjectStoreScheme::parse(url)?;
    let mut root = url.clone();
    if let Ok(mut segments) = root.path_segments_mut() {
        for _ in path.parts() {
            segments.pop();
        }
    }
    Ok((root, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(url: &str) -> (String, String) {
        let (root, path) = split(&Url::parse(url).unwrap()).unwrap();
        (root.to_string(), path.to_string())
    }

    fn image(path: &FsPath, size: u64) -> Image {
        Image { location: path.to_str().unwrap().to_owned(), part: None, size, etag: Some("0-0".into()) }
    }

    #[test]
    fn a_url_is_split_into_a_bucket_and_a_path() {
        assert_eq!(parts("s3://bucket/a/b%20c.png"), ("s3://bucket/".into(), "a/b c.png".into()));
        let path_style = "https://s3.eu-west-1.amazonaws.com/bucket/a/b.png";
        assert_eq!(parts(path_style), ("https://s3.eu-west-1.amazonaws.com/bucket".into(), "a/b.png".into()));
        assert_eq!(
            parts("abfss://container@account.dfs.core.windows.net/a.png"),
            ("abfss://container@account.dfs.core.windows.net/".into(), "a.png".into())
        );
        assert_eq!(parts("http://host:8080/data/a.png"), ("http://host:8080/".into(), "data/a.png".into()));
    }

    #[tokio::test]
    async fn a_missing_image_is_not_found_and_the_error_names_it() {
        let error = read_object("/no/such/image.png").await.unwrap_err();
        assert!(error.to_string().contains("/no/such/image.png") && !error.is_transient());
        assert!(matches!(
            error,
            ReadError::Store(StoreError::Object { source: object_store::Error::NotFound { .. }, .. })
        ));
    }

    #[tokio::test]
    async fn a_local_image_must_have_the_listed_size_but_may_have_another_time() {
        let root = tempfile::TempDir::new().unwrap();
        let path = root.path().join("a.png");
        std::fs::write(&path, b"0123456789").unwrap();
        let reader = Reader::new().with_limit(10);
        assert_eq!(&reader.read(&image(&path, 10)).await.unwrap()[..], b"0123456789");
        assert!(matches!(reader.read(&image(&path, 9)).await, Err(ReadError::Changed { .. })));
        let member = |offset, size| Image { part: Some(Part::Member { offset }), ..image(&path, size) };
        assert_eq!(&reader.read(&member(3, 4)).await.unwrap()[..], b"3456");
        assert!(matches!(reader.read(&member(8, 4)).await, Err(ReadError::Changed { .. })));
        assert!(matches!(reader.read(&member(0, 11)).await, Err(ReadError::TooLarge { .. })));
        // An unknown size is checked before the file is in memory.
        std::fs::write(&path, b"01234567890").unwrap();
        assert!(matches!(reader.read(&image(&path, 0)).await, Err(ReadError::TooLarge { size: 11, limit: 10 })));
    }

    /// A reader with one object in a store at `memory:///`, and the object's tag.
    async fn reader_of(key: &str, content: &'static [u8]) -> (Reader, Option<String>) {
        let (reader, url) = (Reader::new(), Url::parse("memory:///").unwrap());
        let memory = Arc::new(object_store::memory::InMemory::new());
        let tag = memory.put(&Path::from(key), content.into()).await.unwrap().e_tag;
        let store = Store::from_parts(memory, Location::Remote(url.clone()));
        reader.stores.lock().unwrap().insert(url, store);
        (reader, tag)
    }

    #[tokio::test]
    async fn an_empty_member_of_a_remote_shard_is_read_if_the_shard_is_unchanged() {
        let (reader, etag) = reader_of("a.tar", b"0123456789").await;
        let part = Some(Part::Member { offset: 4 });
        let member = Image { location: "memory:///a.tar".into(), part, size: 0, etag };
        assert!(reader.read(&member).await.unwrap().is_empty());
        assert_eq!(&reader.read(&Image { size: 3, ..member.clone() }).await.unwrap()[..], b"456");
        let other = Image { etag: Some("other".into()), ..member.clone() };
        assert!(matches!(reader.read(&other).await, Err(ReadError::Changed { .. })));
        // An empty read still shows whether the storage can be read.
        let missing = reader.read(&Image { location: "memory:///b.tar".into(), ..member }).await.unwrap_err();
        let ReadError::Store(StoreError::Object { source, .. }) = missing else { panic!("{missing}") };
        assert!(matches!(source, object_store::Error::NotFound { .. }), "{source}");
    }

    #[tokio::test]
    async fn an_empty_object_is_read_and_without_a_tag_another_size_means_a_change() {
        let (reader, _) = reader_of("a.png", b"").await;
        let image = |size| Image { location: "memory:///a.png".into(), part: None, size, etag: None };
        assert!(reader.read(&image(0)).await.unwrap().is_empty());
        assert!(matches!(reader.read(&image(3)).await, Err(ReadError::Changed { .. })));
        let (reader, _) = reader_of("a.png", b"01234").await;
        assert!(matches!(reader.read(&image(3)).await, Err(ReadError::Changed { .. })));
        assert_eq!(&reader.read(&image(0)).await.unwrap()[..], b"01234");
    }

    #[tokio::test]
    async fn stores_are_opened_once_per_bucket() {
        let reader = Reader::new();
        for key in ["a", "b"] {
            let location = format!("memory:///{key}.png");
            let _ = reader.read(&Image { location, part: None, size: 0, etag: None }).await;
        }
        assert_eq!(reader.stores.lock().unwrap().len(), 1);
    }
}
