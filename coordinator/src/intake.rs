//! What is borne from a peer that is broken or means harm, before anything of it comes to the scheduler.

use elbo_proto::{shortened, v1};
use tonic::Status;

use crate::ledger::{failure_from_wire, from_wire};
use crate::scheduler::{Record, UNREAD};

/// Longest name of a worker, host or device.
const NAME_BYTES: usize = 256;

/// Where a sample can fail.
const STAGES: [&str; 6] = ["read", UNREAD, "decode", "preprocess", "encode", "evaluate"];

/// Names go into logs, pages and metrics: they must be short and on one line.
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

/// What a report of a lease of `epoch` brings, or why it can be one of no job at all. Whether it is one of this, the scheduler
/// checks.
pub fn record(epoch: u64, results: Vec<v1::UnitResult>, failures: Vec<v1::SampleFailure>) -> Result<Record, String> {
    // Epochs are counted from 1.
    if epoch == 0 {
        return Err("epoch 0 never was: its lease was never granted".into());
    }
    for result in &results {
        if result.errors.iter().any(|error| !error.is_finite() || *error < 0.0) {
            return Err("a single error is negative or not a number".into());
        }
    }
    for failure in &failures {
        if !STAGES.contains(&failure.stage.as_str()) {
            return Err(format!("a sample can't fail at '{}'", failure.stage.chars().take(40).collect::<String>()));
        }
    }
    let results = results.into_iter().map(from_wire).collect::<Option<Vec<_>>>();
    Ok(Record {
        results: results.ok_or("a result names no unit of this contract")?,
        // A report that is refused is computed again: an honest one must not be for being wordy.
        failures: failures
            .into_iter()
            .map(|f| failure_from_wire(v1::SampleFailure { error: shortened(f.error), ..f }))
            .collect(),
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
    fn errors_that_can_not_be_are_not_taken_and_long_ones_are_cut() {
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
