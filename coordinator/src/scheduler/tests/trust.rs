//! Tests of which reports count: those of leases that the worker was granted, and of units in these leases.

use elbo_core::failure::{FailureStage, SampleFailure};

use super::*;

fn result(unit: &Unit) -> Record {
    Record { results: vec![evaluate(unit)], failures: vec![] }
}

fn failure(sample: SampleId) -> Record {
    Record {
        results: vec![],
        failures: vec![SampleFailure { sample, stage: FailureStage::Decode, error: "cut".into() }],
    }
}

fn check(scheduler: &mut Scheduler, worker: &str, key: LeaseKey, report: Record) -> Result<Checked, String> {
    scheduler.check(worker, key, report, false, Duration::ZERO).map_err(|error| error.to_string())
}

/// Two workers with a block each.
fn two() -> (Scheduler, LeasedBlock, LeasedBlock) {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    ["alice", "mallory"].iter().for_each(|worker| scheduler.join(worker, "host", "cpu", Duration::ZERO));
    let alices = scheduler.grant("alice", 0.0, Duration::ZERO).unwrap();
    let mallorys = scheduler.grant("mallory", 0.0, Duration::ZERO).unwrap();
    (scheduler, alices, mallorys)
}

#[test]
fn results_and_failures_are_refused_if_the_worker_was_not_given_the_unit() {
    let (mut scheduler, alices, mallorys) = two();
    let (of_alice, of_mallory) = (key(1, alices.lease.0), key(1, mallorys.lease.0));
    // No worker has begun the last sample.
    let (unit, nobodys) = (&alices.units[0], SampleId(3));
    assert!(mallorys.units.iter().all(|other| other.id != unit.id && other.id.sample < nobodys));
    for report in [result(unit), failure(unit.id.sample)] {
        let refused = |scheduler: &mut Scheduler, key| check(scheduler, "mallory", key, report.clone()).unwrap_err();
        assert_eq!(refused(&mut scheduler, of_alice), format!("lease {of_alice} was granted to another worker"));
        assert_eq!(
            refused(&mut scheduler, key(1, 99)),
            format!("lease {} was never granted by this coordinator", key(1, 99))
        );
    }
    let of_nobody = Unit { id: UnitId { sample: nobodys, ..unit.id }, ..unit.clone() };
    for report in [result(unit), result(&of_nobody), failure(nobodys)] {
        let refused = check(&mut scheduler, "mallory", of_mallory, report).unwrap_err();
        assert!(refused.contains("does not include what was reported for sample"), "{refused}");
    }
    // One false result voids the whole report.
    let mixed = Record { results: vec![evaluate(&mallorys.units[0]), evaluate(unit)], failures: vec![] };
    assert!(check(&mut scheduler, "mallory", of_mallory, mixed).is_err());
    assert_eq!(scheduler.waste(), Waste::default());
    for (worker, key, grant) in [("alice", of_alice, &alices), ("mallory", of_mallory, &mallorys)] {
        assert_eq!(check(&mut scheduler, worker, key, result(&grant.units[0])).unwrap().record.results.len(), 1);
        assert_eq!(check(&mut scheduler, worker, key, failure(grant.units[0].id.sample)).unwrap().duplicates, 0);
    }
}

#[test]
fn a_report_of_a_known_result_by_another_worker_changes_nothing() {
    let (mut scheduler, alices, _) = two();
    let known = check(&mut scheduler, "alice", key(1, alices.lease.0), result(&alices.units[0])).unwrap();
    scheduler.apply(known.record, Some(("alice", key(1, alices.lease.0))));
    let again = check(&mut scheduler, "mallory", key(1, alices.lease.0), result(&alices.units[0])).unwrap();
    assert_eq!((again.record, again.duplicates, scheduler.waste()), (Record::default(), 1, Waste::default()));
}

#[test]
fn an_ended_lease_still_proves_what_its_worker_was_given() {
    for ended in ["silence", "handed back", "failed", "lost"] {
        let (mut scheduler, alices, _) = two();
        let of_alice = key(1, alices.lease.0);
        match ended {
            "silence" => drop(wait(&mut scheduler, 0, 31)),
            "handed back" => scheduler.release("alice", &[of_alice]),
            "failed" => drop(scheduler.fail("alice", of_alice, "out of memory")),
            _ => assert!(scheduler.keep_only("alice", &[])),
        }
        assert!(!scheduler.holds("alice", of_alice), "{ended}");
        scheduler.join("other", "host", "cpu", Duration::from_secs(31));
        while scheduler.grant("other", 0.0, Duration::from_secs(31)).is_some() {}
        let late = check(&mut scheduler, "alice", of_alice, result(&alices.units[0])).unwrap();
        assert_eq!((late.record.results.len(), late.duplicates), (1, 0), "{ended}");
    }
}

#[test]
fn reports_of_an_earlier_coordinators_lease_are_accepted_from_workers_that_claim_it() {
    let (mut before, _, grant) = two();
    let lease = key(1, grant.lease.0);
    let [first, second, ..] = &grant.units[..] else { panic!("{} units", grant.units.len()) };
    let known = check(&mut before, "mallory", lease, result(first)).unwrap().record;
    let mut after = scheduler(4, 2);
    open(&mut after, ShardId(0), 4, vec![known]);
    after.join("mallory", "host", "cpu", Duration::ZERO);
    let unclaimed = after.check("mallory", lease, result(second), false, Duration::ZERO).unwrap_err();
    assert_eq!(unclaimed, ReportError::Unclaimed(lease));
    assert!(unclaimed.to_string().contains("join again"));
    // Known results were reported before the coordinator went away: there is nothing to prove.
    assert_eq!(check(&mut after, "mallory", lease, result(first)).unwrap().duplicates, 1);
    after.adopt("mallory", lease, &[second.id], Duration::ZERO);
    assert_eq!(check(&mut after, "mallory", lease, result(second)).unwrap().record.results.len(), 1);
    let more = check(&mut after, "mallory", lease, failure(SampleId(3))).unwrap_err();
    assert!(more.contains("does not include"), "{more}");
    // Another worker that makes the same claim takes nothing away.
    after.join("eve", "host", "cpu", Duration::ZERO);
    after.adopt("eve", lease, &[second.id], Duration::ZERO);
    assert!(after.holds("mallory", lease) && !after.holds("eve", lease));
}

#[test]
fn no_other_worker_can_claim_a_lease_of_this_coordinator() {
    let (mut scheduler, alices, _) = two();
    let units: Vec<_> = alices.units.iter().map(|unit| unit.id).collect();
    scheduler.release("alice", &[key(1, alices.lease.0)]);
    for lease in [key(1, alices.lease.0), key(1, 77)] {
        scheduler.adopt("mallory", lease, &units, Duration::ZERO);
        assert!(!scheduler.holds("mallory", lease));
        assert!(check(&mut scheduler, "mallory", lease, result(&alices.units[0])).is_err());
    }
    scheduler.adopt("alice", key(1, alices.lease.0), &units, Duration::ZERO);
    assert!(scheduler.holds("alice", key(1, alices.lease.0)));
}

#[test]
fn the_memory_of_leases_is_bounded_and_held_leases_are_not_forgotten() {
    let (mut scheduler, alices, _) = two();
    let grants = 20_000;
    for _ in 0..grants {
        let grant = scheduler.grant("mallory", 1e6, Duration::ZERO).unwrap();
        scheduler.release("mallory", &[key(1, grant.lease.0)]);
    }
    let remembered = scheduler.open[&ShardId(0)].remembered();
    assert!(remembered < 5_000, "{remembered} units of {grants} leases");
    let late = check(&mut scheduler, "alice", key(1, alices.lease.0), result(&alices.units[0]));
    assert_eq!(late.unwrap().record.results.len(), 1);
    // Once its samples have ended, there is nothing to remember.
    let mut shard = Shard::restore(scheduler.job(), manifest(ShardId(0), 4), &[], vec![]);
    (0..4).for_each(|id| drop(shard.quarantine(failure(SampleId(id)).failures.remove(0))));
    (0..3_000).for_each(|lease| shard.note_grant(key(1, lease), "w", [alices.units[0].id]));
    assert!(shard.remembered() <= 1_024, "{}", shard.remembered());
}
