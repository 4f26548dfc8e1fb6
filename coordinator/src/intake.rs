//! Protects the scheduler from broken or malicious peers.

use elbo_core::failure::SampleFailure;
use elbo_proto::{shortened, v1};
use tonic::Status;

use crate::scheduler::{Record, UnitResult};

/// The longest name of a worker, host or device.
const NAME_BYTES: usize = 256;

/// Checks names, which go into logs, pages and metrics: they must be short and on one line.
pub fn check_names(join: &v1::JoinRequest) -> Result<(), Status> {
    if join.worker.is_empty() {
        return Err(Status::invalid_argument("a worker must have a name"));
    }
    for (what, name) in [
        ("name", &join.worker),
        ("host", &join.host),
        ("device", &join.device),
        ("version", &join.version),
        ("process", &join.process),
        ("hardware", &join.hardware),
    ] {
        let reason = if name.len() > NAME_BYTES {
            format!("the worker's {what} is longer than {NAME_BYTES} bytes")
        } else if name.chars().any(char::is_control) {
            format!("the worker's {what} holds control characters")
        } else {
            continue;
        };
        tracing::warn!(reason, "worker refused");
        return Err(Status::invalid_argument(reason));
    }
    Ok(())
}

/// The record in a report of a lease of `epoch`, or why it is invalid for any job. The scheduler checks whether it is valid
/// for this job.
pub fn record(epoch: u64, results: Vec<v1::UnitResult>, failures: Vec<v1::SampleFailure>) -> Result<Record, String> {
    // Epochs start at 1.
    if epoch == 0 {
        return Err("there is no epoch 0: its lease was never granted".into());
    }
    for result in &results {
        if result.errors.iter().any(|error| !error.is_finite() || *error < 0.0) {
            return Err("a single error is negative or not a number".into());
        }
    }
    let results = results.into_iter().map(UnitResult::try_from).collect::<Result<_, _>>();
    // The work of a refused report is computed again, so do not refuse an honest report for a long text.
    let cut = |failure: v1::SampleFailure| v1::SampleFailure { error: shortened(failure.error), ..failure };
    let failures = failures.into_iter().map(cut).map(SampleFailure::try_from).collect::<Result<_, _>>();
    Ok(Record {
        results: results.map_err(|_| "a result does not name a valid unit")?,
        failures: failures.map_err(|error| error.to_string())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(worker: &str, host: &str) -> v1::JoinRequest {
        v1::JoinRequest { worker: worker.into(), host: host.into(), ..v1::JoinRequest::default() }
    }

    #[test]
    fn names_are_short_and_on_one_line() {
        assert!(check_names(&join("größe-1", "host")).is_ok());
        for (worker, host) in [("", ""), ("a\nb", ""), ("a", "\u{1b}[31m"), (&"x".repeat(1 << 20), "")] {
            assert!(check_names(&join(worker, host)).is_err(), "{host:?}");
        }
    }

    #[test]
    fn impossible_errors_are_refused_and_long_messages_are_cut() {
        let with = |error| {
            let id = Some(v1::UnitId::default());
            vec![v1::UnitResult { id, errors: vec![0.5, error], ..v1::UnitResult::default() }]
        };
        assert!(record(1, with(0.1), Vec::new()).is_ok());
        assert!(record(0, with(0.1), Vec::new()).is_err());
        assert!(record(1, vec![v1::UnitResult::default()], Vec::new()).is_err());
        assert!([f32::NAN, f32::INFINITY, -0.1].iter().all(|e| record(1, with(*e), Vec::new()).is_err()));
        let failed = |stage: &str, error: String| {
            record(1, Vec::new(), vec![v1::SampleFailure { sample: 0, stage: stage.into(), error }])
        };
        assert!(failed("decode", "broken".into()).is_ok());
        assert!(failed("nowhere", String::new()).is_err());
        let cut = failed("decode", "x".repeat(5000)).unwrap();
        assert!(cut.failures[0].error.len() <= elbo_proto::ERROR_BYTES + '…'.len_utf8());
    }
}
