//! Converts rows to Parquet and back, in the same way for every table of a job.
//!
//! DuckDB, Polars, pandas and Hugging Face datasets read Parquet without any options. A table's bytes depend only on its rows,
//! not on clock, host or thread order, so writing it twice is harmless.

mod stored;

use std::marker::PhantomData;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, SortingColumn};
use parquet::file::properties::WriterProperties;

use crate::checksum;

pub use self::stored::{ReadError, groups, rows, unread};

/// A table that can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Encoding failed.
    #[error("encoding the {table} as parquet: {source}; this is a defect, please report it")]
    Encode {
        /// Which table.
        table: &'static str,
        /// The reason.
        source: ParquetError,
    },
    /// Some bytes are not as written.
    #[error(
        "reading the {table}: the file is damaged: its bytes are not those that were written; `elbo verify` names every \
         damaged file, and the job's command computes a shard again with --recompute and its number"
    )]
    Damaged {
        /// Which table.
        table: &'static str,
    },
    /// The file is damaged or not Parquet.
    #[error(
        "reading the {table}: {source}; the file is damaged or was written by another program: delete it and run the job \
         again, which writes it anew"
    )]
    Decode {
        /// Which table.
        table: &'static str,
        /// The reason.
        source: ParquetError,
    },
    /// A column is missing or has the wrong content.
    #[error("reading the {table}: column '{column}' {problem}; the file was written by another program or version")]
    Column {
        /// Which table.
        table: &'static str,
        /// The column.
        column: String,
        /// What is wrong.
        problem: String,
    },
    /// The rows contradict the table's own metadata.
    #[error("reading the {table}: {problem}; the output belongs to another job: use another --out, or --fresh")]
    Rows {
        /// Which table.
        table: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// A table, and the conversion of its rows to columns and back.
pub trait Table: Sized {
    /// A row.
    type Row;

    /// The table's name in errors.
    const NAME: &'static str;

    /// Its columns.
    fn schema() -> Schema;

    /// The rows as columns, in the order of the schema.
    fn columns(rows: &[Self::Row]) -> Result<Vec<ArrayRef>, ParquetError>;

    /// Appends the rows of a batch.
    fn read(columns: &Columns<'_>, rows: &mut Vec<Self::Row>) -> Result<(), TableError>;
}

/// The part of a table that is read: whole rows or only some columns, so that no others are fetched and decoded.
pub trait View: Sized {
    /// The row it produces.
    type Row;

    /// The table's name in errors.
    const TABLE: &'static str;

    /// The columns to read, by name or by the dotted path of a nested field. Empty means all.
    const COLUMNS: &'static [&'static str];

    /// Appends the rows of a batch.
    fn read(columns: &Columns<'_>, rows: &mut Vec<Self::Row>) -> Result<(), TableError>;
}

impl<T: Table> View for T {
    type Row = T::Row;

    const TABLE: &'static str = T::NAME;
    const COLUMNS: &'static [&'static str] = &[];

    fn read(columns: &Columns<'_>, rows: &mut Vec<T::Row>) -> Result<(), TableError> {
        <T as Table>::read(columns, rows)
    }
}

/// Access to a batch's columns by name and type.
#[derive(Debug)]
pub struct Columns<'a> {
    table: &'static str,
    batch: &'a RecordBatch,
}

impl<'a> Columns<'a> {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.batch.num_rows()
    }

    /// A column that may hold nulls.
    pub fn nullable<T: Array + 'static>(&self, name: &str) -> Result<&'a T, TableError> {
        let column = self.batch.column_by_name(name).ok_or_else(|| self.wrong(name, "is missing"))?;
        self.typed(name, column)
    }

    /// A column without nulls.
    pub fn required<T: Array + 'static>(&self, name: &str) -> Result<&'a T, TableError> {
        self.full(name, self.nullable::<T>(name)?)
    }

    /// An array inside a column, which must have the expected type and no nulls.
    pub fn inner<'b, T: Array + 'static>(&self, name: &str, array: &'b ArrayRef) -> Result<&'b T, TableError> {
        self.full(name, self.typed(name, array)?)
    }

    /// An array, which must have the expected type.
    pub fn typed<'b, T: Array + 'static>(&self, name: &str, array: &'b ArrayRef) -> Result<&'b T, TableError> {
        let problem = || format!("has the type {}", array.data_type());
        array.as_any().downcast_ref().ok_or_else(|| self.wrong(name, problem()))
    }

    /// An error about a column.
    pub fn wrong(&self, column: &str, problem: impl Into<String>) -> TableError {
        TableError::Column { table: self.table, column: column.to_owned(), problem: problem.into() }
    }

    fn full<'b, T: Array>(&self, name: &str, array: &'b T) -> Result<&'b T, TableError> {
        if array.null_count() == 0 { Ok(array) } else { Err(self.wrong(name, "has nulls")) }
    }
}

/// Encodes rows with `group` rows per row group and `meta` as the file's key-value metadata. Every table is sorted by its first
/// column, the sample, and declares this. Each row group and page has the smallest and largest value of every column, so that
/// readers can skip what a query can't match.
pub fn encode<T: Table>(rows: &[T::Row], group: usize, meta: &[(String, String)]) -> Result<Bytes, TableError> {
    let mut writer = Writer::<T>::new()?;
    meta.iter().for_each(|(key, value)| writer.note(key, value));
    rows.chunks(group.max(1)).try_for_each(|rows| writer.group(rows))?;
    writer.finish()
}

/// Encodes a table row group by row group.
pub struct Writer<T> {
    writer: ArrowWriter<Vec<u8>>,
    schema: SchemaRef,
    rows: PhantomData<T>,
}

impl<T: Table> std::fmt::Debug for Writer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("table", &T::NAME).finish_non_exhaustive()
    }
}

impl<T: Table> Writer<T> {
    /// A table without rows.
    pub fn new() -> Result<Self, TableError> {
        let schema = SchemaRef::new(T::schema());
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(None)
            .set_sorting_columns(Some(vec![SortingColumn { column_idx: 0, descending: false, nulls_first: false }]))
            .build();
        let writer = ArrowWriter::try_new(Vec::new(), SchemaRef::clone(&schema), Some(properties));
        Ok(Self { writer: writer.map_err(failed::<T>)?, schema, rows: PhantomData })
    }

    /// Adds a row group.
    pub fn group(&mut self, rows: &[T::Row]) -> Result<(), TableError> {
        let columns = T::columns(rows).map_err(failed::<T>)?;
        let batch = RecordBatch::try_new(SchemaRef::clone(&self.schema), columns).map_err(|e| failed::<T>(e.into()))?;
        self.writer.write(&batch).and_then(|()| self.writer.flush()).map_err(failed::<T>)
    }

    /// Adds an entry to the file's key-value metadata.
    pub fn note(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.writer.append_key_value_metadata(KeyValue::new(key.into(), value.into()));
    }

    /// Ends the table and returns the file.
    pub fn finish(mut self) -> Result<Bytes, TableError> {
        self.writer.flush().map_err(failed::<T>)?;
        self.writer.sync().map_err(|e| failed::<T>(e.into()))?;
        let data = checksum::Data::of(self.writer.inner());
        self.note(checksum::DATA, data.to_string());
        self.writer.into_inner().map(Bytes::from).map_err(failed::<T>)
    }
}

fn failed<T: Table>(source: ParquetError) -> TableError {
    TableError::Encode { table: T::NAME, source }
}

/// An entry of a file's key-value metadata.
pub fn note<'a>(metadata: &'a ArrowReaderMetadata, key: &str) -> Option<&'a str> {
    let notes = metadata.metadata().file_metadata().key_value_metadata()?;
    notes.iter().find(|note| note.key == key)?.value.as_deref()
}

/// An entry of the key-value metadata of one of our tables.
pub fn note_of(bytes: &Bytes, key: &str) -> Option<String> {
    let metadata = ArrowReaderMetadata::load(bytes, ArrowReaderOptions::new()).ok()?;
    note(&metadata, key).map(str::to_owned)
}

/// Decodes all rows of a file, after checking that its bytes are as written. Older files have no checksum.
pub fn decode<T: Table>(bytes: Bytes) -> Result<Vec<T::Row>, TableError> {
    let metadata = metadata::<T>(&bytes)?;
    if let Some(data) = note(&metadata, checksum::DATA)
        && !checksum::Data::parse(data).is_some_and(|data| data.is_of(&bytes))
    {
        return Err(TableError::Damaged { table: T::NAME });
    }
    decode_groups::<T>(&bytes, &metadata, (0..metadata.metadata().num_row_groups()).collect())
}

/// Reads the footer.
pub fn metadata<T: Table>(bytes: &Bytes) -> Result<ArrowReaderMetadata, TableError> {
    ArrowReaderMetadata::load(bytes, ArrowReaderOptions::new())
        .map_err(|source| TableError::Decode { table: T::NAME, source })
}

/// Decodes the rows of some row groups.
pub fn decode_groups<T: Table>(
    bytes: &Bytes,
    metadata: &ArrowReaderMetadata,
    groups: Vec<usize>,
) -> Result<Vec<T::Row>, TableError> {
    let fail = |source| TableError::Decode { table: T::NAME, source };
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), metadata.clone())
        .with_row_groups(groups)
        .build()
        .map_err(fail)?;
    let mut rows = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|e| fail(e.into()))?;
        <T as Table>::read(&Columns { table: T::NAME, batch: &batch }, &mut rows)?;
    }
    Ok(rows)
}
