//! Logs every grant and every acknowledgement, so that others can check that no unit is leased again once its result is
//! durable. Target `elbo::audit` at debug level; costs nothing while it is disabled.

use std::fmt::Write;

use elbo_proto::v1;
use tracing::Level;

use crate::scheduler::Record;

const TARGET: &str = "elbo::audit";

/// Formats each unit as sample/round/slots/prompts, separated by blanks.
fn list(units: impl Iterator<Item = (u64, u32, u32, u32)>) -> String {
    let mut text = String::new();
    for (sample, round, slots, prompts) in units {
        let blank = if text.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = write!(text, "{blank}{sample}/{round}/{slots}/{prompts}");
    }
    text
}

/// Logs that a block is leased to a worker.
pub(crate) fn granted(worker: &str, block: &v1::Block) {
    if tracing::enabled!(target: TARGET, Level::DEBUG) {
        let ids = block.units.iter().filter_map(|unit| unit.id.as_ref());
        let units = list(ids.map(|id| (id.sample, id.round, id.slots, id.prompts)));
        tracing::debug!(target: TARGET, epoch = block.epoch, lease = block.lease, worker, units, "granted");
    }
}

/// The units of a record, to be logged once it is durable.
pub(crate) fn units(record: &Record) -> Option<String> {
    tracing::enabled!(target: TARGET, Level::DEBUG).then(|| {
        let ids = record.results.iter().map(|result| result.id);
        list(ids.map(|id| (id.sample.0, id.round.0.into(), id.slots.into(), id.prompts.into())))
    })
}

/// Logs that a report is durable. `epoch` is that of the lease.
pub(crate) fn acknowledged(worker: &str, epoch: u64, lease: u64, units: Option<String>) {
    if let Some(units) = units {
        tracing::debug!(target: TARGET, epoch, lease, worker, units, "acknowledged");
    }
}
