//! Tests of single events and their effects.

use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::unit::Cut;
use elbo_proto::v1;

use super::*;

fn started() -> (Scheduler, LeasedBlock) {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    scheduler.join("w", "host", "cpu", Duration::ZERO);
    let grant = scheduler.grant("w", 0.0, Duration::ZERO).unwrap();
    (scheduler, grant)
}

fn check(scheduler: &mut Scheduler, lease: LeaseId, result: UnitResult) -> Result<Checked, ReportError> {
    let report = Record { results: vec![result], failures: vec![] };
    scheduler.check("w", key(1, lease.0), report, false, Duration::ZERO)
}

#[test]
fn results_that_contradict_the_job_are_refused() {
    let (mut scheduler, grant) = started();
    let good = evaluate(&grant.units[0]);
    let mut refused = |change: fn(&mut UnitResult)| {
        let mut bad = good.clone();
        change(&mut bad);
        check(&mut scheduler, grant.lease, bad).unwrap_err().to_string()
    };
    assert!(refused(|r| r.id.round = Round(1)).contains("not reached this round"));
    assert!(refused(|r| r.id.slots = 9).contains("no such unit"));
    assert!(refused(|r| r.id.sample = SampleId(99)).contains("no such sample"));
    assert!(refused(|r| r.reported.prompts[0] = 5).contains("not the unit's"));
    assert!(refused(|r| r.reported.slots = 3).contains("not the unit's"));
    assert!(refused(|r| r.reported.errors.clear()).contains("every single error"));
    assert!(refused(|r| r.reported.sum.push(1.0)).contains("every single error"));
    assert!(refused(|r| r.reported.errors[0] = f32::NAN).contains("its sums or errors are not valid"));
    assert!(refused(|r| r.reported.errors[0] = -1.0).contains("its sums or errors are not valid"));
    let never = check(&mut scheduler, LeaseId(77), good.clone()).unwrap_err();
    assert_eq!(never, ReportError::UnknownLease(key(1, 77)));
    assert!(check(&mut scheduler, grant.lease, good).is_ok());
}

#[test]
fn the_expected_evaluations_of_a_race_follow_from_ended_samples() {
    let job = race(10, false);
    let planned_each = job.planned_evaluations() / 10;
    let none = ShardTotals { samples: 0, evaluations: 50, ..ShardTotals::default() };
    assert_eq!(job.expected_evaluations(none, 10), None);
    // Four have ended after 200 evaluations each. Two are active, with 300 so far, and four are untouched.
    let totals = ShardTotals { samples: 4, quarantined: 0, evaluations: 1100, spared: 4 * (planned_each - 200) };
    assert_eq!(job.expected_evaluations(totals, 2), Some(1100 + 4 * 200 + 2 * 100));
    let fixed = shape(10, false);
    let spared = ShardTotals { spared: 7, ..ShardTotals::default() };
    assert_eq!(fixed.expected_evaluations(spared, 10), Some(fixed.planned_evaluations() - 7));
}

#[test]
fn a_sample_that_fails_while_it_is_audited_keeps_its_class() {
    let job = Arc::new(race(40, true));
    let audited = (0..4).map(SampleId).find(|id| job.audits(&format!("{id}.png"))).unwrap();
    let mut shard = Shard::restore(&job, manifest(ShardId(0), 40), &[], vec![]);
    let failure = |sample| SampleFailure { sample, stage: FailureStage::Read, error: "gone".into() };
    let before = job.course().slots().len();
    let key = key(1, 1);
    // Finish the race, until units are of the audit's slots.
    'race: loop {
        for id in shard.take("w", u64::MAX, room::Room::new(usize::MAX)) {
            let unit = shard.lease(id, key).unwrap();
            if unit.id.sample == audited && unit.slots.start >= before {
                break 'race;
            }
            shard.apply(evaluate(&unit), None, 2);
        }
    }
    assert!(!shard.quarantine(failure(audited)).is_empty(), "its lease is returned");
    assert_eq!((shard.totals.quarantined, shard.is_unfinished(audited)), (0, false));
    (0..4).map(SampleId).filter(|id| *id != audited).for_each(|id| drop(shard.quarantine(failure(id))));
    let (_, outcomes) = shard.into_outcomes();
    let kept = outcomes.iter().find(|finished| finished.sample == audited).unwrap();
    assert!(matches!(&kept.outcome, SampleOutcome::Scored { audit: None, prompts, .. } if prompts.len() == 70));
}

#[test]
fn invalid_sums_are_refused() {
    let policy = LeasePolicy { first_block: 300, ..LeasePolicy::default() };
    let mut scheduler = Scheduler::new(shape(4, false), Epoch(1), policy, BTreeMap::new(), Waste::default());
    open(&mut scheduler, ShardId(0), 4, vec![]);
    scheduler.join("w", "host", "cpu", Duration::ZERO);
    let grant = scheduler.grant("w", 0.0, Duration::ZERO).unwrap();
    let UnitResult { id, reported: single } = evaluate(&grant.units[0]);
    let sums: Vec<_> = single.errors.chunks(single.slots as usize).map(elbo_core::sums::Sums::of).collect();
    let (sum, sum_sq) = sums.iter().map(|sums| (sums.sum, sums.sum_sq)).unzip();
    let good = UnitResult { id, reported: v1::UnitResult { sum, sum_sq, errors: vec![], ..single } };
    let mut refused = |change: fn(&mut UnitResult)| {
        let mut bad = good.clone();
        change(&mut bad);
        check(&mut scheduler, grant.lease, bad).unwrap_err().to_string()
    };
    assert!(refused(|r| r.reported.sum.truncate(1)).contains("one sum per prompt"));
    assert!(refused(|r| r.reported.sum[0] = f64::NAN).contains("its sums or errors are not valid"));
    assert!(refused(|r| r.reported.sum[0] = -1.0).contains("its sums or errors are not valid"));
    assert!(refused(|r| r.reported.errors.push(1.0)).contains("one sum per prompt"));
    assert!(check(&mut scheduler, grant.lease, good).is_ok());
}

#[test]
fn a_known_result_counts_as_a_duplicate_unless_the_report_was_only_sent_again() {
    let (mut scheduler, grant) = started();
    let result = evaluate(&grant.units[0]);
    let checked = check(&mut scheduler, grant.lease, result.clone()).unwrap();
    scheduler.apply(checked.record, Some(("w", key(1, grant.lease.0))));
    let again = check(&mut scheduler, grant.lease, result).unwrap();
    assert_eq!((again.record.results.len(), again.duplicates), (0, 1));
    let twice = Waste { recomputed: 0, duplicated: grant.units[0].evaluations() };
    assert_eq!(scheduler.waste(), twice);
    let report = Record { results: vec![evaluate(&grant.units[0])], failures: vec![] };
    let sent_again = scheduler.check("w", key(1, grant.lease.0), report.clone(), true, Duration::ZERO).unwrap();
    assert_eq!((sent_again.duplicates, scheduler.waste()), (1, twice));
    // It should never come under a lease that was granted afterwards.
    let later = scheduler.grant("w", 0.0, Duration::ZERO).unwrap();
    scheduler.check("w", key(1, later.lease.0), report, false, Duration::ZERO).unwrap();
    assert_eq!(scheduler.waste(), Waste { recomputed: grant.units[0].evaluations(), ..twice });
}

#[test]
fn a_silent_worker_loses_its_leases_to_others() {
    let (mut scheduler, grant) = started();
    assert_eq!(wait(&mut scheduler, 0, 29), (vec![], vec![]));
    scheduler.join("other", "host", "cpu", Duration::from_secs(29));
    assert_eq!(wait(&mut scheduler, 30, 31), (vec!["w".to_owned()], vec![]));
    let mut seen = Vec::new();
    while let Some(next) = scheduler.grant("other", 0.0, Duration::from_secs(31)) {
        seen.extend(next.units.into_iter().map(|u| u.id));
    }
    assert!(grant.units.iter().all(|u| seen.contains(&u.id)));
}

#[test]
fn a_grant_whose_reply_was_lost_is_granted_again() {
    let (mut scheduler, lost) = started();
    let second = scheduler.grant("w", 0.0, Duration::ZERO).unwrap();
    // The worker asks again, and knows of the second lease only.
    scheduler.keep_only("w", &[key(1, second.lease.0)]);
    let mut again = Vec::new();
    while let Some(next) = scheduler.grant("w", 0.0, Duration::ZERO) {
        again.extend(next.units.into_iter().map(|u| u.id));
    }
    assert!(lost.units.iter().all(|u| again.contains(&u.id)));
    assert!(second.units.iter().all(|u| !again.contains(&u.id)));
}

#[test]
fn a_bad_sample_ends_and_the_rest_of_its_block_goes_on() {
    let (mut scheduler, grant) = started();
    let sample = grant.units[0].id.sample;
    let failure = SampleFailure { sample, stage: FailureStage::Decode, error: "truncated".into() };
    let report = Record { results: vec![], failures: vec![failure.clone(), failure] };
    let checked = scheduler.check("w", key(1, grant.lease.0), report, false, Duration::ZERO).unwrap();
    scheduler.apply(checked.record, Some(("w", key(1, grant.lease.0))));
    assert_eq!(scheduler.totals().quarantined, 1);
    let late = evaluate(&grant.units[0]);
    assert_eq!(check(&mut scheduler, grant.lease, late).unwrap().duplicates, 1);
}

#[test]
fn the_next_round_prefers_the_worker_with_the_latents_but_does_not_wait_for_it() {
    let (mut scheduler, grant) = started();
    scheduler.join("other", "host", "cpu", Duration::ZERO);
    let mut all = vec![grant];
    while let Some(next) = scheduler.grant("w", 0.0, Duration::ZERO) {
        all.push(next);
    }
    for grant in &all {
        for unit in &grant.units {
            let checked = check(&mut scheduler, grant.lease, evaluate(unit)).unwrap();
            // Samples 0 and 1 were evaluated by w, the others by the other worker.
            let worker = if unit.id.sample.0 < 2 { "w" } else { "other" };
            scheduler.apply(checked.record, Some((worker, key(1, grant.lease.0))));
        }
    }
    let own = scheduler.grant("w", 1.0, Duration::ZERO).unwrap();
    assert!(own.units.iter().all(|u| u.id.sample.0 < 2 && u.id.round == Round(1)));
    // When its own units are gone, it takes the other's and does not wait.
    let mut samples = Vec::new();
    while let Some(next) = scheduler.grant("w", 1.0, Duration::ZERO) {
        samples.extend(next.units.iter().map(|u| u.id.sample.0));
    }
    assert!(samples.contains(&3));
}

#[test]
fn fewer_shards_are_open_if_they_take_more_memory() {
    let policy = LeasePolicy::default();
    let window = |prompts: usize, shard_size| {
        let contenders = Contenders::prompts(prompts);
        let exhaustive = Policy::exhaustive(&[10], 1).unwrap();
        let course = Course::new(&exhaustive, None, 1000, Some(&contenders)).unwrap();
        policy.window(&JobShape::new(course, contenders, &[(0, 1_000_000)].into(), shard_size, false))
    };
    assert_eq!(window(10, 1000), policy.window);
    let large = window(1000, 1000);
    assert!((3..20).contains(&large));
    assert!(large as u64 * 1_000_000 * active::PROMPT_BYTES as u64 <= policy.memory);
    // Two are open whatever they take: one to finish, and one to continue with.
    assert_eq!(window(100_000, 1000), 2);
}

#[test]
fn a_restored_shard_leases_the_remaining_units_once() {
    let (mut before, mut known) = (scheduler(4, 1), Vec::new());
    open(&mut before, ShardId(0), 4, vec![]);
    before.join("w", "host", "cpu", Duration::ZERO);
    // Sample 0 reaches its second round, sample 1 half of its first.
    for unit in before.grant("w", 1e6, Duration::ZERO).unwrap().units.iter().filter(|u| u.id.sample.0 < 2) {
        if unit.id.sample.0 == 0 || unit.id.prompts == 0 {
            known.push(Record { results: vec![evaluate(unit)], failures: vec![] });
        }
    }
    let mut after = scheduler(4, 2);
    let reported: Vec<_> = known.iter().map(|record| record.results[0].id).collect();
    open(&mut after, ShardId(0), 4, known);
    after.join("w", "host", "cpu", Duration::ZERO);
    let mut granted: Vec<UnitId> = Vec::new();
    while let Some(grant) = after.grant("w", 10.0, Duration::ZERO) {
        granted.extend(grant.units.iter().map(|unit| unit.id));
    }
    let first = Cut::new(10, 70);
    let mut expected: Vec<_> = (1..4).flat_map(|sample| first.ids(SampleId(sample), Round(0))).collect();
    expected.retain(|unit| !reported.contains(unit));
    expected.extend(Cut::new(90, 3).ids(SampleId(0), Round(1)));
    granted.sort_unstable();
    expected.sort_unstable();
    assert_eq!(granted, expected);
    assert!(!after.has_ready(), "nothing may count as ready once all is granted");
}

#[test]
fn a_reopened_shard_does_not_evaluate_kept_samples() {
    let mut scheduler = scheduler(4, 1);
    let kept: Vec<_> = [0, 1, 3].map(|id| (SampleId(id), 800)).to_vec();
    let shard = Shard::restore(scheduler.job(), manifest(ShardId(0), 4), &kept, Vec::new());
    scheduler.open_shard(ShardId(0), shard, Duration::ZERO);
    scheduler.join("w", "host", "cpu", Duration::ZERO);
    while let Some(grant) = scheduler.grant("w", 1e9, Duration::ZERO) {
        assert!(grant.units.iter().all(|unit| unit.id.sample == SampleId(2)));
        let results = grant.units.iter().map(evaluate).collect();
        let report = Record { results, failures: Vec::new() };
        let checked = scheduler.check("w", key(1, grant.lease.0), report, false, Duration::ZERO).unwrap();
        scheduler.apply(checked.record, Some(("w", key(1, grant.lease.0))));
    }
    let (_, outcomes, totals) = scheduler.finished(ShardId(0)).unwrap();
    let scored: Vec<_> = outcomes.iter().map(|o| matches!(o.outcome, SampleOutcome::Scored { .. })).collect();
    assert_eq!(scored, [false, false, true, false]);
    assert_eq!((totals.samples, totals.quarantined), (4, 0));
    assert_eq!(totals.evaluations + totals.spared, scheduler.job().planned_evaluations());
}

#[test]
fn a_coordinator_that_stood_still_does_not_give_up_workers_it_could_not_hear() {
    let (mut scheduler, grant) = started();
    wait(&mut scheduler, 0, 10);
    // It was stopped for an hour, and the workers' heartbeats wait to be read.
    assert_eq!(scheduler.expire(Duration::from_secs(3_600)), (vec![], vec![]));
    assert!(scheduler.holds("w", key(1, grant.lease.0)));
    // A worker that is really gone is given up one lease time later.
    assert_eq!(wait(&mut scheduler, 3_601, 3_631).0, ["w"]);
}

#[test]
fn impossible_rates_count_as_unknown() {
    for told in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
        let mut scheduler = scheduler(4, 1);
        open(&mut scheduler, ShardId(0), 4, vec![]);
        scheduler.join("w", "host", "cpu", Duration::ZERO);
        let grant = scheduler.grant("w", told, Duration::ZERO).unwrap();
        let unknown = scheduler.policy.first_block;
        assert!(grant.units.iter().map(Unit::evaluations).sum::<u64>() < 3 * unknown, "{told}");
        assert_eq!((scheduler.workers()[0].rate, scheduler.workers.rate()), (0.0, 0.0), "{told}");
    }
}
