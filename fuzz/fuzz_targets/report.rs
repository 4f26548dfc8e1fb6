//! Messages of workers, one after the other, to a coordinator's brain with a small job: whatever they say, nothing is counted
//! twice or beyond what there is, and what is left can still be computed to the end.
#![no_main]

use std::collections::BTreeMap;
use std::time::Duration;

use elbo_common::ensemble::Contenders;
use elbo_common::ids::{Epoch, LeaseId, SampleId, ShardId};
use elbo_common::manifest::Sample;
use elbo_common::policy::Policy;
use elbo_common::unit::Unit;
use elbo_coordinator::brain::{Brain, Checked, JobShape, LeasePolicy, Record, Shard, UnitResult};
use elbo_coordinator::intake;
use elbo_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

const SAMPLES: u64 = 3;
const EPOCH: Epoch = Epoch(2);
const WORKERS: [&str; 2] = ["a", "b"];

fn brain() -> Brain {
    let contenders = Contenders::prompts(3);
    let policy = Policy::reference(&[2, 1], &[2, 4], 1).expect("a policy");
    let rounds = policy.rounds(1000, Some(&contenders)).expect("rounds");
    let shape = JobShape::new(rounds, contenders, &[(0, SAMPLES)].into(), SAMPLES as u32, false);
    let sample = |id| Sample {
        id: SampleId(id),
        key: id.to_string(),
        location: id.to_string(),
        part: None,
        size: 1,
        etag: None,
        label: None,
        candidates: Vec::new(),
        pair: None,
    };
    let mut brain = Brain::new(shape, EPOCH, LeasePolicy { first_block: 4, ..LeasePolicy::default() }, BTreeMap::new());
    let shard = Shard::restore(brain.job(), (0..SAMPLES).map(sample).collect(), &[], Vec::new());
    brain.open_shard(ShardId(0), shard);
    for worker in WORKERS {
        brain.join(worker, "host", "device", Duration::ZERO);
    }
    brain
}

/// An honest result of a unit.
fn compute(unit: &Unit) -> UnitResult {
    let (slots, prompts) = (unit.slots.len() as u32, unit.prompts.len());
    UnitResult {
        id: unit.id,
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots,
        sum: vec![f64::from(slots); prompts],
        sum_sq: vec![f64::from(slots); prompts],
        errors: Vec::new(),
    }
}

/// What the service does with a report; the evaluations it added.
fn report(brain: &mut Brain, worker: &str, epoch: u64, lease: u64, record: Record) {
    let checked = brain.check(worker, Epoch(epoch), LeaseId(lease), record, Duration::ZERO);
    if let Ok(Checked { record, .. }) = checked {
        brain.apply(record.clone(), Some(worker));
        let once = brain.totals();
        // A second copy that was checked at the same time counts nothing.
        brain.apply(record, Some(worker));
        assert_eq!(once, brain.totals());
    }
}

/// One message: its kind, its worker, and its bytes.
fn take(brain: &mut Brain, kind: u8, message: &[u8]) {
    let worker = WORKERS[usize::from(kind >> 7)];
    match kind & 3 {
        0 => {
            let Ok(v1::ReportRequest { epoch, lease, results, failures, .. }) = v1::ReportRequest::decode(message)
            else {
                return;
            };
            if let Ok(record) = intake::record(epoch, results, failures) {
                report(brain, worker, epoch, lease, record);
            }
        }
        1 => {
            let Ok(ask) = v1::LeaseRequest::decode(message) else { return };
            let held: Vec<_> = ask.held.iter().filter(|h| h.epoch == EPOCH.0).map(|h| LeaseId(h.lease)).collect();
            brain.keep_only(worker, &held);
            brain.grant(worker, intake::rate(ask.evaluations_per_second), Duration::ZERO);
        }
        2 => {
            let Ok(back) = v1::ReleaseRequest::decode(message) else { return };
            for lease in back.leases.into_iter().map(LeaseId) {
                if !brain.holds(worker, lease) {
                    continue;
                }
                if back.error.is_empty() {
                    brain.release(&[lease]);
                } else {
                    let failures = brain.fail(lease, &back.error);
                    brain.apply(Record { results: Vec::new(), failures }, None);
                }
            }
        }
        _ => {
            if let Ok(join) = v1::JoinRequest::decode(message) {
                let _ = intake::check_names(&join);
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut brain = brain();
    let mut rest = bytes;
    while let [kind, length, tail @ ..] = rest {
        let (message, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        take(&mut brain, *kind, message);
        rest = tail;
        let totals = brain.totals();
        assert!(totals.evaluations <= brain.job().planned_evaluations() && totals.samples <= SAMPLES);
    }
    // An honest worker can end the job.
    brain.join("honest", "host", "device", Duration::ZERO);
    WORKERS.iter().for_each(|worker| brain.leave(worker));
    while let Some(grant) = brain.grant("honest", 0.0, Duration::ZERO) {
        let results = grant.units.iter().map(compute).collect();
        report(&mut brain, "honest", EPOCH.0, grant.lease.0, Record { results, failures: Vec::new() });
    }
    let (_, ended, totals) = brain.finished(ShardId(0)).expect("the shard is finished");
    assert!(ended.len() as u64 == SAMPLES && totals.samples == SAMPLES);
});
