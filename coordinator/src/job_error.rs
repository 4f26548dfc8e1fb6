//! Errors when a job can't be opened, with remedies.

use elbo_core::ids::ShardId;
use elbo_core::policy::PolicyError;
use elbo_core::schedule::ScheduleError;
use elbo_data::Account;
use elbo_data::manifest::ManifestError;
use elbo_output::record::RecordError;
use elbo_store::StoreError;
use elbo_store::preflight::PreflightError;

use crate::calibrate::CalibrateError;
use crate::ledger::LedgerError;
use crate::writer::WriteError;

/// A job that can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The output belongs to another job.
    #[error("{location} holds the results of a different job:\n  {}\nuse another --out, restore the old settings, or discard the old results with --fresh", .differences.join("\n  "))]
    Different {
        /// The output.
        location: String,
        /// The differences, one per line.
        differences: Vec<String>,
    },
    /// The output holds predictions of an unknown job.
    #[error(
        "{location} has no job.json, and predictions of another job, with the fingerprint {fingerprint}: use another --out, or \
         discard them with --fresh"
    )]
    Stranger {
        /// The output.
        location: String,
        /// The other job's fingerprint.
        fingerprint: String,
    },
    /// A shard to recompute does not exist.
    #[error("there is no shard {0} to recompute: the job's shards are 0 to {1}")]
    NoSuchShard(ShardId, u32),
    /// Something was passed over, which `--strict` forbids.
    #[error("--strict: the listing of the images passed something over:\n  {}\ntake it out of the dataset, or leave out --strict", .0.passed_over().map(|passed| passed.to_string()).collect::<Vec<_>>().join("\n  "))]
    PassedOver(Account),
    /// The manifest can't be read, or is not the one that was listed.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Labels that are not classes.
    #[error("{}; add the classes, remove those images, or leave labels out with --label-from none", describe_unknown(.0))]
    UnknownLabels(Vec<(String, u64, String)>),
    /// The noise schedule's configuration is missing or invalid.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The policy does not fit model and classes.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The dataset can't be listed.
    #[error(transparent)]
    Dataset(#[from] elbo_data::DatasetError),
    /// The manifest can't be written or parsed.
    #[error(transparent)]
    Table(#[from] elbo_store::table::TableError),
    /// `job.json` can't be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The output is on a store that can't hold a job.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The output can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output can't be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// There is nothing to compute confidence from.
    #[error(
        "--abstain-below needs to know how sure a prediction is, and no image has a label: bring some with --label-from, let \
         the reference score a share of the images too with --audit 1%, or take the calibration of a job with labels with \
         --calibration-from"
    )]
    NothingToCalibrate,
    /// Confidence could not be written.
    #[error(transparent)]
    Calibrate(Box<CalibrateError>),
    /// The ledger can't be opened.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl From<CalibrateError> for JobError {
    fn from(error: CalibrateError) -> Self {
        Self::Calibrate(Box::new(error))
    }
}

fn describe_unknown(labels: &[(String, u64, String)]) -> String {
    let named: Vec<_> =
        labels.iter().take(5).map(|(label, count, key)| format!("'{label}' ({count} images, such as {key})")).collect();
    let more = labels.len().saturating_sub(5);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("labels that are not among the classes: {}{rest}", named.join(", "))
}
