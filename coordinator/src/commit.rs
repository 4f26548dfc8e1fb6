//! Writing a finished shard: final sums become Parquet files at fixed paths.
//!
//! The content is a pure function of the job, so it is harmless to write a shard twice, as after a crash between the put
//! and the ledger's mark.

use std::collections::BTreeMap;

use bytes::Bytes;
use elbo_core::audit::Audited;
use elbo_core::class::Classes;
use elbo_core::ensemble::Contenders;
use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::ids::{SampleId, ShardId};
use elbo_core::policy::Slot;
use elbo_core::prediction::{Labelled, Outcome, Prediction, Score};
use elbo_core::ranking::{ContenderScore, ScoredPrompt};
use elbo_core::sample::Sample;
use elbo_output::layout;
use elbo_output::predictions::{self, ErrorRow, Quarantined};
use elbo_output::record::{FINGERPRINT, JobRecord};
use elbo_store::table::{TableError, note_of};
use elbo_store::{Store, StoreError};
use object_store::path::Path;

use crate::scheduler::{Finished, SampleOutcome, SlotError};

/// A finished shard that is to be written.
#[derive(Debug)]
pub struct Finishing {
    /// The shard.
    pub shard: ShardId,
    /// Its samples.
    pub manifest: Vec<Sample>,
    /// Their outcomes, in the same order.
    pub outcomes: Vec<Finished>,
    /// The rows of samples that ended before the shard was reopened.
    pub kept: Kept,
}

/// The rows that an earlier commit of a shard wrote for its sound samples.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    rows: BTreeMap<SampleId, Prediction>,
    audited: BTreeMap<SampleId, Audited>,
    errors: BTreeMap<SampleId, Vec<ErrorRow>>,
}

/// An earlier commit that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The output can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One of its files is damaged.
    #[error("{0}; or compute the whole shard again with --recompute {1}")]
    Table(TableError, ShardId),
    /// One of its files belongs to another job.
    #[error(transparent)]
    Foreign(#[from] Foreign),
}

/// A file that another job wrote.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} was written by another job, with the fingerprint {fingerprint}, and is not overwritten: move it away, then \
     run the same command again to compute its shard"
)]
pub struct Foreign {
    path: Path,
    fingerprint: String,
}

impl Foreign {
    /// Refuses a file with another job's fingerprint.
    pub(crate) fn check(path: &Path, bytes: &Bytes, job: &JobRecord) -> Result<(), Self> {
        match note_of(bytes, FINGERPRINT) {
            Some(other) if other != job.fingerprint => Err(Self { path: path.clone(), fingerprint: other }),
            _ => Ok(()),
        }
    }
}

impl Kept {
    /// Reads the files of a job's shard; empty if it was never committed.
    pub async fn read(out: &Store, shard: ShardId, job: &JobRecord) -> Result<Self, KeptError> {
        let mut kept = Self::default();
        let damaged = |source| KeptError::Table(source, shard);
        let read = async |path: Path| {
            let bytes = out.read(&path).await?;
            bytes.iter().try_for_each(|bytes| Foreign::check(&path, bytes, job))?;
            Ok::<_, KeptError>(bytes)
        };
        if let Some(bytes) = read(layout::predictions(shard)).await? {
            let rows = predictions::decode_predictions(bytes).map_err(damaged)?;
            kept.rows = rows.into_iter().filter(|row| row.error().is_none()).map(|row| (row.sample, row)).collect();
        }
        if let Some(bytes) = read(layout::audit(shard)).await? {
            kept.audited =
                elbo_output::audit::decode(bytes).map_err(damaged)?.into_iter().map(|row| (row.sample, row)).collect();
        }
        if let Some(bytes) = read(layout::errors(shard)).await? {
            for row in predictions::decode_errors(bytes).map_err(damaged)? {
                kept.errors.entry(row.sample).or_default().push(row);
            }
        }
        Ok(kept)
    }

    /// The samples, with the evaluations that each took.
    pub fn evaluations(&self) -> Vec<(SampleId, u64)> {
        self.rows.iter().map(|(sample, row)| (*sample, u64::from(row.evaluations))).collect()
    }
}

/// How often a sample is tried before it is given up, by the stage of the failure.
fn attempts(stage: FailureStage) -> u32 {
    match stage {
        FailureStage::Unread | FailureStage::Evaluate => 2,
        FailureStage::Read | FailureStage::Decode | FailureStage::Preprocess | FailureStage::Encode => 1,
    }
}

/// The files of a finished shard. Predictions come last, so that all other files exist once they do. If there was a
/// quarantine before (`had_quarantine`) and it is now empty, it is written without rows: a deletion that arrives late could
/// hit the quarantine of another coordinator.
pub fn files(
    finishing: &Finishing,
    had_quarantine: bool,
    job: &JobRecord,
    slots: &[Slot],
) -> Result<Vec<(Path, Bytes)>, TableError> {
    let spec = &job.identity.spec;
    let of_job = job_metadata(job);
    let with_classes = [&of_job[..], &score_metadata(job)[..]].concat();
    let contenders = spec.contenders();
    let (mut rows, mut quarantined, mut errors, mut audited) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let kept = &finishing.kept;
    for (sample, finished) in finishing.manifest.iter().zip(&finishing.outcomes) {
        rows.push(match &finished.outcome {
            SampleOutcome::Kept => {
                errors.extend(kept.errors.get(&sample.id).into_iter().flatten().copied());
                audited.extend(kept.audited.get(&sample.id).cloned());
                let gone = || TableError::Rows {
                    table: "predictions",
                    problem: format!("the row of {} was there when the shard was opened and is gone now", sample.key),
                };
                kept.rows.get(&sample.id).cloned().ok_or_else(gone)?
            }
            SampleOutcome::Scored { prompts, errors: single, audit } => {
                let classes = sample.classes(&spec.classes);
                let contenders = contenders.clone().unwrap_or_else(|| Contenders::prompts(prompts.len()));
                errors.extend(single.iter().map(|e| error_row(sample, e, &classes, slots)));
                let unscored = || TableError::Rows {
                    table: "predictions",
                    problem: format!("{} ended without a single evaluation, which is a defect", sample.key),
                };
                let row = scored(sample, prompts, &classes, &contenders, spec.top_k).ok_or_else(unscored)?;
                if let (Some(audit), Some(labelled)) = (audit, row.labelled()) {
                    audited.push(audited_row(&row, labelled, audit, &classes, &contenders));
                }
                row
            }
            SampleOutcome::Quarantined(failure) => {
                quarantined.push(quarantine_row(sample, failure));
                given_up(sample, failure)
            }
        });
    }
    let mut files = Vec::new();
    if spec.write_errors {
        files.push((layout::errors(finishing.shard), predictions::encode_errors(&errors, &with_classes)?));
    }
    if spec.audit.is_some() {
        files.push((layout::audit(finishing.shard), elbo_output::audit::encode(&audited, &with_classes)?));
    }
    if !quarantined.is_empty() || had_quarantine {
        files.push((layout::quarantine(finishing.shard), predictions::encode_quarantine(&quarantined, &of_job)?));
    }
    files.push((layout::predictions(finishing.shard), predictions_file(&rows, job)?));
    Ok(files)
}

/// The predictions of a shard.
pub(crate) fn predictions_file(rows: &[Prediction], job: &JobRecord) -> Result<Bytes, TableError> {
    let mut metadata = [job_metadata(job), score_metadata(job)].concat();
    if let Some(confidence) = &job.confidence {
        metadata.push(pair("calibration", serde_json::to_string(&confidence.calibration).unwrap_or_default()));
        metadata.extend(job.identity.spec.abstain_below.map(|least| pair("abstain_below", least)));
    }
    predictions::encode_predictions(rows, &metadata)
}

fn pair(key: &str, value: impl ToString) -> (String, String) {
    (format!("elbo.{key}"), value.to_string())
}

/// The metadata about the job in every file, so that the file can be understood without `job.json`. Like everything else,
/// it is a function of the job.
fn job_metadata(job: &JobRecord) -> Vec<(String, String)> {
    let versions = &job.versions;
    vec![
        (FINGERPRINT.into(), job.fingerprint.clone()),
        pair("version", &versions.elbo),
        pair("protocol", versions.protocol),
    ]
}

/// The further metadata of a file with scores: how the scores came about, and the class names by class index.
fn score_metadata(job: &JobRecord) -> Vec<(String, String)> {
    let spec = &job.identity.spec;
    // Plain data with numbers as keys always serialises.
    let policy = serde_json::to_string(&spec.policy).unwrap_or_default();
    let mut pairs = vec![pair("policy", policy), pair("loss", spec.loss)];
    pairs.extend(spec.top_k.map(|k| pair("top_k", k)));
    if spec.candidates.is_none() {
        pairs.push(pair("classes", serde_json::to_string(&spec.classes.names).unwrap_or_default()));
    }
    pairs
}

/// The row of a sample with its best class; `None` if no prompt was evaluated. Only the best `top_k` scores are kept; the
/// margin is computed before that.
fn scored(
    sample: &Sample,
    prompts: &[ScoredPrompt],
    classes: &Classes,
    contenders: &Contenders,
    top_k: Option<u32>,
) -> Option<Prediction> {
    let mut scores = class_scores(prompts, classes, contenders);
    let evaluations = prompts.iter().map(|p| p.sums.n).sum();
    let margin = match &scores[..] {
        // Classes that were eliminated earlier have means over other slots, which can't be compared.
        [best, second, ..] if best.round == second.round => Some(second.mean_error - best.mean_error),
        _ => None,
    };
    let class = scores.first()?.class;
    scores.truncate(top_k.map_or(usize::MAX, |k| k as usize));
    let labelled = Labelled { class, class_name: classes.name(class).to_owned(), confidence: None, margin, scores };
    Some(Prediction {
        sample: sample.id,
        key: sample.key.clone(),
        label: sample.label.clone(),
        evaluations,
        outcome: Outcome::Labelled(labelled),
    })
}

/// The result of the audit of a sample with this row.
fn audited_row(
    row: &Prediction,
    labelled: &Labelled,
    audit: &[ScoredPrompt],
    classes: &Classes,
    contenders: &Contenders,
) -> Audited {
    let best = class_scores(audit, classes, contenders).first().map_or(labelled.class, |score| score.class);
    Audited {
        sample: row.sample,
        key: row.key.clone(),
        label: row.label.clone(),
        class: labelled.class,
        evaluations: row.evaluations,
        reference_class: best,
        reference_evaluations: audit.iter().map(|p| p.sums.n).sum(),
    }
}

/// The score of every class by its best contender, best first.
fn class_scores(prompts: &[ScoredPrompt], classes: &Classes, contenders: &Contenders) -> Vec<Score> {
    let score = |best: &ContenderScore| Score::new(classes.class_of(best.prompts[0].prompt), best);
    contenders.class_ranking(prompts).iter().map(score).collect()
}

fn given_up(sample: &Sample, failure: &SampleFailure) -> Prediction {
    Prediction {
        sample: sample.id,
        key: sample.key.clone(),
        label: sample.label.clone(),
        evaluations: 0,
        outcome: Outcome::Quarantined { error: failure.to_string() },
    }
}

fn quarantine_row(sample: &Sample, failure: &SampleFailure) -> Quarantined {
    Quarantined {
        sample: sample.id,
        key: sample.key.clone(),
        stage: failure.stage.in_output(),
        error: failure.error.clone(),
        attempts: attempts(failure.stage),
    }
}

fn error_row(sample: &Sample, error: &SlotError, classes: &Classes, slots: &[Slot]) -> ErrorRow {
    let slot = slots[error.slot];
    ErrorRow {
        sample: sample.id,
        class: classes.class_of(error.prompt),
        prompt: error.prompt,
        timestep: slot.timestep,
        noise: slot.noise,
        error: error.error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::ensemble::PromptEnsemble;
    use elbo_core::ids::{PromptIndex, Round};
    use elbo_core::sums::Sums;

    fn prompt(index: u32, round: u16, n: u32, mean: f64) -> ScoredPrompt {
        let sums = Sums { n, sum: mean * f64::from(n), sum_sq: mean * mean * f64::from(n) };
        ScoredPrompt { prompt: PromptIndex(index), sums, round: Round(round) }
    }

    fn classes() -> Classes {
        let csv = "prompt,classname,classidx\na,cat,3\nb,cat,3\nc,dog,5\nd,owl,9\n";
        Classes::parse(csv, &[]).unwrap()
    }

    #[test]
    fn there_is_no_margin_if_the_runner_up_was_evaluated_on_other_slots() {
        let sample = Sample {
            id: elbo_core::ids::SampleId(0),
            key: "k".into(),
            location: "/k".into(),
            part: None,
            size: 1,
            etag: None,
            label: None,
            candidates: Vec::new(),
            pair: None,
        };
        let all = Contenders::of_classes(&classes(), PromptEnsemble::Max);
        let same = scored(&sample, &[prompt(0, 1, 5, 0.5), prompt(2, 1, 5, 0.75)], &classes(), &all, None).unwrap();
        assert_eq!(same.labelled().unwrap().margin, Some(0.25));
        let other = scored(&sample, &[prompt(0, 1, 5, 0.5), prompt(2, 0, 2, 0.75)], &classes(), &all, None).unwrap();
        assert_eq!(other.labelled().unwrap().margin, None);
        assert_eq!(other.labelled().unwrap().class_name, "cat");
        assert_eq!(other.evaluations, 7);
    }

    #[test]
    fn top_k_keeps_the_best_scores_and_changes_nothing_else() {
        let sample = elbo_core::sample::Sample {
            id: elbo_core::ids::SampleId(0),
            key: "k".into(),
            location: "/k".into(),
            part: None,
            size: 1,
            etag: None,
            label: None,
            candidates: Vec::new(),
            pair: None,
        };
        let prompts = [prompt(0, 1, 5, 0.5), prompt(2, 1, 5, 0.75), prompt(3, 0, 2, 0.1)];
        let of = |top_k| {
            let contenders = Contenders::of_classes(&classes(), PromptEnsemble::Max);
            scored(&sample, &prompts, &classes(), &contenders, top_k).unwrap()
        };
        let (mut all, one) = (of(None), of(Some(1)));
        assert_eq!(all.scores().len(), 3);
        assert_eq!(of(Some(7)), all);
        if let Outcome::Labelled(labelled) = &mut all.outcome {
            labelled.scores.truncate(1);
        }
        assert_eq!(one, all);
        assert_eq!(one.labelled().unwrap().margin, Some(0.25));
    }

    #[test]
    fn metadata_describes_the_job_and_names_the_classes() {
        let spec = serde_json::json!({
            "images": "/secret/place", "model": "m", "top_k": 5,
            "classes": {"names": [[-1, "none"], [2, "\"two\""], [10, "ten"]], "prompts": []},
            "policy": {"name": "exhaustive", "samples": 1, "trials": 1},
            "loss": "l2", "dtype": "f32", "size": null, "seed": 0, "noise_scope": "sample", "noise": null,
            "write_errors": false, "label_from": null, "limit": null, "shard_size": 1,
        });
        let record = |spec: &serde_json::Value| -> JobRecord {
            let job = serde_json::json!({
                "state": "unfinished", "fingerprint": "f", "spec": spec, "model_files": {}, "noise_file": null,
                "manifest": {"samples": 1, "digest": "d", "captions": {"0": 1}}, "versions": {"elbo": "1.2", "protocol": 3},
                "totals": null, "timings": null,
            });
            serde_json::from_value(job).unwrap()
        };
        let (of_job, of_scores) = (job_metadata(&record(&spec)), score_metadata(&record(&spec)));
        let pairs =
            |pairs: &[(String, String)]| pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
        assert_eq!(pairs(&of_job), ["elbo.fingerprint=f", "elbo.version=1.2", "elbo.protocol=3"]);
        let expected = [
            r#"elbo.policy={"name":"exhaustive","samples":1,"trials":1}"#,
            "elbo.loss=l2",
            "elbo.top_k=5",
            r#"elbo.classes={"-1":"none","2":"\"two\"","10":"ten"}"#,
        ];
        assert_eq!(pairs(&of_scores), expected);
        let mut captions = spec;
        captions["candidates"] = "texts".into();
        assert!(!pairs(&score_metadata(&record(&captions))).iter().any(|pair| pair.starts_with("elbo.classes")));
    }

    #[test]
    fn with_ensemble_mean_a_class_scores_the_mean_of_its_prompts() {
        let prompts = [prompt(0, 1, 5, 0.1), prompt(1, 1, 5, 0.9), prompt(2, 1, 5, 0.4), prompt(3, 0, 2, 0.2)];
        let score = |ensemble| class_scores(&prompts, &classes(), &Contenders::of_classes(&classes(), ensemble));
        let order = |scores: &[Score]| scores.iter().map(|s| (s.class.0, s.n, s.mean_error)).collect::<Vec<_>>();
        assert_eq!(order(&score(PromptEnsemble::Max)), [(3, 5, 0.1), (5, 5, 0.4), (9, 2, 0.2)]);
        assert_eq!(order(&score(PromptEnsemble::Mean)), [(5, 5, 0.4), (3, 10, 0.5), (9, 2, 0.2)]);
    }

    #[test]
    fn the_standard_error_of_prompts_on_the_same_slots_is_the_mean_of_their_standard_errors() {
        let of = |sum, sum_sq| Sums { n: 4, sum, sum_sq };
        let scored = |index, sums| ScoredPrompt { prompt: PromptIndex(index), sums, round: Round(0) };
        // Errors 1, 2, 3, 4 and twice as much: standard errors sqrt(5/12) and 2 sqrt(5/12).
        let prompts = [scored(0, of(10.0, 30.0)), scored(1, of(20.0, 120.0))];
        let by_mean = Contenders::of_classes(&classes(), PromptEnsemble::Mean);
        let scores = class_scores(&prompts, &classes(), &by_mean);
        assert_eq!((scores[0].mean_error, scores[0].n), (3.75, 8));
        assert!((scores[0].std_error.unwrap() - 1.5 * (5.0f32 / 12.0).sqrt()).abs() < 1e-6);
    }
}
