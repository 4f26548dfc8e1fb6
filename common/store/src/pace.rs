//! Reads that always end: one that gets almost no data for a while is given up.
//!
//! A slow link is no reason to give up, however large the file: what counts is how much arrives within a time window. Time that
//! the reader spends between two pieces, for example waiting for memory, is not counted.

use elbo_core::causes::find_cause;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, OBJECT_STORE_COALESCE_DEFAULT,
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result, coalesce_ranges,
};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::StoreError;

/// Time limit for connecting.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest time without any data.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The least speed of a read.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The longest wait for the first byte of a response.
    answer: Duration,
    /// The longest wait for the next entry of a listing.
    entry: Duration,
    /// Length of the window, which counts only time spent waiting for data.
    window: Duration,
    /// The least number of bytes per window, unless the read ends.
    least: u64,
}

impl Pace {
    /// For object storage and web servers. In addition, a connection on which nothing arrives for a minute is broken.
    pub const REMOTE: Self = Self {
        answer: Duration::from_secs(120),
        entry: Duration::from_secs(600),
        window: Duration::from_secs(30),
        least: 256 << 10,
    };

    /// For file systems, where reads are not retried.
    pub const LOCAL: Self = Self { answer: Duration::from_secs(60), window: Duration::from_secs(60), ..Self::REMOTE };
}

/// A read that was given up because it was too slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSlow {
    bytes: u64,
    within: Duration,
    /// The bytes that would have been enough.
    least: u64,
}

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, within, least } = self;
        write!(f, "only {bytes} bytes came within {} s, but at least {least} are required", within.as_secs_f64())
    }
}

impl std::error::Error for TooSlow {}

impl TooSlow {
    /// The error of a store.
    pub fn of(self, store: &'static str) -> object_store::Error {
        object_store::Error::Generic { store, source: Box::new(self) }
    }

    /// The error of reading something from a store.
    pub fn reading(self, path: &str, store: &'static str) -> StoreError {
        StoreError::Object { action: "reading", path: path.to_owned(), source: self.of(store) }
    }

    /// The [`TooSlow`] that caused an error, if any.
    pub fn find(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        find_cause(error).copied()
    }
}

/// The progress of a blocking read.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Adds bytes that have arrived.
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The number of concurrent blocking reads, including those that hang after they were given up. The runtime has twice as many
/// threads; the others are for work that ends.
static BLOCKING: Semaphore = Semaphore::const_new(256);

impl Pace {
    /// Runs a blocking read of the file system, and gives up if it is too slow. The read itself can't be stopped, but its
    /// caller continues. A panic in it becomes an error of the store.
    pub async fn blocking<T: Send + 'static>(self, read: impl FnOnce(&Progress) -> T + Send + 'static) -> Result<T> {
        let slow = |bytes| TooSlow { bytes, within: self.window, least: self.least }.of("LocalFileSystem");
        let place = timeout(self.window, BLOCKING.acquire()).await.map_err(|_| slow(0))?;
        let progress = Progress::default();
        let seen = progress.clone();
        let mut reading = tokio::task::spawn_blocking(move || {
            let _place = place;
            read(&progress)
        });
        let mut last = 0;
        loop {
            if let Ok(read) = timeout(self.window, &mut reading).await {
                return Ok(read?);
            }
            let now = seen.0.load(Ordering::Relaxed);
            if now - last < self.least {
                return Err(slow(now - last));
            }
            last = now;
        }
    }

    /// Reads a range of an open file at this pace.
    pub async fn read_range(self, file: std::fs::File, range: Range<u64>) -> Result<Bytes> {
        self.blocking(move |progress| read_range(file, range, progress)).await?
    }

    /// A body read at this pace. If it is too slow, it ends with the error from `fail`.
    pub fn body<S, E, F>(self, body: S, fail: F) -> BoxStream<'static, std::result::Result<Bytes, E>>
    where
        S: Stream<Item = std::result::Result<Bytes, E>> + Send + Unpin + 'static,
        F: Fn(TooSlow) -> E + Send + 'static,
        E: Send + 'static,
    {
        let paced = Body { body, pace: self, waited: Duration::ZERO, got: 0 };
        let next = |paced: Option<(Body<S>, F)>| async {
            let (mut paced, fail) = paced?;
            match paced.next().await {
                Ok(Some(Ok(piece))) => Some((Ok(piece), Some((paced, fail)))),
                Ok(Some(Err(error))) => Some((Err(error), None)),
                Ok(None) => None,
                Err(slow) => Some((Err(fail(slow)), None)),
            }
        };
        futures::stream::unfold(Some((paced, fail)), next).boxed()
    }

    /// A listing read at this pace.
    fn listing(self, listed: BoxStream<'static, Result<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
        let next = move |listed: Option<BoxStream<'static, Result<ObjectMeta>>>| async move {
            let mut listed = listed?;
            match timeout(self.entry, listed.next()).await {
                Ok(entry) => Some((entry?, Some(listed))),
                Err(_) => Some((Err(self.unanswered(self.entry)), None)),
            }
        };
        futures::stream::unfold(Some(listed), next).boxed()
    }

    fn unanswered(self, within: Duration) -> object_store::Error {
        TooSlow { bytes: 0, within, least: self.least }.of("object store")
    }
}

fn read_range(file: std::fs::File, range: Range<u64>, progress: &Progress) -> Result<Bytes> {
    use std::io::{Seek, SeekFrom};
    let failed =
        |source: std::io::Error| object_store::Error::Generic { store: "LocalFileSystem", source: source.into() };
    let mut file = file;
    file.seek(SeekFrom::Start(range.start)).map_err(failed)?;
    let bytes = read_up_to(&mut file, range.end - range.start, progress).map_err(failed)?;
    Ok(bytes.into())
}

/// Reads up to `length` bytes of a file, fewer if it ends earlier, and reports progress.
pub fn read_up_to(file: &mut std::fs::File, length: u64, progress: &Progress) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    /// Small enough that a slow file system still shows progress.
    const PIECE: u64 = 128 << 10;
    let mut bytes = Vec::with_capacity(usize::try_from(length.min(file.metadata()?.len())).unwrap_or_default());
    while (bytes.len() as u64) < length {
        let read = file.by_ref().take(PIECE.min(length - bytes.len() as u64)).read_to_end(&mut bytes)?;
        if read == 0 {
            break;
        }
        progress.add(read);
    }
    Ok(bytes)
}

struct Body<S> {
    body: S,
    pace: Pace,
    /// Time waited since enough bytes last arrived.
    waited: Duration,
    got: u64,
}

impl<E, S: Stream<Item = std::result::Result<Bytes, E>> + Unpin> Body<S> {
    async fn next(&mut self) -> std::result::Result<Option<S::Item>, TooSlow> {
        let Pace { window, least, .. } = self.pace;
        let asked = Instant::now();
        let piece = timeout(window.saturating_sub(self.waited), self.body.next()).await;
        let piece = piece.map_err(|_| TooSlow { bytes: self.got, within: window, least })?;
        self.waited += asked.elapsed();
        if let Some(Ok(bytes)) = &piece {
            self.got += bytes.len() as u64;
        }
        if self.got >= least {
            (self.waited, self.got) = (Duration::ZERO, 0);
        }
        Ok(piece)
    }
}

/// A store whose reads and listings always end.
#[derive(Debug)]
pub struct Paced {
    inner: Arc<dyn ObjectStore>,
    pace: Pace,
}

impl Paced {
    /// A store whose reads are given up if they are slower than `pace`.
    pub fn new(inner: Arc<dyn ObjectStore>, pace: Pace) -> Self {
        Self { inner, pace }
    }
}

impl fmt::Display for Paced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Paced {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let Pace { answer, .. } = self.pace;
        let answered = timeout(answer, self.inner.get_opts(path, options)).await;
        let GetResult { payload, meta, range, attributes, extensions } =
            answered.map_err(|_| self.pace.unanswered(answer))??;
        let payload = GetResultPayload::Stream(match payload {
            GetResultPayload::Stream(body) => self.pace.body(body, |slow| slow.of("object store")),
            GetResultPayload::File(file, _) => {
                let read = self.pace.read_range(file, range.clone());
                futures::stream::once(read).boxed()
            }
        });
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    /// Not the inner store's, which has no deadline.
    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        coalesce_ranges(ranges, |range| self.get_range(path, range), OBJECT_STORE_COALESCE_DEFAULT).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.pace.listing(self.inner.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.pace.listing(self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let Pace { entry, .. } = self.pace;
        timeout(entry, self.inner.list_with_delimiter(prefix)).await.map_err(|_| self.pace.unanswered(entry))?
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    const PACE: Pace = Pace {
        answer: Duration::from_millis(200),
        entry: Duration::from_millis(200),
        window: Duration::from_millis(200),
        least: 8,
    };

    /// Pieces of this many bytes, one every 20 ms.
    fn dribble(pieces: usize, bytes: usize) -> BoxStream<'static, Result<Bytes>> {
        let piece = move |_| async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(Bytes::from(vec![7; bytes]))
        };
        futures::stream::iter(0..pieces).then(piece).boxed()
    }

    fn paced(body: BoxStream<'static, Result<Bytes>>) -> BoxStream<'static, Result<Bytes>> {
        PACE.body(body, |slow| slow.of("object store"))
    }

    #[tokio::test]
    async fn a_dribbling_body_is_given_up_and_a_slow_one_is_not() {
        let started = Instant::now();
        let slow = paced(dribble(1_000_000, 0)).try_collect::<Vec<_>>().await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(5));
        let found = TooSlow::find(&slow).unwrap();
        assert_eq!((found.bytes, found.within), (0, PACE.window));
        assert!(super::super::transient::is_transient(&slow), "{slow}");
        // It takes four windows, with enough data in each.
        let whole: Vec<Bytes> = paced(dribble(40, 8)).try_collect().await.unwrap();
        assert_eq!(whole.len(), 40);
        // A body that ends is never too slow.
        let short: Vec<Bytes> = paced(dribble(1, 1)).try_collect().await.unwrap();
        assert_eq!(short.len(), 1);
    }

    #[tokio::test]
    async fn a_reader_that_waits_between_pieces_does_not_make_the_body_slow() {
        let mut body = paced(dribble(4, 1));
        for _ in 0..4 {
            tokio::time::sleep(PACE.window).await;
            body.next().await.unwrap().unwrap();
        }
        assert!(body.next().await.is_none());
    }

    #[tokio::test]
    async fn a_hanging_blocking_read_is_given_up_and_a_progressing_one_is_not() {
        let (end, hang) = std::sync::mpsc::channel::<()>();
        let hung = PACE.blocking(move |progress| {
            progress.add(3);
            let _ = hang.recv();
        });
        let error = hung.await.unwrap_err();
        assert_eq!(TooSlow::find(&error).unwrap().bytes, 3);
        drop(end);
        let steady = PACE.blocking(|progress| {
            for _ in 0..40 {
                std::thread::sleep(Duration::from_millis(20));
                progress.add(8);
            }
            7
        });
        assert_eq!(steady.await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_hanging_listing_is_given_up() {
        let error = PACE.listing(futures::stream::pending().boxed()).try_collect::<Vec<_>>().await.unwrap_err();
        assert!(TooSlow::find(&error).is_some());
    }
}
