//! Reads jobs' records and calibrations.

use elbo_core::calibration::Calibration;
use elbo_output::record::JobRecord;
use elbo_store::{Location, Store};

/// Opens an output that contains a job.
pub(crate) async fn open(out: &str) -> anyhow::Result<(Store, JobRecord)> {
    let store = Store::open(&Location::parse(out)?)?;
    let record = JobRecord::read(&store)
        .await?
        .ok_or_else(|| anyhow::anyhow!("{} has no job.json: give the --out of a job", store.location()))?;
    Ok((store, record))
}

/// The calibration that the job in an output has fitted.
pub(crate) async fn calibration(out: &str) -> anyhow::Result<Calibration> {
    let (store, record) = open(out).await?;
    let confidence = record.confidence.ok_or_else(|| {
        anyhow::anyhow!(
            "{} has no calibration for --calibration-from: give the --out of a job that is done and had labels, or an --audit",
            store.location()
        )
    })?;
    Ok(confidence.calibration)
}
