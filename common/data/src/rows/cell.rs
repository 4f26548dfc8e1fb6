//! Reads one image from a Parquet file. It reads the run of rows that contains the image, and keeps it for nearby rows.
//!
//! A column chunk can be far larger in memory than in the file: it is compressed, or many rows have the same image, which is
//! written once. So a run ends as soon as it is large enough, pages are decoded as needed, and an image in many rows is kept
//! once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use elbo_store::pace::TooSlow;
use elbo_store::parquet_file::{ParquetFile, store_error};
use elbo_store::{Store, StoreError, retry};
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, RowSelection, RowSelector};
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use crate::budget::Budget;

/// Approximate bytes of images per run.
const RUN_BYTES: u64 = 16 << 20;
/// Maximum rows decoded at a time.
const BATCH_ROWS: u64 = 1024;
/// Number of files whose footers are kept.
const KEPT_FILES: usize = 64;
/// How long a file that was too slow is not requested again, since many images may wait for it one after the other.
const AVOIDED: Duration = retry::PATIENCE;

/// Why an image can't be read.
#[derive(Debug)]
pub(in super::super) enum CellError {
    Store(StoreError),
    Changed,
    Cell(String),
}

/// A cache of the images read last.
#[derive(Debug)]
pub(in super::super) struct Cells {
    files: Cache<String, Arc<Open>>,
    runs: Cache<RunKey, Arc<Run>, ByBytes>,
    /// Column chunks as stored in the file, if a chunk can only be fetched whole.
    chunks: Cache<ChunkKey, Bytes, ByBytes>,
    /// When files were too slow, and how slow.
    slow: Mutex<HashMap<String, (Instant, TooSlow)>>,
}

#[derive(Debug)]
struct Open {
    file: ParquetFile,
    metadata: ArrowReaderMetadata,
    etag: Option<String>,
}

/// A file, a column, and the first row.
type RunKey = (String, String, u64);
/// A file, a row group, and the column's number.
type ChunkKey = (String, usize, usize);

/// Images of consecutive rows.
#[derive(Debug, Default)]
struct Run {
    /// Every distinct image once.
    data: Bytes,
    /// The position of each row's image.
    cells: Vec<Option<Range<usize>>>,
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<RunKey, Arc<Run>> for ByBytes {
    fn weight(&self, _: &RunKey, run: &Arc<Run>) -> u64 {
        (run.data.len() + size_of_val(run.cells.as_slice())).max(1) as u64
    }
}

impl Weighter<ChunkKey, Bytes> for ByBytes {
    fn weight(&self, _: &ChunkKey, chunk: &Bytes) -> u64 {
        chunk.len().max(1) as u64
    }
}

/// A cache of `bytes` bytes.
fn cache<K: Eq + std::hash::Hash, V: Clone>(bytes: u64) -> Cache<K, V, ByBytes>
where
    ByBytes: Weighter<K, V>,
{
    // One shard, so that a single entry may fill the whole cache.
    let options = OptionsBuilder::new().shards(1).estimated_items_capacity(64).weight_capacity(bytes).build();
    match options {
        Ok(options) => Cache::with_options(options, ByBytes, DefaultHashBuilder::default(), Default::default()),
        Err(_) => Cache::with_weighter(64, bytes, ByBytes),
    }
}

/// Rows of one row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    group: usize,
    /// The group's first row, counted over the whole file.
    before: u64,
    /// The first row of the span, counted within the group.
    first: u64,
    count: u64,
    /// The column's number.
    leaf: usize,
}

impl Cells {
    /// A cache of `bytes` bytes.
    pub(in super::super) fn new(bytes: u64) -> Self {
        let (runs, chunks) = (cache(bytes / 2), cache(bytes / 2));
        Self { files: Cache::new(KEPT_FILES), runs, chunks, slow: Mutex::default() }
    }

    /// The bytes in a row (counted over the whole file) of a column. The file must still have the tag `etag`. Decoding takes
    /// its share of `memory`.
    pub(in super::super) async fn read(
        &self,
        store: &Store,
        path: &Path,
        etag: Option<&str>,
        row: u64,
        column: &str,
        memory: &Budget,
    ) -> Result<Bytes, CellError> {
        let name = format!("{}/{path}", store.location());
        let opening = self.timed(&name, Open::find(store, path));
        let open = self.files.get_or_insert_async(&name, opening).await?;
        if etag.is_some_and(|etag| open.etag.as_deref() != Some(etag)) {
            return Err(CellError::Changed);
        }
        let mut span = open.span(row, column)?;
        // A run may end before the row; then the next run begins there.
        loop {
            let first = span.before + span.first;
            let key = (name.clone(), column.to_owned(), first);
            let reading = self.timed(&name, self.load(&name, &open, span, memory));
            let run = self.runs.get_or_insert_async(&key, reading).await?;
            if let Some(cell) = run.cells.get((row - first) as usize) {
                let cell = cell.clone().ok_or_else(|| CellError::Cell("it is empty".into()))?;
                return Ok(run.data.slice(cell));
            }
            let rows = run.cells.len() as u64;
            if rows == 0 {
                return Err(CellError::Cell("its row group ends before it".into()));
            }
            (span.first, span.count) = (span.first + rows, span.count.saturating_sub(rows));
        }
    }

    /// Bytes that are kept.
    #[cfg(test)]
    pub(super) fn kept(&self) -> u64 {
        self.runs.weight() + self.chunks.weight()
    }

    /// Runs `reading`, unless the file was too slow a moment ago.
    async fn timed<T>(&self, name: &str, reading: impl Future<Output = Result<T, CellError>>) -> Result<T, CellError> {
        let known = self.slow.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        if let Some((at, slow)) = known
            && at.elapsed() < AVOIDED
        {
            return Err(CellError::Store(slow.reading(name, "object store")));
        }
        let read = reading.await;
        if let Err(CellError::Store(error)) = &read
            && let Some(slow) = error.too_slow()
        {
            let mut files = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
            files.retain(|_, (at, _)| at.elapsed() < AVOIDED);
            files.insert(name.to_owned(), (Instant::now(), slow));
        }
        read
    }

    /// Reads a run.
    async fn load(&self, name: &str, open: &Open, span: Span, memory: &Budget) -> Result<Arc<Run>, CellError> {
        let chunk = open.metadata.metadata().row_group(span.group).column(span.leaf);
        let (start, length) = chunk.byte_range();
        let pages = open.pages(span);
        let uncompressed = chunk.uncompressed_size().max(0) as u64;
        if pages.is_some() || uncompressed <= RUN_BYTES {
            let fetched = pages.unwrap_or(length);
            let _share = memory.take(fetched + share_of(uncompressed, fetched, length)).await;
            return open.read(open.file.clone(), span).await;
        }
        let fetching = async {
            let _share = memory.take(length).await;
            open.file.clone().get_bytes(start..start + length).await.map_err(failed)
        };
        let key = (name.to_owned(), span.group, span.leaf);
        let bytes = self.chunks.get_or_insert_async(&key, fetching).await?;
        // The size of a page is unknown, but it is at most the size of all pages.
        let _share = memory.take(RUN_BYTES + uncompressed).await;
        open.read(Fetched { file: open.file.clone(), start, bytes }, span).await
    }
}

/// Bytes of all rows of a column chunk, according to the file. The real size may be larger if many rows have the same image.
fn bytes_of_rows(chunk: &ColumnChunkMetaData) -> u64 {
    let values = chunk.unencoded_byte_array_data_bytes().unwrap_or_default();
    chunk.uncompressed_size().max(values).max(0) as u64
}

/// `whole * part / all`, without overflow.
fn share_of(whole: u64, part: u64, all: u64) -> u64 {
    (u128::from(whole) * u128::from(part) / u128::from(all.max(1))) as u64
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
        Ok(Arc::new(Self { file, metadata: with_views(metadata), etag: meta.e_tag }))
    }

    /// The leaf column with this name.
    fn leaf(&self, column: &str) -> Result<usize, CellError> {
        let leaves = self.metadata.parquet_schema().columns();
        let leaf = leaves.iter().position(|leaf| leaf.path().string() == column);
        leaf.ok_or_else(|| CellError::Cell(format!("there is no column {column}")))
    }

    /// The span of rows to read for a row.
    fn span(&self, row: u64, column: &str) -> Result<Span, CellError> {
        let leaf = self.leaf(column)?;
        let (mut before, groups) = (0, self.metadata.metadata().row_groups());
        for (group, rows) in groups.iter().enumerate() {
            let count = rows.num_rows().max(0) as u64;
            if row - before >= count {
                before += count;
                continue;
            }
            let chunk = rows.column(leaf);
            if chunk.data_page_offset().min(chunk.dictionary_page_offset().unwrap_or(0)).min(chunk.compressed_size())
                < 0
            {
                return Err(CellError::Cell("the file's footer is damaged".into()));
            }
            let per_row = bytes_of_rows(chunk) / count.max(1);
            let paged = chunk.offset_index_offset().is_some();
            let length = if paged { (RUN_BYTES / per_row.max(1)).clamp(1, count) } else { count };
            let within = row - before;
            let first = within - within % length;
            return Ok(Span { group, before, first, count: length.min(count - first), leaf });
        }
        Err(CellError::Cell(format!("the file has {before} rows")))
    }

    /// Bytes in the file of the pages with these rows, and of everything before the first page, if the file has a page index.
    fn pages(&self, span: Span) -> Option<u64> {
        let metadata = self.metadata.metadata();
        let index = metadata.page_index_for_row_group(span.group);
        let pages = index.page_locations(span.leaf)?;
        let (start, length) = metadata.row_group(span.group).column(span.leaf).byte_range();
        let first_page = pages.first()?.offset.max(0) as u64;
        let next_rows = pages.iter().skip(1).map(|page| page.first_row_index).chain([i64::MAX]);
        let rows = span.first as i64..(span.first + span.count) as i64;
        let wanted = pages.iter().zip(next_rows);
        let wanted = wanted.filter(|(page, next)| page.first_row_index < rows.end && *next > rows.start);
        let bytes: u64 = wanted.map(|(page, _)| page.compressed_page_size.max(0) as u64).sum();
        Some((first_page.saturating_sub(start) + bytes).min(length))
    }

    /// Reads rows until the run is large enough.
    async fn read(&self, from: impl AsyncFileReader + Unpin + 'static, span: Span) -> Result<Arc<Run>, CellError> {
        let group = self.metadata.metadata().row_group(span.group);
        let per_row = bytes_of_rows(group.column(span.leaf)) / (group.num_rows().max(1) as u64);
        let rows = (RUN_BYTES / 4 / per_row.max(1)).clamp(1, BATCH_ROWS);
        let mask = ProjectionMask::leaves(self.metadata.parquet_schema(), [span.leaf]);
        let selection = [RowSelector::skip(span.first as usize), RowSelector::select(span.count as usize)];
        let batches = ParquetRecordBatchStreamBuilder::new_with_metadata(from, self.metadata.clone())
            .with_row_groups(vec![span.group])
            .with_projection(mask)
            .with_row_selection(RowSelection::from(selection.to_vec()))
            .with_batch_size(rows as usize)
            .build();
        let mut batches = batches.map_err(failed)?;
        let mut filling = Filling::default();
        while let Some(batch) = batches.try_next().await.map_err(failed)? {
            filling.take(batch.column(0));
            if filling.data.len() as u64 >= RUN_BYTES {
                break;
            }
        }
        Ok(Arc::new(Run { data: filling.data.into(), cells: filling.cells }))
    }
}

/// A run in the making.
#[derive(Default)]
struct Filling {
    data: Vec<u8>,
    cells: Vec<Option<Range<usize>>>,
    by_hash: HashMap<blake3::Hash, Range<usize>>,
    /// The previous batch, and the images at the addresses in it, which stay valid while it is kept.
    _before: Option<ArrayRef>,
    by_place: HashMap<Place, Range<usize>>,
}

/// Address and length.
type Place = (usize, usize);

impl Filling {
    /// Takes the images of a batch, each once. Images at the same address are equal, so they are not compared.
    fn take(&mut self, column: &ArrayRef) {
        let mut by_place = HashMap::new();
        for row in 0..column.len() {
            let cell = bytes_in(column, row).map(|bytes| {
                let place = (bytes.as_ptr().addr(), bytes.len());
                let known = by_place.get(&place).or_else(|| self.by_place.get(&place)).cloned();
                let cell = known.unwrap_or_else(|| self.find_or_add(bytes));
                by_place.insert(place, cell.clone());
                cell
            });
            self.cells.push(cell);
        }
        (self._before, self.by_place) = (Some(Arc::clone(column)), by_place);
    }

    fn find_or_add(&mut self, bytes: &[u8]) -> Range<usize> {
        let Self { data, by_hash, .. } = self;
        let added = by_hash.entry(blake3::hash(bytes)).or_insert_with(|| {
            let start = data.len();
            data.extend_from_slice(bytes);
            start..data.len()
        });
        added.clone()
    }
}

/// Metadata that decodes columns of bytes to views of the pages, so that nothing is copied per row.
fn with_views(metadata: ArrowReaderMetadata) -> ArrowReaderMetadata {
    let schema = Schema::new(fields_with_views(metadata.schema().fields()));
    let options = ArrowReaderOptions::new().with_schema(Arc::new(schema));
    let viewed = ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options);
    // Without views, a batch has a copy per row: more memory, but the same bytes.
    viewed.unwrap_or(metadata)
}

fn fields_with_views(fields: &Fields) -> Fields {
    let field = |field: &Arc<Field>| match field.data_type() {
        DataType::Binary => Arc::new(Field::clone(field).with_data_type(DataType::BinaryView)),
        DataType::Struct(inner) => {
            Arc::new(Field::clone(field).with_data_type(DataType::Struct(fields_with_views(inner))))
        }
        _ => Arc::clone(field),
    };
    fields.iter().map(field).collect()
}

/// The bytes in a row of a column of bytes, or of structs with bytes.
fn bytes_in(array: &ArrayRef, row: usize) -> Option<&[u8]> {
    if array.is_null(row) {
        return None;
    }
    if let Some(fields) = array.as_struct_opt() {
        return bytes_in(fields.columns().first()?, row);
    }
    match array.as_binary_view_opt() {
        Some(views) => Some(views.value(row)),
        None => Some(array.as_binary_opt::<i32>()?.value(row)),
    }
}

/// A Parquet file with a part in memory.
struct Fetched {
    file: ParquetFile,
    start: u64,
    bytes: Bytes,
}

impl AsyncFileReader for Fetched {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        let within = range.start.checked_sub(self.start).zip(range.end.checked_sub(self.start));
        match within {
            Some((start, end)) if end <= self.bytes.len() as u64 => {
                let part = self.bytes.slice(start as usize..end as usize);
                async move { Ok(part) }.boxed()
            }
            _ => self.file.get_bytes(range),
        }
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        self.file.get_metadata(options)
    }
}
