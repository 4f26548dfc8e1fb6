//! Writing a finished shard: final sums become Parquet files at fixed paths.
//!
//! The content is a pure function of the job, so that writing a shard twice, as after a crash between the put and the
//! ledger's mark, is harmless.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use elbo_core::audit::Audited;
use elbo_core::class::Classes;
use elbo_core::ensemble::Contenders;
use elbo_core::ids::{ClassIndex, Round, SampleId, ShardId};
use elbo_core::policy::Slot;
use elbo_core::prediction::Outcome as RowOutcome;
use elbo_core::prediction::{Labelled, Prediction, Score};
use elbo_core::sample::Sample;
use elbo_output::layout;
use elbo_output::predictions::{self, ErrorRow, Quarantined};
use elbo_output::record::{FINGERPRINT, JobRecord};
use elbo_store::table::{TableError, note_of};
use elbo_store::{Store, StoreError};
use object_store::path::Path;

use crate::scheduler::{Finished, Outcome, SampleFailure, ScoredPrompt, SlotError, UNREAD};

/// A finished shard on its way out.
#[derive(Debug)]
pub struct Finishing {
    /// The shard.
    pub shard: ShardId,
    /// Its samples.
    pub manifest: Vec<Sample>,
    /// How they ended, in the same order.
    pub outcomes: Vec<Finished>,
    /// The rows of samples that ended before the shard was opened again.
    pub kept: Kept,
}

/// What an earlier commit of a shard wrote of its sound samples.
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
    /// A file of it is damaged.
    #[error("{0}; or compute the whole shard again with --recompute {1}")]
    Table(TableError, ShardId),
    /// A file of it is another job's.
    #[error(transparent)]
    Foreign(#[from] Foreign),
}

/// A file that another job wrote.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} was written by another job, with the fingerprint {fingerprint}: nothing of it is overwritten; move it away, then \
     run the same command again, which computes its shard"
)]
pub struct Foreign {
    path: Path,
    fingerprint: String,
}

impl Foreign {
    /// Refuses a file whose rows are not the job's own.
    pub(crate) fn check(path: &Path, bytes: &Bytes, job: &JobRecord) -> Result<(), Self> {
        match note_of(bytes, FINGERPRINT) {
            Some(other) if other != job.fingerprint => Err(Self { path: path.clone(), fingerprint: other }),
            _ => Ok(()),
        }
    }
}

impl Kept {
    /// Reads the files of a job's shard; nothing where it was never committed.
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

    /// The samples, and the evaluations that each took.
    pub fn evaluations(&self) -> Vec<(SampleId, u64)> {
        self.rows.iter().map(|(sample, row)| (*sample, u64::from(row.evaluations))).collect()
    }
}

/// How often a sample is tried before it is given up, by where it failed.
fn attempts(stage: &str) -> u32 {
    if [UNREAD, "evaluate"].contains(&stage) { 2 } else { 1 }
}

/// Where a sample failed, as outputs call it.
fn shown(stage: &str) -> &str {
    if stage == UNREAD { "read" } else { stage }
}

/// What a sample's row says of its failure.
pub fn account(failure: &SampleFailure) -> String {
    format!("{}: {}", shown(&failure.stage), failure.error)
}

/// The files of a finished shard, predictions last: where they are, so is all else. Where an earlier try left a quarantine
/// (`had_quarantine`) and nobody is in it any more, it is written without rows: a deletion that arrives late could hit the
/// quarantine of another coordinator.
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
            Outcome::Kept => {
                errors.extend(kept.errors.get(&sample.id).into_iter().flatten().copied());
                audited.extend(kept.audited.get(&sample.id).cloned());
                let gone = || TableError::Rows {
                    table: "predictions",
                    problem: format!("the row of {} is gone, which was there when the shard was opened", sample.key),
                };
                kept.rows.get(&sample.id).cloned().ok_or_else(gone)?
            }
            Outcome::Scored { prompts, errors: single, audit } => {
                let classes = sample.classes(&spec.classes);
                let contenders = contenders.clone().unwrap_or_else(|| Contenders::prompts(prompts.len()));
                errors.extend(single.iter().map(|e| error_row(sample, e, &classes, slots)));
                let row = scored(sample, prompts, &classes, &contenders, spec.top_k);
                if let (Some(audit), Some(labelled)) = (audit, row.labelled()) {
                    audited.push(audited_row(&row, labelled, audit, &classes, &contenders));
                }
                row
            }
            Outcome::Quarantined(failure) => {
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

/// What every file says of its job, so that it can be understood apart from `job.json`. A function of the job, like all the rest.
fn job_metadata(job: &JobRecord) -> Vec<(String, String)> {
    let versions = &job.versions;
    vec![
        (FINGERPRINT.into(), job.fingerprint.clone()),
        pair("version", &versions.elbo),
        pair("protocol", versions.protocol),
    ]
}

/// What a file with scores adds: how they came about, and the names of the classes they have by index.
fn score_metadata(job: &JobRecord) -> Vec<(String, String)> {
    let spec = &job.identity.spec;
    // What is serialised is plain data whose keys are numbers: that does not fail.
    let policy = serde_json::to_string(&spec.policy).unwrap_or_default();
    let mut pairs = vec![pair("policy", policy), pair("loss", spec.loss)];
    pairs.extend(spec.top_k.map(|k| pair("top_k", k)));
    if spec.candidates.is_none() {
        pairs.push(pair("classes", serde_json::to_string(&spec.classes.names).unwrap_or_default()));
    }
    pairs
}

/// Of the scores, the best `top_k` are kept; the margin is known before.
fn scored(
    sample: &Sample,
    prompts: &[ScoredPrompt],
    classes: &Classes,
    contenders: &Contenders,
    top_k: Option<u32>,
) -> Prediction {
    let mut scores = class_scores(prompts, classes, contenders);
    let evaluations = prompts.iter().map(|p| p.sums.n).sum();
    let margin = match &scores[..] {
        // Classes that left earlier have means over other slots, which don't compare.
        [best, second, ..] if best.round == second.round => Some(second.mean_error - best.mean_error),
        _ => None,
    };
    scores.truncate(top_k.map_or(usize::MAX, |k| k as usize));
    let class = scores.first().map_or(ClassIndex(0), |s| s.class);
    let labelled = Labelled { class, class_name: classes.name(class).to_owned(), confidence: None, margin, scores };
    Prediction {
        sample: sample.id,
        key: sample.key.clone(),
        label: sample.label.clone(),
        evaluations,
        outcome: RowOutcome::Labelled(labelled),
    }
}

/// What the audit of a sample with this row came to.
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

/// A class scores as the best of its contenders does: as its best prompt, or as the mean of its prompts where they compete
/// together. Best first: by the last round a class was in, then by mean error; ties by the lower prompt, as in the policy.
fn class_scores(prompts: &[ScoredPrompt], classes: &Classes, contenders: &Contenders) -> Vec<Score> {
    let mut groups: BTreeMap<u32, Vec<&ScoredPrompt>> = BTreeMap::new();
    for prompt in prompts.iter().filter(|p| p.sums.n > 0 && !contenders.is_group(p.prompt)) {
        groups.entry(contenders.of_prompt(prompt.prompt)).or_default().push(prompt);
    }
    let mut ranked: Vec<(f64, Score)> = groups.into_values().map(|group| contender_score(&group, classes)).collect();
    // Stable, so that ties stay in the contenders' order.
    ranked.sort_by(|(a, one), (b, other)| other.round.cmp(&one.round).then(a.total_cmp(b)));
    let mut seen = BTreeSet::new();
    ranked.into_iter().map(|(_, score)| score).filter(|score| seen.insert(score.class)).collect()
}

/// The score of prompts of one class that were evaluated on the same slots, with its mean error unrounded.
fn contender_score(group: &[&ScoredPrompt], classes: &Classes) -> (f64, Score) {
    let count = group.len() as f64;
    let mean = group.iter().map(|p| p.sums.mean()).sum::<f64>() / count;
    // On the same slots the prompts' errors rise and fall together: the standard error of their mean is at most the mean
    // of their standard errors, and close to it.
    let std_errors: Option<Vec<f64>> = group.iter().map(|p| p.sums.std_error()).collect();
    let score = Score {
        class: group.first().map_or(ClassIndex(0), |p| classes.class_of(p.prompt)),
        mean_error: mean as f32,
        std_error: std_errors.map(|all| (all.iter().sum::<f64>() / count) as f32),
        n: group.iter().map(|p| p.sums.n).sum(),
        round: group.iter().map(|p| p.round).max().unwrap_or(Round(0)),
    };
    (mean, score)
}

fn given_up(sample: &Sample, failure: &SampleFailure) -> Prediction {
    let error = account(failure);
    Prediction {
        sample: sample.id,
        key: sample.key.clone(),
        label: sample.label.clone(),
        evaluations: 0,
        outcome: RowOutcome::Quarantined { error },
    }
}

fn quarantine_row(sample: &Sample, failure: &SampleFailure) -> Quarantined {
    Quarantined {
        sample: sample.id,
        key: sample.key.clone(),
        stage: shown(&failure.stage).to_owned(),
        error: failure.error.clone(),
        attempts: attempts(&failure.stage),
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
    use elbo_core::ids::PromptIndex;
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
    fn a_class_that_stayed_longer_beats_one_with_a_lower_mean_over_fewer_slots() {
        let scores = class_scores(
            &[prompt(0, 0, 2, 0.9), prompt(1, 1, 5, 0.8), prompt(2, 1, 5, 0.7), prompt(3, 0, 2, 0.1)],
            &classes(),
            &Contenders::prompts(4),
        );
        let order: Vec<_> = scores.iter().map(|s| (s.class.0, s.n)).collect();
        assert_eq!(order, [(5, 5), (3, 5), (9, 2)]);
    }

    #[test]
    fn the_margin_is_left_out_where_the_runner_up_saw_other_slots() {
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
        let all = Contenders::prompts(4);
        let same = scored(&sample, &[prompt(0, 1, 5, 0.5), prompt(2, 1, 5, 0.75)], &classes(), &all, None);
        assert_eq!(same.labelled().unwrap().margin, Some(0.25));
        let other = scored(&sample, &[prompt(0, 1, 5, 0.5), prompt(2, 0, 2, 0.75)], &classes(), &all, None);
        assert_eq!(other.labelled().unwrap().margin, None);
        assert_eq!(other.labelled().unwrap().class_name, "cat");
        assert_eq!(other.evaluations, 7);
    }

    #[test]
    fn of_the_scores_the_best_are_kept_and_nothing_else_changes() {
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
        let of = |top_k| scored(&sample, &prompts, &classes(), &Contenders::prompts(4), top_k);
        let (mut all, one) = (of(None), of(Some(1)));
        assert_eq!(all.scores().len(), 3);
        assert_eq!(of(Some(7)), all);
        if let RowOutcome::Labelled(labelled) = &mut all.outcome {
            labelled.scores.truncate(1);
        }
        assert_eq!(one, all);
        assert_eq!(one.labelled().unwrap().margin, Some(0.25));
    }

    #[test]
    fn a_file_says_what_its_job_was_and_how_its_classes_are_called() {
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
    fn by_mean_a_class_scores_the_mean_of_its_prompts_and_not_its_best() {
        let prompts = [prompt(0, 1, 5, 0.1), prompt(1, 1, 5, 0.9), prompt(2, 1, 5, 0.4), prompt(3, 0, 2, 0.2)];
        let score = |ensemble| class_scores(&prompts, &classes(), &Contenders::of_classes(&classes(), ensemble));
        let order = |scores: &[Score]| scores.iter().map(|s| (s.class.0, s.n, s.mean_error)).collect::<Vec<_>>();
        assert_eq!(order(&score(PromptEnsemble::Max)), [(3, 5, 0.1), (5, 5, 0.4), (9, 2, 0.2)]);
        assert_eq!(order(&score(PromptEnsemble::Mean)), [(5, 5, 0.4), (3, 10, 0.5), (9, 2, 0.2)]);
    }

    #[test]
    fn the_standard_error_of_prompts_on_the_same_slots_is_the_mean_of_theirs() {
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
