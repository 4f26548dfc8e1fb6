//! Sends arbitrary worker messages to a scheduler that runs a small job. Whatever they contain, the scheduler counts
//! nothing twice and no more than the job has, and an honest worker can still finish the job.
#![no_main]

use std::collections::BTreeMap;
use std::time::Duration;

use elbo_coordinator::intake;
use elbo_coordinator::scheduler::{
    Checked, Heartbeat, JobShape, LeasePolicy, Record, Scheduler, Shard, UnitResult, Waste,
};
use elbo_core::ensemble::Contenders;
use elbo_core::ids::{Epoch, LeaseId, LeaseKey, SampleId, ShardId};
use elbo_core::policy::{Course, Policy};
use elbo_core::sample::Sample;
use elbo_core::unit::Unit;
use elbo_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

const SAMPLES: u64 = 3;
const EPOCH: Epoch = Epoch(2);
const WORKERS: [&str; 2] = ["a", "b"];

fn scheduler() -> Scheduler {
    let contenders = Contenders::prompts(3);
    let policy = Policy::reference(&[2, 1], &[2, 4], 1).expect("a policy");
    let course = Course::new(&policy, None, 1000, Some(&contenders)).expect("a course");
    let shape = JobShape::new(course, contenders, &[(0, SAMPLES)].into(), SAMPLES as u32, false);
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
    let policy = LeasePolicy { first_block: 4, ..LeasePolicy::default() };
    let mut scheduler = Scheduler::new(shape, EPOCH, policy, BTreeMap::new(), Waste::default());
    let shard = Shard::restore(scheduler.job(), (0..SAMPLES).map(sample).collect(), &[], Vec::new());
    scheduler.open_shard(ShardId(0), shard, Duration::ZERO);
    for worker in WORKERS {
        scheduler.join(worker, "host", "device", Duration::ZERO);
    }
    scheduler
}

/// A valid result for a unit.
fn compute(unit: &Unit) -> UnitResult {
    let (slots, prompts) = (unit.slots.len() as u32, unit.prompts.len());
    let reported = v1::UnitResult {
        id: Some(unit.id.into()),
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots,
        sum: vec![f64::from(slots); prompts],
        sum_sq: vec![f64::from(slots); prompts],
        errors: Vec::new(),
    };
    UnitResult { id: unit.id, reported }
}

fn key(epoch: u64, lease: u64) -> LeaseKey {
    LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) }
}

/// Handles a report as the service does.
fn report(scheduler: &mut Scheduler, worker: &str, key: LeaseKey, again: bool, record: Record) {
    if let Ok(Checked { record, .. }) = scheduler.check(worker, key, record, again, Duration::ZERO) {
        scheduler.apply(record.clone(), Some((worker, key)));
        let once = scheduler.totals();
        // A second copy that was checked at the same time must not count.
        scheduler.apply(record, Some((worker, key)));
        assert_eq!(once, scheduler.totals());
    }
}

/// Handles one message. `kind` holds the message type and the worker.
fn take(scheduler: &mut Scheduler, kind: u8, message: &[u8]) {
    let worker = WORKERS[usize::from(kind >> 7)];
    match kind & 3 {
        0 => {
            let Ok(v1::ReportRequest { epoch, lease, results, failures, again, .. }) =
                v1::ReportRequest::decode(message)
            else {
                return;
            };
            if let Ok(record) = intake::record(epoch, results, failures) {
                report(scheduler, worker, key(epoch, lease), again, record);
            }
        }
        1 => {
            let Ok(ask) = v1::LeaseRequest::decode(message) else { return };
            let held: Vec<_> = ask.held.iter().map(LeaseKey::from).collect();
            scheduler.keep_only(worker, &held);
            scheduler.grant(worker, ask.evaluations_per_second, Duration::ZERO);
        }
        2 => {
            let Ok(back) = v1::ReleaseRequest::decode(message) else { return };
            for key in back.leases.into_iter().map(|lease| key(back.epoch, lease)) {
                if back.error.is_empty() {
                    scheduler.release(worker, &[key]);
                } else {
                    let failures = scheduler.fail(worker, key, &back.error);
                    scheduler.apply(Record { results: Vec::new(), failures }, None);
                }
            }
        }
        _ => {
            let Ok(join) = v1::JoinRequest::decode(message) else { return };
            let _ = intake::check_names(&join);
            let mut keys = Vec::new();
            for held in join.held {
                let units: Vec<_> = held.units.into_iter().filter_map(|unit| unit.try_into().ok()).collect();
                keys.push(key(held.epoch, held.lease));
                scheduler.adopt(worker, key(held.epoch, held.lease), &units, Duration::ZERO);
            }
            scheduler.heartbeat(worker, Heartbeat { held: keys, ..Heartbeat::default() }, Duration::ZERO);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut scheduler = scheduler();
    let mut rest = bytes;
    while let [kind, length, tail @ ..] = rest {
        let (message, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        take(&mut scheduler, *kind, message);
        rest = tail;
        let totals = scheduler.totals();
        assert!(totals.evaluations <= scheduler.job().planned_evaluations() && totals.samples <= SAMPLES);
    }
    // An honest worker can finish the job.
    scheduler.join("honest", "host", "device", Duration::ZERO);
    WORKERS.iter().for_each(|worker| scheduler.leave(worker));
    while let Some(grant) = scheduler.grant("honest", 0.0, Duration::ZERO) {
        let results = grant.units.iter().map(compute).collect();
        let key = LeaseKey { epoch: EPOCH, lease: grant.lease };
        report(&mut scheduler, "honest", key, false, Record { results, failures: Vec::new() });
    }
    let (_, ended, totals) = scheduler.finished(ShardId(0)).expect("the shard is finished");
    assert!(ended.len() as u64 == SAMPLES && totals.samples == SAMPLES);
});
