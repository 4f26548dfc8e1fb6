//! Reads parts of a stored Parquet file: only its footer and the requested column chunks, as byte ranges.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};

use crate::{Store, StoreError, retry};

/// Bytes first read from the end of a file: most footers fit.
const FOOTER_GUESS: usize = 64 << 10;

/// A Parquet file on a store.
#[derive(Clone, Debug)]
pub struct ParquetFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// Its name in messages.
    name: String,
    size: u64,
}

impl ParquetFile {
    /// A file of known size.
    pub fn new(store: &Store, path: Path, size: u64) -> Self {
        let name = store.location().below(path.as_ref());
        Self { store: store.inner(), path, name, size }
    }

    /// The file at `path`, which must exist.
    pub async fn find(store: &Store, path: Path) -> std::result::Result<(Self, ObjectMeta), StoreError> {
        let (inner, name) = (store.inner(), store.location().below(path.as_ref()));
        let meta = retry::run("reading", &name, || inner.head(&path)).await?;
        Ok((Self::new(store, path, meta.size), meta))
    }

    /// Reads the footer of one of our own tables.
    pub async fn metadata(&self) -> Result<ArrowReaderMetadata> {
        ArrowReaderMetadata::load_async(&mut self.clone(), ArrowReaderOptions::new()).await
    }

    /// Reads the footer of a file from another program, and the page index if there is one. Types are those of Parquet, of
    /// which there are fewer than in Arrow: no large strings, views or dictionaries.
    pub async fn outside_metadata(&self) -> Result<ArrowReaderMetadata> {
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let options = options.with_offset_index_policy(PageIndexPolicy::Optional);
        ArrowReaderMetadata::load_async(&mut self.clone(), options).await
    }
}

fn external(error: StoreError) -> ParquetError {
    ParquetError::External(Box::new(error))
}

/// The store's error, if a Parquet error is one.
pub fn store_error(error: ParquetError) -> std::result::Result<StoreError, ParquetError> {
    match error {
        ParquetError::External(source) => match source.downcast() {
            Ok(error) => Ok(*error),
            Err(source) => Err(ParquetError::External(source)),
        },
        other => Err(other),
    }
}

impl AsyncFileReader for ParquetFile {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        async move {
            let get = || self.store.get_range(&self.path, range.clone());
            retry::run("reading", &self.name, get).await.map_err(external)
        }
        .boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move {
            let get = || self.store.get_ranges(&self.path, &ranges);
            retry::run("reading", &self.name, get).await.map_err(external)
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>>> {
        let size = self.size;
        async move {
            let reader =
                ParquetMetaDataReader::new().with_arrow_reader_options(options).with_prefetch_hint(Some(FOOTER_GUESS));
            reader.load_and_finish(self, size).await.map(Arc::new)
        }
        .boxed()
    }
}
