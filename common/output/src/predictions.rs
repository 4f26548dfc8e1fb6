//! The results of a job as Parquet: predictions, the errors of every evaluation, and quarantined samples.
//!
//! The columns are a contract with other programs. Columns that every row has are required. The fields nested in `scores` are
//! declared nullable, as pyarrow itself does, because some readers refuse to cast a required nested field.

use std::sync::Arc;

use arrow_array::builder::OffsetBufferBuilder;
use arrow_array::{
    Array, ArrayRef, Float32Array, Int32Array, ListArray, StringArray, StructArray, UInt16Array, UInt32Array,
    UInt64Array,
};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use parquet::errors::ParquetError;

use elbo_core::failure::{FailureStage, UnknownStage};
use elbo_core::ids::{ClassIndex, PromptIndex, Round, SampleId};
use elbo_core::prediction::{Labelled, Outcome, Prediction, Score, Uncertain};
use elbo_store::table::{self, Columns, Table, TableError};

mod view;

pub use view::{BEST, BestClass, Judgement, Named, Tally};

use view::Status;

/// Rows per row group of the errors table, and scores per row group of the predictions, so that a reader holds some tens of
/// megabytes.
const ITEMS_PER_GROUP: usize = 1 << 20;

/// The error of one evaluation (`--write-errors`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorRow {
    /// The sample.
    pub sample: SampleId,
    /// The prompt's class.
    pub class: ClassIndex,
    /// The prompt.
    pub prompt: PromptIndex,
    /// The training timestep.
    pub timestep: u32,
    /// The noise index.
    pub noise: u32,
    /// The error under the job's loss.
    pub error: f32,
}

/// A sample that could not be evaluated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The stage at which it failed.
    pub stage: FailureStage,
    /// The error message.
    pub error: String,
    /// How many times it was tried.
    pub attempts: u32,
}

/// Encodes the predictions of a shard as Parquet, with `meta` as the file's key-value metadata. Usually one row group.
pub fn encode_predictions(rows: &[Prediction], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    let scores = rows.iter().map(|row| row.scores().len()).max().unwrap_or_default();
    table::encode::<Predictions>(rows, rows.len().min(ITEMS_PER_GROUP / scores.max(1)), meta)
}

/// Decodes the predictions of a Parquet file.
pub fn decode_predictions(bytes: Bytes) -> Result<Vec<Prediction>, TableError> {
    table::decode::<Predictions>(bytes)
}

/// Encodes the errors of evaluations as Parquet, with `meta` as the file's key-value metadata.
pub fn encode_errors(rows: &[ErrorRow], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    table::encode::<Errors>(rows, ITEMS_PER_GROUP, meta)
}

/// Decodes the errors of a Parquet file.
pub fn decode_errors(bytes: Bytes) -> Result<Vec<ErrorRow>, TableError> {
    table::decode::<Errors>(bytes)
}

/// Encodes quarantined samples as Parquet, with `meta` as the file's key-value metadata.
pub fn encode_quarantine(rows: &[Quarantined], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    table::encode::<Quarantine>(rows, rows.len(), meta)
}

/// Decodes the quarantined samples of a Parquet file.
pub fn decode_quarantine(bytes: Bytes) -> Result<Vec<Quarantined>, TableError> {
    table::decode::<Quarantine>(bytes)
}

/// The table of a shard's predictions.
#[derive(Debug)]
pub(crate) struct Predictions;

impl Table for Predictions {
    type Row = Prediction;

    const NAME: &'static str = "predictions";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("key", DataType::Utf8, false),
            Field::new("label", DataType::Utf8, true),
            Field::new("predicted_class", DataType::Utf8, true),
            Field::new("predicted_index", DataType::Int32, true),
            Field::new("confidence", DataType::Float32, true),
            Field::new("margin", DataType::Float32, true),
            Field::new("evaluations", DataType::UInt32, false),
            Field::new("status", DataType::Utf8, false),
            Field::new("error", DataType::Utf8, true),
            Field::new_list("scores", score_item(), false),
        ])
    }

    fn columns(rows: &[Prediction]) -> Result<Vec<ArrayRef>, ParquetError> {
        let labelled = || rows.iter().map(Prediction::labelled);
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.label.as_ref()))),
            Arc::new(StringArray::from_iter(labelled().map(|l| l.map(|l| &l.class_name)))),
            Arc::new(Int32Array::from_iter(labelled().map(|l| l.map(|l| l.class.0)))),
            Arc::new(Float32Array::from_iter(rows.iter().map(Prediction::confidence))),
            Arc::new(Float32Array::from_iter(rows.iter().map(Prediction::margin))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.evaluations))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(Prediction::status))),
            Arc::new(StringArray::from_iter(rows.iter().map(Prediction::error))),
            Arc::new(score_lists(rows)?),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Prediction>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let label: &StringArray = columns.nullable("label")?;
        let class_name: &StringArray = columns.nullable("predicted_class")?;
        let class: &Int32Array = columns.nullable("predicted_index")?;
        let confidence: &Float32Array = columns.nullable("confidence")?;
        let margin: &Float32Array = columns.nullable("margin")?;
        let evaluations: &UInt32Array = columns.required("evaluations")?;
        let error: &StringArray = columns.nullable("error")?;
        let scores: &ListArray = columns.required("scores")?;
        for i in 0..columns.rows() {
            let margin = margin.is_valid(i).then(|| margin.value(i));
            let outcome = match view::status(columns, i)? {
                Status::Quarantined => Outcome::Quarantined { error: text(error, i).unwrap_or_default() },
                Status::Ok if class.is_null(i) || class_name.is_null(i) => {
                    return Err(columns.wrong("predicted_index", format!("is null in row {i}, whose status is ok")));
                }
                Status::Ok => Outcome::Labelled(Labelled {
                    class: ClassIndex(class.value(i)),
                    class_name: class_name.value(i).to_owned(),
                    confidence: confidence.is_valid(i).then(|| confidence.value(i)),
                    margin,
                    scores: read_scores(columns, &scores.value(i))?,
                }),
                Status::Uncertain if confidence.is_null(i) => {
                    return Err(columns.wrong("confidence", format!("is null in row {i}, whose status is uncertain")));
                }
                Status::Uncertain => Outcome::Uncertain(Uncertain {
                    confidence: confidence.value(i),
                    margin,
                    scores: read_scores(columns, &scores.value(i))?,
                }),
            };
            rows.push(Prediction {
                sample: SampleId(sample.value(i)),
                key: key.value(i).to_owned(),
                label: text(label, i),
                evaluations: evaluations.value(i),
                outcome,
            });
        }
        Ok(())
    }
}

pub(crate) fn text(column: &StringArray, row: usize) -> Option<String> {
    column.is_valid(row).then(|| column.value(row).to_owned())
}

fn score_fields() -> Fields {
    Fields::from(vec![
        Field::new("class_index", DataType::Int32, true),
        Field::new("mean_error", DataType::Float32, true),
        Field::new("std_error", DataType::Float32, true),
        Field::new("n", DataType::UInt32, true),
        Field::new("round", DataType::UInt16, true),
    ])
}

/// The item of the list; `element` is its name in the Parquet specification.
fn score_item() -> Field {
    Field::new_struct("element", score_fields(), true)
}

fn score_lists(rows: &[Prediction]) -> Result<ListArray, ParquetError> {
    let mut offsets = OffsetBufferBuilder::<i32>::new(rows.len());
    let mut scores = Vec::new();
    for row in rows {
        offsets.push_length(row.scores().len());
        scores.extend_from_slice(row.scores());
    }
    let offsets = offsets.try_finish().map_err(|e| ParquetError::External(e.into()))?;
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from_iter_values(scores.iter().map(|s| s.class.0))),
        Arc::new(Float32Array::from_iter_values(scores.iter().map(|s| s.mean_error))),
        Arc::new(Float32Array::from_iter(scores.iter().map(|s| s.std_error))),
        Arc::new(UInt32Array::from_iter_values(scores.iter().map(|s| s.n))),
        Arc::new(UInt16Array::from_iter_values(scores.iter().map(|s| s.round.0))),
    ];
    let values = StructArray::try_new(score_fields(), columns, None)?;
    Ok(ListArray::try_new(Arc::new(score_item()), offsets, Arc::new(values), None)?)
}

fn read_scores(columns: &Columns<'_>, list: &ArrayRef) -> Result<Vec<Score>, TableError> {
    let scores: &StructArray = columns.inner("scores", list)?;
    let field =
        |name| scores.column_by_name(name).ok_or_else(|| columns.wrong("scores", format!("has no field {name}")));
    let class: &Int32Array = columns.inner("scores", field("class_index")?)?;
    let mean_error: &Float32Array = columns.inner("scores", field("mean_error")?)?;
    let std_error: &Float32Array = columns.typed("scores", field("std_error")?)?;
    let n: &UInt32Array = columns.inner("scores", field("n")?)?;
    let round: &UInt16Array = columns.inner("scores", field("round")?)?;
    let score = |i| Score {
        class: ClassIndex(class.value(i)),
        mean_error: mean_error.value(i),
        std_error: std_error.is_valid(i).then(|| std_error.value(i)),
        n: n.value(i),
        round: Round(round.value(i)),
    };
    Ok((0..scores.len()).map(score).collect())
}

/// The table of a shard's errors.
#[derive(Debug)]
pub(crate) struct Errors;

impl Table for Errors {
    type Row = ErrorRow;

    const NAME: &'static str = "errors";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("class_index", DataType::Int32, false),
            Field::new("prompt_index", DataType::UInt32, false),
            Field::new("timestep", DataType::UInt32, false),
            Field::new("noise_index", DataType::UInt32, false),
            Field::new("error", DataType::Float32, false),
        ])
    }

    fn columns(rows: &[ErrorRow]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.class.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.prompt.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.timestep))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.noise))),
            Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.error))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<ErrorRow>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let class: &Int32Array = columns.required("class_index")?;
        let prompt: &UInt32Array = columns.required("prompt_index")?;
        let timestep: &UInt32Array = columns.required("timestep")?;
        let noise: &UInt32Array = columns.required("noise_index")?;
        let error: &Float32Array = columns.required("error")?;
        rows.extend((0..columns.rows()).map(|i| ErrorRow {
            sample: SampleId(sample.value(i)),
            class: ClassIndex(class.value(i)),
            prompt: PromptIndex(prompt.value(i)),
            timestep: timestep.value(i),
            noise: noise.value(i),
            error: error.value(i),
        }));
        Ok(())
    }
}

/// The table of a shard's quarantined samples.
#[derive(Debug)]
pub(crate) struct Quarantine;

impl Table for Quarantine {
    type Row = Quarantined;

    const NAME: &'static str = "quarantined samples";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("key", DataType::Utf8, false),
            Field::new("stage", DataType::Utf8, false),
            Field::new("error", DataType::Utf8, false),
            Field::new("attempts", DataType::UInt32, false),
        ])
    }

    fn columns(rows: &[Quarantined]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| r.stage.name()))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.error))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.attempts))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Quarantined>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let stage: &StringArray = columns.required("stage")?;
        let error: &StringArray = columns.required("error")?;
        let attempts: &UInt32Array = columns.required("attempts")?;
        for i in 0..columns.rows() {
            let wrong = |error: UnknownStage| TableError::Rows { table: Self::NAME, problem: error.to_string() };
            rows.push(Quarantined {
                sample: SampleId(sample.value(i)),
                key: key.value(i).to_owned(),
                stage: stage.value(i).parse().map_err(wrong)?,
                error: error.value(i).to_owned(),
                attempts: attempts.value(i),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
