use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload,
};

use super::*;
use crate::Location;

/// A flaw that makes a store unfit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flaw {
    IgnoresCreate,
    IgnoresUpdate,
    ChecksBeforeItWrites,
    HasNoConditions,
    HidesNewObjects,
    KeepsDeletedObjects,
    RefusesNewObjects,
}

#[derive(Debug)]
struct Flawed(InMemory, Flaw);

impl fmt::Display for Flawed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flawed({:?})", self.1)
    }
}

#[async_trait]
impl ObjectStore for Flawed {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> object_store::Result<PutResult> {
        match (&options.mode, self.1) {
            (PutMode::Create, Flaw::IgnoresCreate) | (PutMode::Update(_), Flaw::IgnoresUpdate) => {
                options.mode = PutMode::Overwrite;
            }
            (PutMode::Create, Flaw::ChecksBeforeItWrites) => {
                let exists = self.0.head(path).await.is_ok();
                tokio::task::yield_now().await;
                if !exists {
                    options.mode = PutMode::Overwrite;
                }
            }
            (PutMode::Create, Flaw::HasNoConditions) => {
                return Err(Error::NotImplemented { operation: "put_opts".into(), implementer: self.to_string() });
            }
            (PutMode::Create, Flaw::RefusesNewObjects) => {
                return Err(Error::AlreadyExists { path: path.to_string(), source: "412".into() });
            }
            _ => {}
        }
        self.0.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.0.get_opts(path, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        if self.1 == Flaw::KeepsDeletedObjects { paths } else { self.0.delete_stream(paths) }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if self.1 == Flaw::HidesNewObjects { Box::pin(futures::stream::empty()) } else { self.0.list(prefix) }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

async fn left(store: &Store) -> usize {
    store.list("").await.unwrap().len()
}

#[tokio::test]
async fn sound_stores_are_accepted_and_left_unchanged() {
    let memory = Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap());
    let directory = tempfile::TempDir::new().unwrap();
    let local = Store::open(&Location::Local(directory.path().into())).unwrap();
    for store in [memory, local] {
        store.write(&Path::from("job.json"), "{}".into()).await.unwrap();
        check(&store).await.unwrap();
        assert_eq!(left(&store).await, 1);
    }
    let mut names: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [".elbo.lock", "job.json"]);
}

#[tokio::test]
async fn flawed_stores_are_refused_by_their_flaw() {
    for (flaw, finding) in [
        (Flaw::IgnoresCreate, "If-None-Match was ignored"),
        (Flaw::IgnoresUpdate, "If-Match was ignored"),
        (Flaw::ChecksBeforeItWrites, "not checked atomically"),
        (Flaw::HasNoConditions, "no conditional puts"),
        (Flaw::HidesNewObjects, "not listed"),
        (Flaw::KeepsDeletedObjects, "still there"),
        (Flaw::RefusesNewObjects, "failed where there was none"),
    ] {
        let store =
            Store::from_parts(Arc::new(Flawed(InMemory::new(), flaw)), Location::parse("s3://bucket/out").unwrap());
        let error = check(&store).await.unwrap_err().to_string();
        assert!(error.contains(finding) && error.contains("s3://bucket/out"), "{flaw:?}: {error}");
        if flaw != Flaw::KeepsDeletedObjects && flaw != Flaw::HidesNewObjects {
            assert_eq!(left(&store).await, 0, "{flaw:?}");
        }
    }
}
