//! Reading one image out of a Parquet file: the run of rows it lies in is read, and kept for the rows beside it.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, RowSelection, RowSelector};
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use crate::parquet_file::{ParquetFile, store_error};
use crate::store::{Store, StoreError};

/// About how many bytes of images are read at once, where the file says where its pages begin.
const RUN_BYTES: u64 = 16 << 20;
/// Bytes of images kept.
const KEPT_BYTES: u64 = 1 << 30;
/// Files whose footers are kept.
const KEPT_FILES: usize = 64;

/// Why there is no image.
#[derive(Debug)]
pub(in super::super) enum CellError {
    Store(StoreError),
    Changed,
    Cell(String),
}

/// The images read last.
#[derive(Debug)]
pub(in super::super) struct Cells {
    files: Cache<String, Arc<Open>>,
    runs: Cache<RunKey, Arc<Run>, ByBytes>,
}

#[derive(Debug)]
struct Open {
    file: ParquetFile,
    metadata: ArrowReaderMetadata,
    etag: Option<String>,
}

/// A file, a column of it, and the first row.
type RunKey = (String, String, u64);

#[derive(Debug)]
struct Run {
    cells: Vec<Option<Bytes>>,
    bytes: u64,
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<RunKey, Arc<Run>> for ByBytes {
    fn weight(&self, _: &RunKey, run: &Arc<Run>) -> u64 {
        run.bytes.max(1)
    }
}

impl Default for Cells {
    fn default() -> Self {
        // One shard, so that a run may take any part of the room there is.
        let options = OptionsBuilder::new().shards(1).estimated_items_capacity(64).weight_capacity(KEPT_BYTES).build();
        let runs = match options {
            Ok(options) => Cache::with_options(options, ByBytes, DefaultHashBuilder::default(), Default::default()),
            Err(_) => Cache::with_weighter(64, KEPT_BYTES, ByBytes),
        };
        Self { files: Cache::new(KEPT_FILES), runs }
    }
}

/// Rows of one row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    group: usize,
    /// The first of them, counted within the group.
    first: u64,
    count: u64,
}

impl Cells {
    /// The bytes in a row (counted over the whole file) of a column; `etag` is what the file must still have.
    pub(in super::super) async fn read(
        &self,
        store: &Store,
        path: &Path,
        etag: Option<&str>,
        row: u64,
        column: &str,
    ) -> Result<Bytes, CellError> {
        let name = format!("{}/{path}", store.location());
        let open = self.files.get_or_insert_async(&name, Open::find(store, path)).await?;
        if etag.is_some_and(|etag| open.etag.as_deref() != Some(etag)) {
            return Err(CellError::Changed);
        }
        let (span, in_span, first) = open.span(row, column)?;
        let key = (name, column.to_owned(), first);
        let run = self.runs.get_or_insert_async(&key, open.read(span, column)).await?;
        let cell = run.cells.get(in_span as usize).and_then(Option::as_ref);
        cell.cloned().ok_or_else(|| CellError::Cell("it is empty".into()))
    }
}

fn failed(error: ParquetError) -> CellError {
    match store_error(error) {
        Ok(error) => CellError::Store(error),
        Err(error) => CellError::Cell(format!("its row group is damaged: {error}")),
    }
}

impl Open {
    async fn find(store: &Store, path: &Path) -> Result<Arc<Self>, CellError> {
        let (file, meta) = ParquetFile::find(store, path.clone()).await.map_err(CellError::Store)?;
        let metadata = file.outside_metadata().await.map_err(failed)?;
        Ok(Arc::new(Self { file, metadata, etag: meta.e_tag }))
    }

    /// The leaf that is called so.
    fn leaf(&self, column: &str) -> Result<usize, CellError> {
        let leaves = self.metadata.parquet_schema().columns();
        let leaf = leaves.iter().position(|leaf| leaf.path().string() == column);
        leaf.ok_or_else(|| CellError::Cell(format!("there is no column {column}")))
    }

    /// The run that a row is read with, its place there, and the number of the run's first row in the file.
    fn span(&self, row: u64, column: &str) -> Result<(Span, u64, u64), CellError> {
        let leaf = self.leaf(column)?;
        let (mut before, groups) = (0, self.metadata.metadata().row_groups());
        for (group, rows) in groups.iter().enumerate() {
            let count = rows.num_rows().max(0) as u64;
            if row - before >= count {
                before += count;
                continue;
            }
            let chunk = rows.column(leaf);
            let per_row = chunk.uncompressed_size().max(0) as u64 / count.max(1);
            let paged = chunk.offset_index_offset().is_some();
            let length = if paged { (RUN_BYTES / per_row.max(1)).clamp(1, count) } else { count };
            let within = row - before;
            let first = within - within % length;
            let span = Span { group, first, count: length.min(count - first) };
            return Ok((span, within - first, before + first));
        }
        Err(CellError::Cell(format!("the file has {before} rows")))
    }

    async fn read(&self, span: Span, column: &str) -> Result<Arc<Run>, CellError> {
        let mask = ProjectionMask::leaves(self.metadata.parquet_schema(), [self.leaf(column)?]);
        let selection = [RowSelector::skip(span.first as usize), RowSelector::select(span.count as usize)];
        let batches = ParquetRecordBatchStreamBuilder::new_with_metadata(self.file.clone(), self.metadata.clone())
            .with_row_groups(vec![span.group])
            .with_projection(mask)
            .with_row_selection(RowSelection::from(selection.to_vec()))
            .build();
        let mut batches = batches.map_err(failed)?;
        let mut cells = Vec::new();
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            cells.extend((0..batch.num_rows()).map(|row| bytes_in(batch.column(0), row)));
        }
        let bytes = cells.iter().flatten().map(|cell| cell.len() as u64).sum();
        Ok(Arc::new(Run { cells, bytes }))
    }
}

/// The bytes in a row of a column that holds them, or structs of them.
fn bytes_in(array: &ArrayRef, row: usize) -> Option<Bytes> {
    if array.is_null(row) {
        return None;
    }
    match array.as_struct_opt() {
        Some(fields) => bytes_in(fields.columns().first()?, row),
        None => Some(Bytes::copy_from_slice(array.as_binary_opt::<i32>()?.value(row))),
    }
}
