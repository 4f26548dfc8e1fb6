//! Reading a table from a store in pieces: the footer, then of each row group only the columns that are looked at.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::{Columns, TableError, View};

/// Rows decoded at a time: with a thousand scores each, some megabytes.
const BATCH: usize = 256;
/// Bytes fetched from a file's end in the hope that they hold the whole footer.
const FOOTER: usize = 64 << 10;

/// Rows that could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The store failed.
    #[error(transparent)]
    Store(object_store::Error),
    /// The file is wrong.
    #[error(transparent)]
    Table(TableError),
}

/// A Parquet file in a store.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl Object {
    /// A file whose size is known.
    pub(crate) fn new(store: Arc<dyn ObjectStore>, path: Path, size: u64) -> Self {
        Self { store, path, size }
    }

    /// The rows, in order, some at a time. The first of them are there at once, so that several files can be opened side by
    /// side while one is read.
    pub(crate) async fn rows<V: View + Send + 'static>(
        self,
    ) -> Result<impl futures::Stream<Item = Result<Vec<V>, ReadError>> + Send + Unpin, ReadError> {
        let builder = ParquetRecordBatchStreamBuilder::new(self).await.map_err(failed::<V>)?;
        let mask = match V::COLUMNS {
            [] => ProjectionMask::all(),
            columns => ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied()),
        };
        let mut batches = builder.with_batch_size(BATCH).with_projection(mask).build().map_err(failed::<V>)?;
        let first = batches.next().await;
        let rows = futures::stream::iter(first).chain(batches).map_err(failed::<V>).and_then(|batch| async move {
            let mut rows = Vec::with_capacity(batch.num_rows());
            V::read(&Columns { table: V::TABLE, batch: &batch }, &mut rows).map_err(ReadError::Table)?;
            Ok(rows)
        });
        Ok(rows.boxed())
    }
}

fn failed<V: View>(error: ParquetError) -> ReadError {
    let of_table = |source| ReadError::Table(TableError::Decode { table: V::TABLE, source });
    match error {
        ParquetError::External(source) => match source.downcast() {
            Ok(source) => ReadError::Store(*source),
            Err(source) => of_table(ParquetError::External(source)),
        },
        source => of_table(source),
    }
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}

impl AsyncFileReader for Object {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        async move { self.store.get_range(&self.path, range).await }.map_err(external).boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move { self.store.get_ranges(&self.path, &ranges).await }.map_err(external).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let reader = ParquetMetaDataReader::new().with_arrow_reader_options(options);
            reader.with_prefetch_hint(Some(FOOTER)).load_and_finish(self, size).await.map(Arc::new)
        }
        .boxed()
    }
}
