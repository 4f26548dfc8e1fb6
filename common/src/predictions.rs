//! What a job says of every sample, as rows and as Parquet: predictions, single errors, quarantine.
//!
//! The columns are a contract with other programs. Columns that every row has are required; the fields nested in `scores`
//! are declared nullable, as pyarrow itself declares them, since some readers refuse to cast a required nested field.

use std::sync::Arc;

use arrow_array::builder::OffsetBufferBuilder;
use arrow_array::{
    Array, ArrayRef, Float32Array, Int32Array, ListArray, StringArray, StructArray, UInt16Array, UInt32Array,
    UInt64Array,
};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use parquet::errors::ParquetError;

use crate::ids::{ClassIndex, PromptIndex, Round, SampleId};
use crate::table::{self, Columns, Row, TableError};

mod view;

pub use view::{BEST, Judgement, Named, Tally, Verdict};

/// Rows in a row group of the errors table, and scores in one of the predictions: a reader holds some tens of megabytes.
const ITEMS_PER_GROUP: usize = 1 << 20;

pub(crate) const OK: &str = "ok";
pub(crate) const QUARANTINED: &str = "quarantined";

/// What the job says of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// The label the dataset brings.
    pub label: Option<String>,
    /// The evaluations its scores rest on.
    pub evaluations: u32,
    /// A class, or the reason why there is none.
    pub outcome: Outcome,
}

/// How a sample ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has a class (status `ok`).
    Labelled(Labelled),
    /// It could not be evaluated (status `quarantined`).
    Quarantined {
        /// Why not.
        error: String,
    },
}

/// The class of a sample and what speaks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The class with the lowest mean error.
    pub class: ClassIndex,
    /// Its name.
    pub class_name: String,
    /// Confidence in the class, in [0, 1].
    pub confidence: Option<f32>,
    /// The mean error of the second-best class less that of the best; none where there is one class.
    pub margin: Option<f32>,
    /// Every scored class, best first.
    pub scores: Vec<Score>,
}

/// The score of one class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The class.
    pub class: ClassIndex,
    /// The mean of its errors.
    pub mean_error: f32,
    /// The standard error of that mean; none below two errors.
    pub std_error: Option<f32>,
    /// How many errors it is the mean of.
    pub n: u32,
    /// The last round in which the class was evaluated.
    pub round: Round,
}

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
    /// The error, by the job's loss.
    pub error: f32,
}

/// A sample that could not be evaluated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
    /// What was being done: `read`, `decode`, `preprocess`, `encode`, `evaluate`.
    pub stage: String,
    /// What went wrong.
    pub error: String,
    /// How often it was tried.
    pub attempts: u32,
}

impl Prediction {
    /// The class and its scores, where there are any.
    pub fn labelled(&self) -> Option<&Labelled> {
        match &self.outcome {
            Outcome::Labelled(labelled) => Some(labelled),
            Outcome::Quarantined { .. } => None,
        }
    }

    /// The scored classes, best first; none where there is no class.
    pub fn scores(&self) -> &[Score] {
        self.labelled().map_or(&[], |labelled| &labelled.scores)
    }

    /// Why there is no class, where there is none.
    pub fn error(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Labelled(_) => None,
            Outcome::Quarantined { error } => Some(error),
        }
    }
}

/// The predictions of a shard as Parquet, with `meta` as the file's key-value metadata. Usually one row group.
pub fn encode_predictions(rows: &[Prediction], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    let scores = rows.iter().map(|row| row.scores().len()).max().unwrap_or_default();
    table::encode(rows, rows.len().min(ITEMS_PER_GROUP / scores.max(1)), meta)
}

/// The predictions of a Parquet file.
pub fn decode_predictions(bytes: Bytes) -> Result<Vec<Prediction>, TableError> {
    table::decode(bytes)
}

/// Single evaluations' errors as Parquet, with `meta` as the file's key-value metadata.
pub fn encode_errors(rows: &[ErrorRow], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    table::encode(rows, ITEMS_PER_GROUP, meta)
}

/// The single errors of a Parquet file.
pub fn decode_errors(bytes: Bytes) -> Result<Vec<ErrorRow>, TableError> {
    table::decode(bytes)
}

/// Quarantined samples as Parquet, with `meta` as the file's key-value metadata.
pub fn encode_quarantine(rows: &[Quarantined], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    table::encode(rows, rows.len(), meta)
}

/// The quarantined samples of a Parquet file.
pub fn decode_quarantine(bytes: Bytes) -> Result<Vec<Quarantined>, TableError> {
    table::decode(bytes)
}

impl Row for Prediction {
    const TABLE: &'static str = "predictions";

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

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>, ParquetError> {
        let status = |row: &Self| if row.labelled().is_some() { OK } else { QUARANTINED };
        let labelled = || rows.iter().map(Self::labelled);
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.label.as_ref()))),
            Arc::new(StringArray::from_iter(labelled().map(|l| l.map(|l| &l.class_name)))),
            Arc::new(Int32Array::from_iter(labelled().map(|l| l.map(|l| l.class.0)))),
            Arc::new(Float32Array::from_iter(labelled().map(|l| l.and_then(|l| l.confidence)))),
            Arc::new(Float32Array::from_iter(labelled().map(|l| l.and_then(|l| l.margin)))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.evaluations))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(status))),
            Arc::new(StringArray::from_iter(rows.iter().map(Self::error))),
            Arc::new(score_lists(rows)?),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
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
        for i in 0..columns.len() {
            let outcome = if view::is_quarantined(columns, i)? {
                Outcome::Quarantined { error: text(error, i).unwrap_or_default() }
            } else if class.is_null(i) || class_name.is_null(i) {
                return Err(columns.wrong("predicted_index", format!("is null in row {i}, whose status is ok")));
            } else {
                Outcome::Labelled(Labelled {
                    class: ClassIndex(class.value(i)),
                    class_name: class_name.value(i).to_owned(),
                    confidence: confidence.is_valid(i).then(|| confidence.value(i)),
                    margin: margin.is_valid(i).then(|| margin.value(i)),
                    scores: read_scores(columns, &scores.value(i))?,
                })
            };
            rows.push(Self {
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

/// The list's item; `element` is the name the Parquet specification gives it.
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

impl Row for ErrorRow {
    const TABLE: &'static str = "errors";

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

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.class.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.prompt.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.timestep))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.noise))),
            Arc::new(Float32Array::from_iter_values(rows.iter().map(|r| r.error))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let class: &Int32Array = columns.required("class_index")?;
        let prompt: &UInt32Array = columns.required("prompt_index")?;
        let timestep: &UInt32Array = columns.required("timestep")?;
        let noise: &UInt32Array = columns.required("noise_index")?;
        let error: &Float32Array = columns.required("error")?;
        rows.extend((0..columns.len()).map(|i| Self {
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

impl Row for Quarantined {
    const TABLE: &'static str = "quarantined samples";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("key", DataType::Utf8, false),
            Field::new("stage", DataType::Utf8, false),
            Field::new("error", DataType::Utf8, false),
            Field::new("attempts", DataType::UInt32, false),
        ])
    }

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.stage))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.error))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.attempts))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let stage: &StringArray = columns.required("stage")?;
        let error: &StringArray = columns.required("error")?;
        let attempts: &UInt32Array = columns.required("attempts")?;
        rows.extend((0..columns.len()).map(|i| Self {
            sample: SampleId(sample.value(i)),
            key: key.value(i).to_owned(),
            stage: stage.value(i).to_owned(),
            error: error.value(i).to_owned(),
            attempts: attempts.value(i),
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Prediction> {
        let score = |class, std_error| Score {
            class: ClassIndex(class),
            mean_error: 0.25 + class as f32,
            std_error,
            n: 20,
            round: Round(1),
        };
        let labelled = Outcome::Labelled(Labelled {
            class: ClassIndex(7),
            class_name: "cat".into(),
            confidence: Some(0.9),
            margin: None,
            scores: vec![score(7, Some(0.01)), score(2, None)],
        });
        let row = |sample, key: &str, label: Option<&str>, outcome| Prediction {
            sample: SampleId(sample),
            key: key.into(),
            label: label.map(str::to_owned),
            evaluations: 40,
            outcome,
        };
        vec![
            row(0, "cat/0.png", Some("cat"), labelled.clone()),
            row(1, "bad.png", None, Outcome::Quarantined { error: "decoding: not an image".into() }),
            row(2, "ö/ü.png", None, labelled),
        ]
    }

    #[test]
    fn predictions_survive_parquet_and_their_bytes_depend_on_the_rows_alone() {
        let meta = [("fingerprint".to_owned(), "abc".to_owned())];
        let bytes = encode_predictions(&rows(), &meta).unwrap();
        assert_eq!(bytes, encode_predictions(&rows(), &meta).unwrap());
        assert_eq!(decode_predictions(bytes).unwrap(), rows());
    }

    #[test]
    fn metadata_is_the_files_own() {
        let meta = [("fingerprint".to_owned(), "abc".to_owned())];
        let bytes = encode_predictions(&rows(), &meta).unwrap();
        let metadata = table::metadata::<Prediction>(&bytes).unwrap();
        let pairs = metadata.metadata().file_metadata().key_value_metadata().unwrap();
        assert!(pairs.iter().any(|kv| kv.key == "fingerprint" && kv.value.as_deref() == Some("abc")));
    }

    #[test]
    fn readers_can_skip_by_every_column_and_large_files_have_several_row_groups() {
        let scores =
            vec![Score { class: ClassIndex(2), mean_error: 0.5, std_error: None, n: 1, round: Round(0) }; 1000];
        let rows: Vec<_> = (0..2000)
            .map(|i| Prediction {
                sample: SampleId(i),
                key: format!("{i:05}.png"),
                outcome: Outcome::Labelled(Labelled {
                    class: ClassIndex(i as i32 / 1000),
                    class_name: "cat".into(),
                    confidence: None,
                    margin: Some(0.5),
                    scores: scores.clone(),
                }),
                ..rows()[0].clone()
            })
            .collect();
        let metadata = table::metadata::<Prediction>(&encode_predictions(&rows, &[]).unwrap()).unwrap();
        let groups = metadata.metadata().row_groups();
        assert_eq!(groups.iter().map(|group| group.num_rows()).collect::<Vec<_>>(), [1048, 952]);
        let bounds = |group: usize, name: &str| {
            let columns = groups[group].columns().iter();
            let column = columns.clone().find(|column| column.column_path().string() == name).unwrap();
            let statistics = column.statistics().unwrap();
            (statistics.min_bytes_opt().unwrap().to_vec(), statistics.max_bytes_opt().unwrap().to_vec())
        };
        let numbers = |from: u64, to: u64| (from.to_le_bytes().to_vec(), to.to_le_bytes().to_vec());
        assert_eq!(bounds(1, "sample_id"), numbers(1048, 1999));
        assert_eq!(bounds(1, "predicted_index"), (1i32.to_le_bytes().to_vec(), 1i32.to_le_bytes().to_vec()));
        assert_eq!(bounds(0, "key"), (b"00000.png".to_vec(), b"01047.png".to_vec()));
        for name in ["margin", "status", "scores.list.element.class_index", "scores.list.element.mean_error"] {
            bounds(0, name);
        }
        assert_eq!(groups[0].sorting_columns().unwrap()[0].column_idx, 0);
        assert!(groups[0].columns().iter().all(|c| matches!(c.compression(), parquet::basic::Compression::ZSTD(_))));
    }

    #[test]
    fn no_rows_are_a_table_too() {
        assert_eq!(decode_predictions(encode_predictions(&[], &[]).unwrap()).unwrap(), []);
        assert_eq!(decode_errors(encode_errors(&[], &[]).unwrap()).unwrap(), []);
        assert_eq!(decode_quarantine(encode_quarantine(&[], &[]).unwrap()).unwrap(), []);
    }

    #[test]
    fn errors_and_quarantine_survive_parquet() {
        let errors: Vec<_> = (0..3000u32)
            .map(|i| ErrorRow {
                sample: SampleId(u64::from(i) / 10),
                class: ClassIndex(-1),
                prompt: PromptIndex(i % 10),
                timestep: 999 - i % 1000,
                noise: i,
                error: i as f32 / 7.0,
            })
            .collect();
        assert_eq!(decode_errors(encode_errors(&errors, &[]).unwrap()).unwrap(), errors);
        let quarantined = vec![Quarantined {
            sample: SampleId(9),
            key: "a.png".into(),
            stage: "decode".into(),
            error: "truncated".into(),
            attempts: 3,
        }];
        assert_eq!(decode_quarantine(encode_quarantine(&quarantined, &[]).unwrap()).unwrap(), quarantined);
    }

    #[test]
    fn other_files_are_refused_with_the_column_that_differs() {
        let not_parquet = decode_predictions(Bytes::from_static(b"hello")).unwrap_err().to_string();
        assert!(not_parquet.contains("reading the predictions") && not_parquet.contains("delete it"), "{not_parquet}");
        let other = decode_quarantine(
            encode_errors(
                &[ErrorRow {
                    sample: SampleId(0),
                    class: ClassIndex(0),
                    prompt: PromptIndex(0),
                    timestep: 0,
                    noise: 0,
                    error: 0.0,
                }],
                &[],
            )
            .unwrap(),
        );
        assert!(other.unwrap_err().to_string().contains("column 'key' is missing"));
    }
}
