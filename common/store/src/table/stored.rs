//! Reads a stored table: the footer, then only the needed columns of each row group.

use std::panic::AssertUnwindSafe;

use arrow_array::RecordBatch;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;

use super::{Columns, TableError, View};
use crate::StoreError;
use crate::parquet_file::{ParquetFile, store_error};

/// Rows decoded at once: with a thousand scores each, a few megabytes.
const BATCH: usize = 256;

/// An error while reading rows.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
    /// The file is wrong.
    #[error(transparent)]
    Table(TableError),
}

/// The error of reading a table: the store's or the file's.
pub fn unread<V: View>(error: ParquetError) -> ReadError {
    match store_error(error) {
        Ok(error) => ReadError::Store(error),
        Err(source) => ReadError::Table(TableError::Decode { table: V::TABLE, source }),
    }
}

/// The decoder's next batch. The decoder panics on some damaged files, which is treated as an error.
async fn next_batch<S>(batches: &mut S) -> Option<Result<RecordBatch, ParquetError>>
where
    S: Stream<Item = Result<RecordBatch, ParquetError>> + Unpin,
{
    let next = AssertUnwindSafe(batches.next()).catch_unwind().await;
    next.unwrap_or_else(|_| Some(Err(ParquetError::General("the decoder crashed on it".into()))))
}

/// The rows in order, in batches. The first batch is read immediately, so that several files can be opened concurrently while
/// one is read.
pub async fn rows<V: View<Row: Send> + Send + 'static>(
    file: ParquetFile,
) -> Result<impl futures::Stream<Item = Result<Vec<V::Row>, ReadError>> + Send + Unpin, ReadError> {
    let builder = ParquetRecordBatchStreamBuilder::new(file).await.map_err(unread::<V>)?;
    let mask = match V::COLUMNS {
        [] => ProjectionMask::all(),
        columns => ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied()),
    };
    let mut batches = builder.with_batch_size(BATCH).with_projection(mask).build().map_err(unread::<V>)?;
    let first = next_batch(&mut batches).await;
    // A decoder that has failed is not asked for more.
    let rest = futures::stream::unfold(Some(batches), |batches| async {
        let mut batches = batches?;
        let batch = next_batch(&mut batches).await?;
        let rest = batch.is_ok().then_some(batches);
        Some((batch, rest))
    });
    let rows = futures::stream::iter(first).chain(rest).map_err(unread::<V>).and_then(|batch| async move {
        let mut rows = Vec::with_capacity(batch.num_rows());
        V::read(&Columns { table: V::TABLE, batch: &batch }, &mut rows).map_err(ReadError::Table)?;
        Ok(rows)
    });
    Ok(rows.boxed())
}

/// The rows of some row groups.
pub async fn groups<V: View>(
    file: &ParquetFile,
    metadata: &ArrowReaderMetadata,
    groups: Vec<usize>,
) -> Result<Vec<V::Row>, ReadError> {
    let reader = ParquetRecordBatchStreamBuilder::new_with_metadata(file.clone(), metadata.clone());
    let mut batches = reader.with_row_groups(groups).build().map_err(unread::<V>)?;
    let mut rows = Vec::new();
    while let Some(batch) = next_batch(&mut batches).await.transpose().map_err(unread::<V>)? {
        V::read(&Columns { table: V::TABLE, batch: &batch }, &mut rows).map_err(ReadError::Table)?;
    }
    Ok(rows)
}
