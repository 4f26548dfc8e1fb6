//! Parts of a prediction. Code that scans every row of a large job reads only these parts, not a thousand scores per row.

use arrow_array::{Array, Float32Array, Int32Array, ListArray, StringArray, StructArray, UInt32Array, UInt64Array};

use elbo_core::ids::{ClassIndex, SampleId};
use elbo_core::prediction::{OK, Outcome, Prediction, QUARANTINED, UNCERTAIN};
use elbo_store::table::{Columns, Table, TableError, View};

use super::{Predictions, text};

/// The most classes in a [`Judgement`].
pub const BEST: usize = 5;

/// Whether a sample is quarantined, and its evaluations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Whether it is quarantined.
    pub quarantined: bool,
    /// The evaluations behind its scores.
    pub evaluations: u32,
}

/// The sample of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The sample.
    pub sample: SampleId,
    /// Its path relative to the source.
    pub key: String,
}

/// A prediction without its scores, for a report.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// The sample's path relative to the source.
    pub key: String,
    /// The label from the dataset.
    pub label: Option<String>,
    /// The evaluations behind its scores.
    pub evaluations: u32,
    /// The best class, or the reason why there is none.
    pub best_class: Result<BestClass, String>,
}

/// The best class of a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct BestClass {
    /// The class.
    pub class: ClassIndex,
    /// Whether its confidence is high enough to be the sample's class.
    pub is_sure: bool,
    /// The second-best class's mean error minus the best one's.
    pub margin: Option<f32>,
    /// The best classes, at most [`BEST`], best first.
    pub best: Vec<ClassIndex>,
}

impl From<&Prediction> for Judgement {
    fn from(row: &Prediction) -> Self {
        let best = row.scores().iter().take(BEST).map(|score| score.class).collect::<Vec<_>>();
        let (class, is_sure) = match &row.outcome {
            Outcome::Labelled(labelled) => (Some(labelled.class), true),
            Outcome::Uncertain(_) => (best.first().copied(), false),
            Outcome::Quarantined { .. } => (None, false),
        };
        let best_class = match class {
            Some(class) => Ok(BestClass { class, is_sure, margin: row.margin(), best }),
            None => Err(row.error().unwrap_or_default().to_owned()),
        };
        Self { key: row.key.clone(), label: row.label.clone(), evaluations: row.evaluations, best_class }
    }
}

impl View for Tally {
    type Row = Self;

    const TABLE: &'static str = Predictions::NAME;
    const COLUMNS: &'static [&'static str] = &["status", "evaluations"];

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let evaluations: &UInt32Array = columns.required("evaluations")?;
        for i in 0..columns.rows() {
            let quarantined = status(columns, i)? == Status::Quarantined;
            rows.push(Self { quarantined, evaluations: evaluations.value(i) });
        }
        Ok(())
    }
}

impl View for Named {
    type Row = Self;

    const TABLE: &'static str = Predictions::NAME;
    const COLUMNS: &'static [&'static str] = &["sample_id", "key"];

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        rows.extend(
            (0..columns.rows()).map(|i| Self { sample: SampleId(sample.value(i)), key: key.value(i).to_owned() }),
        );
        Ok(())
    }
}

impl View for Judgement {
    type Row = Self;

    const TABLE: &'static str = Predictions::NAME;
    const COLUMNS: &'static [&'static str] = &[
        "key",
        "label",
        "predicted_index",
        "margin",
        "evaluations",
        "status",
        "error",
        "scores.list.element.class_index",
    ];

    fn read(columns: &Columns<'_>, rows: &mut Vec<Self>) -> Result<(), TableError> {
        let key: &StringArray = columns.required("key")?;
        let label: &StringArray = columns.nullable("label")?;
        let class: &Int32Array = columns.nullable("predicted_index")?;
        let margin: &Float32Array = columns.nullable("margin")?;
        let evaluations: &UInt32Array = columns.required("evaluations")?;
        let error: &StringArray = columns.nullable("error")?;
        let lists: &ListArray = columns.required("scores")?;
        let scores: &StructArray = columns.inner("scores", lists.values())?;
        let of_class =
            scores.column_by_name("class_index").ok_or_else(|| columns.wrong("scores", "has no field class_index"))?;
        let scored: &Int32Array = columns.inner("scores", of_class)?;
        for (i, bounds) in lists.value_offsets().windows(2).enumerate() {
            let best = (bounds[0]..bounds[1]).take(BEST).map(|at| ClassIndex(scored.value(at as usize)));
            let best: Vec<_> = best.collect();
            let status = status(columns, i)?;
            let class = match status {
                Status::Ok => class.is_valid(i).then(|| ClassIndex(class.value(i))),
                Status::Uncertain | Status::Quarantined => best.first().copied(),
            };
            let margin = margin.is_valid(i).then(|| margin.value(i));
            let best_class = match (status, class) {
                (Status::Quarantined, _) => Err(text(error, i).unwrap_or_default()),
                (_, Some(class)) => Ok(BestClass { class, is_sure: status == Status::Ok, margin, best }),
                (_, None) => {
                    return Err(columns.wrong("predicted_index", format!("is null in row {i}, which was scored")));
                }
            };
            rows.push(Self {
                key: key.value(i).to_owned(),
                label: text(label, i),
                evaluations: evaluations.value(i),
                best_class,
            });
        }
        Ok(())
    }
}

/// The outcome for a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Uncertain,
    Quarantined,
}

/// The status of a row.
pub(super) fn status(columns: &Columns<'_>, row: usize) -> Result<Status, TableError> {
    match columns.required::<StringArray>("status")?.value(row) {
        OK => Ok(Status::Ok),
        UNCERTAIN => Ok(Status::Uncertain),
        QUARANTINED => Ok(Status::Quarantined),
        other => Err(columns.wrong("status", format!("is '{other}' in row {row}"))),
    }
}
