//! `job.json`: the job and its progress, for people and for the next start.

use std::collections::BTreeSet;

use bytes::Bytes;
use elbo_core::calibration::Confidence;
use elbo_data::manifest::ManifestRecord;
use elbo_hub::fingerprint::JobIdentity;
use elbo_store::{Store, StoreError};
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::layout;

/// The metadata key, in every file, for the fingerprint of its job.
pub const FINGERPRINT: &str = "elbo.fingerprint";

/// Whether all shards are committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Some shards are not committed yet.
    Unfinished,
    /// Every sample has a prediction or is quarantined.
    Done,
}

/// The versions that wrote the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// `elbo` itself.
    pub elbo: String,
    /// The contract between coordinator and workers.
    pub protocol: u32,
}

/// Totals of a done job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Samples in the manifest.
    pub samples: u64,
    /// Quarantined samples.
    pub quarantined: u64,
    /// Evaluations behind the predictions, plus those of audits.
    pub evaluations: u64,
    /// Evaluations that were computed again although their results had been acknowledged.
    pub evaluations_recomputed: u64,
    /// Evaluations computed by two workers: backups of slow workers, and leases of workers that seemed dead.
    #[serde(default)]
    pub evaluations_duplicated: u64,
}

/// How long a job took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// How many coordinators worked on the job, one after another.
    pub starts: u64,
    /// Wall time of the last coordinator, in seconds. The time of a coordinator that was killed is not recorded.
    pub seconds: f64,
}

/// The content of `job.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Whether the job is done.
    pub state: JobState,
    /// Hash of the specification, model files and manifest.
    pub fingerprint: String,
    /// The specification and the hashes of the files it names.
    #[serde(flatten)]
    pub identity: JobIdentity,
    /// The dataset.
    pub manifest: ManifestRecord,
    /// Versions.
    pub versions: Versions,
    /// What computed the results of a done job: instruction sets of CPUs, and GPUs. CPUs give the same bits in f32, GPUs of
    /// different kinds don't.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub hardware: BTreeSet<String>,
    /// Totals of a done job.
    pub totals: Option<Totals>,
    /// Timings of a done job.
    pub timings: Option<Timings>,
    /// The calibration of a done job; `None` if there was nothing to fit it to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<Confidence>,
}

/// An invalid `job.json`.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Reading or writing failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its content is not valid.
    #[error(
        "{location}/job.json can't be understood ({source}): it was written by another version of elbo or damaged; use another --out, or start over with --fresh"
    )]
    Format {
        /// The output's location.
        location: String,
        /// The reason.
        source: serde_json::Error,
    },
}

impl JobRecord {
    /// Reads an output's `job.json`; `None` if there is none.
    pub async fn read(out: &Store) -> Result<Option<Self>, RecordError> {
        let Some(bytes) = out.read(&Path::from(layout::JOB)).await? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| RecordError::Format { location: out.location().to_string(), source })
    }

    /// The path and content of an output's `job.json`.
    pub fn file(&self, out: &Store) -> Result<(Path, Bytes), RecordError> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|source| RecordError::Format { location: out.location().to_string(), source })?;
        Ok((Path::from(layout::JOB), Bytes::from(json)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::class::Classes;
    use elbo_core::ensemble::PromptEnsemble;
    use elbo_core::job::{JobSpec, ModelDtype};
    use elbo_core::loss::Loss;
    use elbo_core::noise::NoiseScope;
    use elbo_core::policy::Policy;
    use elbo_data::{Account, Reason};

    #[test]
    fn a_record_is_read_back_as_written() {
        let spec = JobSpec {
            images: "/images".into(),
            lora: vec![],
            model: "/model".into(),
            classes: Classes::parse("prompt,classname,classidx\na cat,cat,7\na dog,dog,-1\n", &[]).unwrap(),
            hierarchy: None,
            prompt_ensemble: PromptEnsemble::Mean,
            candidates: None,
            image_column: None,
            shortlist: None,
            policy: Policy::reference(&[2, 1], &[5, 10], 1).unwrap(),
            audit: None,
            calibration: None,
            abstain_below: Some(0.9),
            loss: Loss::Huber,
            dtype: ModelDtype::F32,
            size: None,
            timestep_shift: None,
            seed: u64::MAX,
            noise_scope: NoiseScope::Sample,
            noise: None,
            top_k: None,
            write_errors: true,
            label_from: Some("parent".into()),
            limit: None,
            subset: None,
            shard_size: 10,
        };
        let identity = JobIdentity {
            spec,
            model_files: [("a".into(), "b".into())].into(),
            shortlist_files: [].into(),
            lora_files: vec![],
            noise_file: None,
        };
        let mut passed_over = Account::default();
        passed_over.note(Reason::Extension("avif".into()), "a.avif");
        let record = JobRecord {
            state: JobState::Unfinished,
            fingerprint: identity.fingerprint("m"),
            identity,
            manifest: ManifestRecord {
                samples: 3,
                digest: "m".into(),
                captions: [(0, 3)].into(),
                labelled: Some(3),
                passed_over,
            },
            versions: Versions { elbo: "1".into(), protocol: 1 },
            hardware: ["avx2".into(), "avx512".into()].into(),
            totals: None,
            timings: None,
            confidence: None,
        };
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<JobRecord>(&json).unwrap(), record);

        // Absent fields have their default, and defaults are not written.
        let older = json.replace(r#""prompt_ensemble":"mean","#, "");
        let older: JobRecord = serde_json::from_str(&older).unwrap();
        assert_eq!(older.identity.spec.prompt_ensemble, PromptEnsemble::Max);
        assert!(!serde_json::to_string(&older).unwrap().contains("prompt_ensemble"));
        assert_eq!(record.identity.differences(&older.identity), [r#"prompt_ensemble: the default -> "mean""#]);
        assert_eq!(older.identity.differences(&record.identity), [r#"prompt_ensemble: "mean" -> the default"#]);
    }
}
