//! A store that wraps another store and fails occasionally, from a seed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::proxy::mixed;

/// A fault of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// 5xx; the operation is not done.
    Busy,
    /// No answer for a while; the operation is not done.
    Timeout,
    /// The operation is done, but the reply is lost.
    LostReply,
    /// The body breaks off in the middle.
    CutOff,
}

/// A store whose operations fail in `percent` of all cases.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    seed: u64,
    percent: u64,
    /// Directory in which every n-th conditional put gets a false S3 409 Conflict: the store claims that the object exists, but
    /// the put was not done. The second field is n.
    conflicts: Option<(&'static str, u64)>,
    operations: Arc<AtomicU64>,
    conditional: AtomicU64,
    injected: Arc<AtomicU64>,
}

impl FaultyStore {
    /// Wraps a store.
    pub fn new(inner: Arc<dyn ObjectStore>, seed: u64, percent: u64) -> Self {
        Self {
            inner,
            seed,
            percent,
            conflicts: None,
            operations: Arc::default(),
            conditional: AtomicU64::new(0),
            injected: Arc::default(),
        }
    }

    /// Adds a false conflict to every `n`-th conditional put to a directory.
    pub fn with_conflicts(self, directory: &'static str, n: u64) -> Self {
        Self { conflicts: Some((directory, n)), ..self }
    }

    /// The number of operations so far, and of faults among them.
    pub fn counts(&self) -> (u64, u64) {
        (self.operations.load(Ordering::Relaxed), self.injected.load(Ordering::Relaxed))
    }

    fn dice(&self) -> Dice {
        Dice {
            seed: self.seed,
            percent: self.percent,
            operations: Arc::clone(&self.operations),
            injected: Arc::clone(&self.injected),
        }
    }

    /// Runs an operation, or injects a failure before or after it.
    async fn around<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match self.dice().roll() {
            None | Some(Fault::CutOff) => operation.await,
            Some(Fault::LostReply) => {
                operation.await?;
                Err(broken("the connection was reset before the reply"))
            }
            Some(fault) => Err(fault.failing().await),
        }
    }
}

/// Decides the fault of the next operation.
#[derive(Clone)]
struct Dice {
    seed: u64,
    percent: u64,
    operations: Arc<AtomicU64>,
    injected: Arc<AtomicU64>,
}

impl Dice {
    fn roll(&self) -> Option<Fault> {
        let roll = mixed(self.seed, self.operations.fetch_add(1, Ordering::Relaxed));
        let kinds = [Fault::Busy, Fault::Timeout, Fault::LostReply, Fault::CutOff];
        let fault = (roll % 100 < self.percent).then(|| kinds[(roll / 100) as usize % kinds.len()])?;
        self.injected.fetch_add(1, Ordering::Relaxed);
        Some(fault)
    }
}

impl Fault {
    async fn failing(self) -> Error {
        match self {
            Self::Timeout => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                broken("operation timed out")
            }
            _ => generic("Server returned non-2xx status code: 503 Slow Down: injected".into()),
        }
    }
}

fn generic(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Generic { store: "faulty store", source }
}

fn broken(what: &'static str) -> Error {
    generic(std::io::Error::new(std::io::ErrorKind::ConnectionReset, what).into())
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if let (PutMode::Create, Some((directory, every))) = (&options.mode, self.conflicts)
            && path.as_ref().contains(directory)
            && self.conditional.fetch_add(1, Ordering::Relaxed) % every == every - 1
        {
            self.injected.fetch_add(1, Ordering::Relaxed);
            return Err(Error::AlreadyExists { path: path.to_string(), source: "409 Conflict".into() });
        }
        self.around(self.inner.put_opts(path, payload, options)).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.around(self.inner.put_multipart_opts(path, options)).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        match self.dice().roll() {
            None => self.inner.get_opts(path, options).await,
            Some(Fault::CutOff) if !head => {
                let found = self.inner.get_opts(path, options).await?;
                let (meta, range) = (found.meta.clone(), found.range.clone());
                let (attributes, extensions) = (found.attributes.clone(), found.extensions.clone());
                let whole = found.bytes().await?;
                let half = [Ok::<Bytes, Error>(whole.slice(..whole.len() / 2)), Err(broken("the body broke off"))];
                let payload = GetResultPayload::Stream(futures::stream::iter(half).boxed());
                Ok(GetResult { payload, meta, range, attributes, extensions })
            }
            Some(fault) => Err(fault.failing().await),
        }
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, dice) = (Arc::clone(&self.inner), self.dice());
        let delete = move |path: Result<Path>| {
            let (inner, dice) = (Arc::clone(&inner), dice.clone());
            async move {
                let path = path?;
                let fault = dice.roll();
                if let Some(fault @ (Fault::Busy | Fault::Timeout)) = fault {
                    return Err(fault.failing().await);
                }
                let one = futures::stream::iter([Ok(path.clone())]).boxed();
                inner.delete_stream(one).try_collect::<Vec<_>>().await?;
                if fault.is_some() { Err(broken("the connection was reset before the reply")) } else { Ok(path) }
            }
        };
        paths.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listed = self.inner.list(prefix);
        if self.dice().roll().is_none() {
            return listed;
        }
        // The first page arrives, the second does not.
        let failure = futures::stream::once(async { Err(broken("the list broke off")) });
        listed.take(3).chain(failure).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.around(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.around(self.inner.copy_opts(from, to, options)).await
    }
}
