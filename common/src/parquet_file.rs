//! A Parquet file where it lies: its footer and the column chunks asked for are read by ranges, and nothing else.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};

/// Bytes read from the end of a file at first: most footers fit.
const FOOTER_GUESS: usize = 64 << 10;

/// A Parquet file on a store.
#[derive(Clone, Debug)]
pub(crate) struct ParquetFile {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl ParquetFile {
    /// A file whose size is known.
    pub(crate) fn new(store: Arc<dyn ObjectStore>, path: Path, size: u64) -> Self {
        Self { store, path, size }
    }

    /// The file at `path`, which must be there.
    pub(crate) async fn find(store: Arc<dyn ObjectStore>, path: Path) -> object_store::Result<(Self, ObjectMeta)> {
        let meta = store.head(&path).await?;
        Ok((Self { store, path, size: meta.size }, meta))
    }

    /// Reads the footer of one of our own tables.
    pub(crate) async fn metadata(&self) -> Result<ArrowReaderMetadata> {
        ArrowReaderMetadata::load_async(&mut self.clone(), ArrowReaderOptions::new()).await
    }

    /// Reads the footer of a file that another program wrote, and where pages begin if the file says so. Types are those of
    /// Parquet, fewer than those of Arrow: no large strings, views or dictionaries.
    pub(crate) async fn outside_metadata(&self) -> Result<ArrowReaderMetadata> {
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let options = options.with_offset_index_policy(PageIndexPolicy::Optional);
        ArrowReaderMetadata::load_async(&mut self.clone(), options).await
    }
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

/// The store's error, if a Parquet error is one.
pub(crate) fn store_error(error: ParquetError) -> std::result::Result<object_store::Error, ParquetError> {
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
        async move { self.store.get_range(&self.path, range).await }.map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>>> {
        async move { self.store.get_ranges(&self.path, &ranges).await }.map_err(external).boxed()
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
