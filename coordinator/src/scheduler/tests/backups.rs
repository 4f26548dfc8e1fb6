//! Tests of backups of slow units, and of blocks that outlive their coordinator or their lease.

use super::*;

const RATE: f64 = 100.0;

/// Two workers, the first of which holds all units.
fn all_leased() -> (Scheduler, Vec<LeasedBlock>) {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    scheduler.join("slow", "host", "cpu", Duration::ZERO);
    let grants: Vec<_> = std::iter::from_fn(|| scheduler.grant("slow", RATE, Duration::ZERO)).collect();
    assert!(!scheduler.has_ready() && grants.len() > 1);
    scheduler.join("idle", "host", "cpu", Duration::ZERO);
    (scheduler, grants)
}

fn report(scheduler: &mut Scheduler, worker: &str, lease: LeaseId, units: &[Unit]) -> Checked {
    let report = Record { results: units.iter().map(evaluate).collect(), failures: vec![] };
    let checked = scheduler.check(worker, key(1, lease.0), report, false, Duration::ZERO).unwrap();
    scheduler.apply(checked.record.clone(), Some((worker, key(1, lease.0))));
    checked
}

#[test]
fn an_idle_worker_computes_what_would_finish_last_and_the_first_result_counts() {
    let (mut scheduler, grants) = all_leased();
    let backup = scheduler.grant("idle", RATE, Duration::from_secs(1)).unwrap();
    let of = |unit: &Unit| grants.iter().position(|grant| grant.units.contains(unit)).unwrap();
    let last = &grants[of(&backup.units[0])];
    assert!(backup.units.iter().all(|unit| last.units.contains(unit)), "a backup takes units of one block");
    assert!(of(&backup.units[0]) > 0, "the block in progress is left to its worker");
    assert!(last.units.ends_with(&backup.units), "a backup takes the end of the block");
    assert_eq!(report(&mut scheduler, "idle", backup.lease, &backup.units).record.results.len(), backup.units.len());
    // The slow worker has computed it for nothing, and is told so before it does more.
    let late = report(&mut scheduler, "slow", last.lease, &last.units);
    assert_eq!(late.duplicates as usize, backup.units.len());
    let evaluations: u64 = backup.units.iter().map(Unit::evaluations).sum();
    assert_eq!(scheduler.waste(), Waste { recomputed: 0, duplicated: evaluations });
    let held = grants.iter().map(|grant| key(1, grant.lease.0)).collect();
    let beat = Heartbeat { held, ..Heartbeat::default() };
    assert_eq!(scheduler.heartbeat("slow", beat, Duration::from_secs(2)).unwrap(), [key(1, last.lease.0)]);
}

#[test]
fn there_is_no_backup_if_it_would_not_help() {
    let (mut scheduler, grants) = all_leased();
    // All but the first block are done. A worker with a hundredth of the speed would not finish it earlier.
    for grant in &grants[1..] {
        report(&mut scheduler, "slow", grant.lease, &grant.units);
    }
    while let Some(next) = scheduler.grant("slow", RATE, Duration::ZERO) {
        report(&mut scheduler, "slow", next.lease, &next.units);
    }
    assert!(scheduler.grant("idle", RATE / 100.0, Duration::from_secs(1)).is_none());
    // It helps if the first worker makes no progress at all.
    scheduler.heartbeat("slow", Heartbeat::default(), Duration::from_secs(3_000)).unwrap();
    assert!(scheduler.grant("idle", RATE / 100.0, Duration::from_secs(3_000)).is_some());
}

#[test]
fn either_lease_goes_on_when_the_other_is_gone() {
    for gone in ["slow", "idle"] {
        let (mut scheduler, _) = all_leased();
        let backup = scheduler.grant("idle", RATE, Duration::ZERO).unwrap();
        scheduler.leave(gone);
        let unit = backup.units[0].id;
        let shard = scheduler.open_shard_of(unit).unwrap();
        assert!(!shard.is_wanted(unit), "another worker still computes it");
        assert_eq!(shard.holders(unit).iter().count(), 1);
    }
}

#[test]
fn a_new_coordinator_leaves_workers_the_blocks_they_have() {
    let (mut before, grants) = all_leased();
    let held: Vec<_> =
        grants.iter().map(|g| (key(1, g.lease.0), g.units.iter().map(|u| u.id).collect::<Vec<_>>())).collect();
    let first = Record { results: vec![evaluate(&grants[0].units[0])], failures: vec![] };
    let checked = before.check("slow", held[0].0, first, false, Duration::ZERO).unwrap();
    // The report is durable, but its acknowledgement and the coordinator are lost.
    let mut after = scheduler(4, 2);
    after.join("slow", "host", "cpu", Duration::ZERO);
    held.iter().for_each(|(key, units)| after.adopt("slow", *key, units, Duration::ZERO));
    assert_eq!(after.wants_shard(), Some(ShardId(0)));
    open(&mut after, ShardId(0), 4, vec![checked.record]);
    // The worker holds everything: nothing is left for another, and only known units are unwanted.
    after.join("other", "host", "cpu", Duration::ZERO);
    let ready = after.take_ready("other", RATE).unwrap_or_default();
    assert!(ready.iter().all(|unit| held.iter().all(|(_, units)| !units.contains(unit))), "{ready:?}");
    let keys: Vec<_> = held.iter().map(|(key, _)| *key).collect();
    let unwanted = after.heartbeat("slow", Heartbeat { held: keys, ..Heartbeat::default() }, Duration::ZERO).unwrap();
    let known_whole = grants[0].units.len() == 1;
    assert_eq!(unwanted, if known_whole { vec![held[0].0] } else { vec![] });
    let rest = Record { results: grants[1].units.iter().map(evaluate).collect(), failures: vec![] };
    let checked = after.check("slow", held[1].0, rest, false, Duration::ZERO).unwrap();
    assert_eq!(checked.duplicates, 0);
}

#[test]
fn a_worker_that_comes_back_after_its_lease_expired_keeps_the_units_that_no_other_has_taken() {
    let (mut scheduler, grants) = all_leased();
    let (silent, _) = wait(&mut scheduler, 0, 31);
    assert!(silent.contains(&"slow".to_owned()));
    scheduler.join("idle", "host", "cpu", Duration::from_secs(32));
    let taken = scheduler.grant("idle", RATE, Duration::from_secs(32)).unwrap();
    scheduler.join("slow", "host", "cpu", Duration::from_secs(33));
    for grant in &grants {
        let units: Vec<_> = grant.units.iter().map(|unit| unit.id).collect();
        scheduler.adopt("slow", key(1, grant.lease.0), &units, Duration::from_secs(33));
    }
    let held: Vec<_> =
        scheduler.leases.values().filter(|lease| lease.worker == "slow").flat_map(|l| &l.units).collect();
    let all: usize = grants.iter().map(|grant| grant.units.len()).sum();
    assert_eq!(held.len() + taken.units.len(), all);
    assert!(taken.units.iter().all(|unit| !held.contains(&&unit.id)));
}
