//! The files under `--out`. These paths are a contract: other programs read them.

use object_store::path::Path;

pub use elbo_data::manifest::{DIRECTORY as MANIFEST, part_path as manifest};
pub use elbo_store::preflight::DIRECTORY as PREFLIGHT;

use elbo_core::ids::ShardId;

/// The specification, fingerprint, versions, totals and timings.
pub const JOB: &str = "job.json";
/// Directory of the predictions.
pub const PREDICTIONS: &str = "predictions";
/// Directory of the errors of every evaluation (`--write-errors`).
pub const ERRORS: &str = "errors";
/// Directory of audited samples (`--audit`).
pub const AUDIT: &str = "audit";
/// Directory of the pilot, the job that runs before a race and learns its timesteps (`--pilot`).
pub const PILOT: &str = "pilot";
/// The timesteps it learned, in the form that `--timesteps-from` takes.
pub const PILOT_TIMESTEPS: &str = "pilot/timesteps.json";
/// All windows it tried.
pub const PILOT_FINDINGS: &str = "pilot/findings.json";
/// Directory of quarantined samples.
pub const QUARANTINE: &str = "quarantine";
/// Directory of the ledger.
pub const LEDGER: &str = "ledger";

/// The path of a shard's file.
pub type OfShard = fn(ShardId) -> Path;

/// The directories with one file per shard, and the path of that file.
pub const TABLES: [(&str, OfShard); 4] =
    [(PREDICTIONS, predictions), (ERRORS, errors), (AUDIT, audit), (QUARANTINE, quarantine)];

/// The directories that a job writes its own files to.
pub const WRITTEN: [&str; 5] = [PREDICTIONS, ERRORS, AUDIT, QUARANTINE, MANIFEST];

/// The predictions of a shard.
pub fn predictions(shard: ShardId) -> Path {
    shard_file(PREDICTIONS, shard)
}

/// The errors of a shard.
pub fn errors(shard: ShardId) -> Path {
    shard_file(ERRORS, shard)
}

/// The audited samples of a shard.
pub fn audit(shard: ShardId) -> Path {
    shard_file(AUDIT, shard)
}

/// The quarantined samples of a shard.
pub fn quarantine(shard: ShardId) -> Path {
    shard_file(QUARANTINE, shard)
}

fn shard_file(directory: &str, shard: ShardId) -> Path {
    Path::from(format!("{directory}/shard-{:05}.parquet", shard.0))
}
