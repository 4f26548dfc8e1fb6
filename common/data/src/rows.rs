//! The samples of a Parquet file: a row is an image, in a column of bytes, in a struct of bytes and path as Hugging Face
//! writes it, or named by a path.
//!
//! Listing a file reads the columns with labels, captions, keys and paths, but not the image bytes.

mod cell;
mod label;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, StructArray};
use arrow_schema::{DataType, Field, Schema};
use elbo_core::sample::Part;
use elbo_store::Location;
use elbo_store::parquet_file::{ParquetFile, store_error};
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;

use super::file_list::{ASKED, Base, PATH_COLUMNS, find};
use super::walk::File;
use super::{Contents, DatasetError, Found, ListOptions, Origin, Reader, Reason, caption_of, check_captions};

pub(super) use self::cell::{CellError, Cells};
use self::label::{LabelColumn, text};

/// Usual names of a column of images, in order of preference.
const IMAGE_COLUMNS: [&str; 6] = ["image", "img", "jpg", "png", "webp", "bytes"];
/// Rows whose labels and captions are decoded at a time. Long repeated texts are small in the file, but large in memory.
const BATCH_ROWS: usize = 128;
/// Rows whose images are decoded at a time, to find out which have one.
const BATCH_IMAGES: usize = 16;
/// The largest column chunk of images that may be read whole.
const LARGEST_CHUNK: i64 = 256 << 20;

/// Where a file's images are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Images {
    /// In a column of bytes.
    Bytes(String),
    /// In a struct's field `bytes`, or at the path in its field `path`.
    Struct { name: String, has_path: bool },
    /// At the paths in a column.
    Paths(String),
}

impl Images {
    /// The column of bytes, if there is one.
    fn bytes(&self) -> Option<String> {
        match self {
            Self::Bytes(name) => Some(name.clone()),
            Self::Struct { name, .. } => Some(format!("{name}.bytes")),
            Self::Paths(_) => None,
        }
    }

    /// The column of paths, if there is one.
    fn paths(&self) -> Option<String> {
        match self {
            Self::Bytes(_) => None,
            Self::Struct { name, has_path } => has_path.then(|| format!("{name}.path")),
            Self::Paths(name) => Some(name.clone()),
        }
    }
}

impl Images {
    /// The columns of bytes and of paths with the images of a row group, according to the statistics: one of them, or both if
    /// some rows have bytes and others only a path.
    fn in_group(&self, group: &RowGroupMetaData) -> (Option<String>, Option<String>) {
        let rows = group.num_rows().max(0) as u64;
        let (Some(bytes), Some(paths)) = (self.bytes(), self.paths()) else { return (self.bytes(), self.paths()) };
        match (nulls(group, &bytes), nulls(group, &paths)) {
            (Some(none), _) if none == rows => (None, Some(paths)),
            (Some(0), _) => (Some(bytes), None),
            (_, Some(none)) if none == rows => (Some(bytes), None),
            _ => (Some(bytes), Some(paths)),
        }
    }
}

/// The columns of a file by their role.
#[derive(Debug)]
struct Layout {
    images: Images,
    key: Option<String>,
    label: Option<LabelColumn>,
    /// A column that is named like a label column, but can't hold labels.
    unusable: Option<String>,
    candidates: Vec<String>,
}

/// Lists the contents of a file.
pub(super) async fn list(reader: &Reader, file: &File, options: &ListOptions<'_>) -> Result<Contents, DatasetError> {
    let (store, path) = reader.locate_file(&file.location).await?;
    let (parquet, _) = ParquetFile::find(&store, path).await?;
    let metadata = parquet.outside_metadata().await.map_err(|e| unreadable(file, e))?;
    let layout = Layout::of(&metadata, options).map_err(|problem| file.wrong(problem))?;
    let Contents { mut found, mut passed_over } = Contents::default();
    for (index, group) in metadata.metadata().row_groups().iter().enumerate() {
        let images = layout.images.in_group(group);
        if images.0.is_some() {
            check_chunk(&metadata, index, &layout).map_err(|problem| file.wrong(problem))?;
        }
        let columns = layout.read_columns(&images);
        let is_mixed = images.0.is_some() && images.1.is_some();
        let rows = Rows { file, layout: &layout, images, first: found.len() as u64 };
        if columns.is_empty() {
            found.extend((0..group.num_rows().max(0) as u64).map(|row| rows.unlabelled(row)));
            continue;
        }
        let mask = ProjectionMask::columns(metadata.parquet_schema(), columns.iter().map(String::as_str));
        let batches = ParquetRecordBatchStreamBuilder::new_with_metadata(parquet.clone(), metadata.clone());
        let batches = batches.with_row_groups(vec![index]).with_projection(mask);
        let batches = batches.with_batch_size(if is_mixed { BATCH_IMAGES } else { BATCH_ROWS }).build();
        let mut batches = batches.map_err(|e| unreadable(file, e))?;
        let mut in_group = 0;
        while let Some(batch) = batches.try_next().await.map_err(|e| unreadable(file, e))? {
            found.extend(rows.of_batch(&batch, in_group)?);
            in_group += batch.num_rows() as u64;
        }
    }
    if found.iter().any(|sample| sample.part.is_none()) {
        found = locate_all(reader, file, found, options.origins).await?;
    }
    if let Some(column) = layout.unusable {
        passed_over.add(Reason::LabelColumn(column), found.len() as u64, [file.key.clone()]);
    }
    Ok(Contents { found, passed_over })
}

/// Finds the files of the rows that have only a path.
async fn locate_all(
    reader: &Reader,
    file: &File,
    found: Vec<Found>,
    origins: &[Origin],
) -> Result<Vec<Found>, DatasetError> {
    let base = &Base::of(&Location::parse(&file.location)?);
    futures::stream::iter((0u64..).zip(found))
        .map(|(row, mut sample)| async move {
            if sample.part.is_none() {
                let wrong = |problem: String| file.wrong(format!("has a row {row} that can't be used: {problem}"));
                let image = base.locate(&sample.key, origins).map_err(wrong)?;
                (sample.location, sample.size, sample.etag) = find(reader, &sample.key, image).await.map_err(wrong)?;
            }
            Ok(sample)
        })
        .buffered(ASKED)
        .try_collect()
        .await
}

fn unreadable(file: &File, error: ParquetError) -> DatasetError {
    match store_error(error) {
        Ok(error) => error.into(),
        Err(error) => {
            file.wrong(format!("is not a Parquet file, or is damaged ({error}): fetch it again, or leave it out"))
        }
    }
}

/// The number of rows of a row group without a value in a column, according to its statistics.
fn nulls(group: &RowGroupMetaData, column: &str) -> Option<u64> {
    let chunk = group.columns().iter().find(|chunk| chunk.column_path().string() == column);
    chunk.and_then(|chunk| chunk.statistics()?.null_count_opt())
}

/// Refuses row groups where reading one image means reading a huge column chunk.
fn check_chunk(metadata: &ArrowReaderMetadata, group: usize, layout: &Layout) -> Result<(), String> {
    let Some(column) = layout.images.bytes() else { return Ok(()) };
    let chunks = metadata.metadata().row_group(group).columns();
    let Some(chunk) = chunks.iter().find(|chunk| chunk.column_path().string() == column) else { return Ok(()) };
    if chunk.compressed_size() <= LARGEST_CHUNK || chunk.offset_index_offset().is_some() {
        return Ok(());
    }
    Err(format!(
        "has row groups with {} MB of images and no page index, so reading one image would read a whole row group: \
         write it again with a page index (pyarrow: write_page_index=True) or smaller row groups (row_group_size=100)",
        chunk.compressed_size() >> 20
    ))
}

impl Layout {
    fn of(metadata: &ArrowReaderMetadata, options: &ListOptions<'_>) -> Result<Self, String> {
        let schema = metadata.schema();
        let images = images_of(schema, options.image_column)?;
        let has = |name: &str| schema.field_with_name(name).is_ok_and(|field| is_text(field.data_type()));
        let (label, unusable) = LabelColumn::of(metadata, options)?;
        let candidates: Vec<_> =
            options.candidates.iter().flat_map(|names| names.split(',')).map(|name| name.trim().to_owned()).collect();
        if let Some(missing) = candidates.iter().find(|name| schema.field_with_name(name).is_err()) {
            return Err(format!("has no column '{missing}', which --candidates names: {}", describe(schema)));
        }
        let key = (images.bytes().is_some() && has("key")).then(|| "key".to_owned());
        Ok(Self { images, key, label, unusable, candidates })
    }

    /// The columns to read to list the file.
    fn read_columns(&self, (bytes, paths): &(Option<String>, Option<String>)) -> Vec<String> {
        let label = self.label.as_ref().map(|label| label.name.as_str());
        // If all rows have bytes, the bytes are not read.
        let bytes = bytes.as_deref().filter(|_| paths.is_some());
        let named = [self.key.as_deref(), label, paths.as_deref(), bytes];
        let named = named.into_iter().flatten().map(str::to_owned);
        named.chain(self.candidates.iter().cloned()).collect()
    }
}

/// Finds the column with the images.
fn images_of(schema: &Schema, asked: Option<&str>) -> Result<Images, String> {
    if let Some(name) = asked {
        let field = schema.field_with_name(name);
        let field = field.map_err(|_| format!("has no column '{name}': {}", describe(schema)))?;
        return of_field(field).ok_or_else(|| {
            format!(
                "has a column '{name}' of type {}, which can't hold images: {}",
                field.data_type(),
                describe(schema)
            )
        });
    }
    let fields = schema.fields();
    let of_kind = |wanted: fn(&Images) -> bool| -> Vec<Images> {
        fields.iter().filter_map(|field| of_field(field)).filter(wanted).collect()
    };
    let structs = of_kind(|images| matches!(images, Images::Struct { .. }));
    let bytes = of_kind(|images| matches!(images, Images::Bytes(_)));
    for candidates in [structs, bytes] {
        let usual = IMAGE_COLUMNS.iter().find_map(|name| {
            candidates
                .iter()
                .find(|images| matches!(images, Images::Struct { name: n, .. } | Images::Bytes(n) if n == name))
        });
        match (usual, &candidates[..]) {
            (Some(images), _) | (None, [images]) => return Ok(images.clone()),
            (None, []) => {}
            (None, _) => {
                return Err(format!(
                    "has several columns that may hold images: say which with --image-column; {}",
                    describe(schema)
                ));
            }
        }
    }
    let paths = PATH_COLUMNS
        .iter()
        .find(|name| schema.field_with_name(name).is_ok_and(|field| *field.data_type() == DataType::Utf8));
    paths.map(|name| Images::Paths((*name).to_owned())).ok_or_else(|| {
        format!(
            "has no column of images: a struct with a field 'bytes', a column of bytes, or one of paths named {}; {}",
            PATH_COLUMNS.join(", "),
            describe(schema)
        )
    })
}

fn of_field(field: &Field) -> Option<Images> {
    let name = field.name().clone();
    match field.data_type() {
        DataType::Binary => Some(Images::Bytes(name)),
        DataType::Utf8 => Some(Images::Paths(name)),
        DataType::Struct(fields) => {
            let is = |name: &str, kind| fields.iter().any(|field| field.name() == name && *field.data_type() == kind);
            is("bytes", DataType::Binary).then(|| Images::Struct { name, has_path: is("path", DataType::Utf8) })
        }
        _ => None,
    }
}

fn is_text(kind: &DataType) -> bool {
    *kind == DataType::Utf8 || kind.is_integer()
}

fn describe(schema: &Schema) -> String {
    let columns: Vec<_> = schema
        .fields()
        .iter()
        .take(20)
        .map(|field| format!("{} ({})", field.name(), brief(field.data_type())))
        .collect();
    format!("its columns are {}", columns.join(", "))
}

fn brief(kind: &DataType) -> String {
    match kind {
        DataType::Struct(fields) => {
            let fields: Vec<_> = fields.iter().map(|field| field.name().as_str()).collect();
            format!("struct of {}", fields.join(", "))
        }
        DataType::Utf8 => "string".into(),
        other => other.to_string().to_ascii_lowercase(),
    }
}

/// The rows of a row group.
struct Rows<'a> {
    file: &'a File,
    layout: &'a Layout,
    /// The columns of bytes and of paths.
    images: (Option<String>, Option<String>),
    /// The number of the group's first row in the file.
    first: u64,
}

impl Rows<'_> {
    /// A sample for a row, without values from columns.
    fn unlabelled(&self, row: u64) -> Found {
        let row = self.first + row;
        let column = self.layout.images.bytes().unwrap_or_default();
        Found {
            key: format!("{}/{row:06}", self.file.key),
            location: self.file.location.clone(),
            part: Some(Part::Cell { row, column }),
            etag: self.file.etag.clone(),
            ..Found::default()
        }
    }

    fn of_batch(&self, batch: &RecordBatch, in_group: u64) -> Result<Vec<Found>, DatasetError> {
        let column = |name: &str| column_of(batch, name);
        let key = self.layout.key.as_deref().and_then(column);
        let label = self.layout.label.as_ref().and_then(|label| Some((label, column(&label.name)?)));
        let (bytes, paths) = (self.images.0.as_deref().and_then(column), self.images.1.as_deref().and_then(column));
        let candidates: Vec<_> = self.layout.candidates.iter().filter_map(|name| column(name)).collect();
        let row = |i: usize| {
            let mut found = self.unlabelled(in_group + i as u64);
            let number = self.first + in_group + i as u64;
            let wrong = |problem: String| self.file.wrong(format!("has a row {number} that can't be used: {problem}"));
            if let Some(key) = key.as_ref().and_then(|key| text(key, i)) {
                found.key = key;
            }
            let has_bytes = bytes.as_ref().is_some_and(|bytes| !bytes.is_null(i));
            if let Some(paths) = paths.as_ref().filter(|_| !has_bytes) {
                let path = text(paths, i).filter(|path| !path.is_empty());
                found.key = path.ok_or_else(|| wrong("it has neither an image nor a path to one".into()))?;
                found.part = None;
            }
            if !candidates.is_empty() {
                found.candidates = captions(&candidates, i);
                check_captions(&found.candidates).map_err(wrong)?;
            }
            let label =
                label.as_ref().map(|(kind, column)| kind.label(column, i)).transpose().map_err(wrong)?.flatten();
            let label = label.map(|label| caption_of(&found.candidates, label)).transpose();
            found.label = label.map_err(|label| {
                wrong(format!("its label '{label}' is none of its captions, nor the position of one"))
            })?;
            Ok(found)
        };
        (0..batch.num_rows()).map(row).collect()
    }
}

/// A column by its name; a dot precedes a struct's field.
fn column_of(batch: &RecordBatch, name: &str) -> Option<ArrayRef> {
    if let Some(column) = batch.column_by_name(name) {
        return Some(column.clone());
    }
    let (outer, inner) = name.split_once('.')?;
    let outer: &StructArray = batch.column_by_name(outer)?.as_struct_opt()?;
    outer.column_by_name(inner).cloned()
}

/// A row's captions: a list in one column, or one in each of several columns, where the last ones may be empty.
fn captions(columns: &[ArrayRef], row: usize) -> Vec<String> {
    if let [list] = columns
        && let Some(lists) = list.as_list_opt::<i32>()
    {
        let values = lists.value(row);
        let count = if lists.is_null(row) { 0 } else { values.len() };
        return (0..count).map(|i| text(&values, i).unwrap_or_default()).collect();
    }
    let mut captions: Vec<_> = columns.iter().map(|column| text(column, row).unwrap_or_default()).collect();
    let filled = captions.iter().rposition(|caption| !caption.is_empty()).map_or(0, |last| last + 1);
    captions.truncate(filled);
    captions
}

#[cfg(test)]
mod tests;
