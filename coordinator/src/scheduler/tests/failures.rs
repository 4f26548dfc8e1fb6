//! Tests of blocks that fail, blocks that kill their workers, and samples that can't be read.

use elbo_core::failure::{FailureStage, SampleFailure};

use super::*;

/// Reports all units of a block.
fn report_all(scheduler: &mut Scheduler, worker: &str, grant: &LeasedBlock) {
    let report = Record { results: grant.units.iter().map(evaluate).collect(), failures: vec![] };
    let checked = scheduler.check(worker, key(1, grant.lease.0), report, false, Duration::ZERO).unwrap();
    scheduler.apply(checked.record, Some((worker, key(1, grant.lease.0))));
}

#[test]
fn bisection_finds_a_failing_sample_and_only_it_is_given_up() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    scheduler.join("a", "host", "cpu", Duration::ZERO);
    scheduler.join("b", "host", "cpu", Duration::ZERO);
    let (mut given_up, mut failures) = (Vec::new(), 0);
    for turn in 0..200 {
        let worker = ["a", "b"][turn % 2];
        let Some(grant) = scheduler.grant(worker, 1e6, Duration::ZERO) else { continue };
        if grant.units.iter().any(|u| u.id.sample == SampleId(2)) {
            failures += 1;
            let lost = scheduler.fail(worker, key(1, grant.lease.0), "out of memory");
            given_up.extend(lost.iter().map(|f| f.sample));
            scheduler.apply(Record { results: vec![], failures: lost }, None);
        } else {
            report_all(&mut scheduler, worker, &grant);
        }
    }
    assert_eq!(given_up, [SampleId(2)]);
    assert!(failures <= 8, "{failures}");
    assert_eq!(scheduler.finished_shards(), [ShardId(0)]);
    assert_eq!(scheduler.totals().quarantined, 1);
}

/// Lets workers take blocks one after another, and die on those for which `kills` returns true. Returns the number of
/// deaths and the samples given up.
fn die(scheduler: &mut Scheduler, kills: impl Fn(&LeasedBlock, u32) -> bool) -> (u32, Vec<SampleFailure>) {
    let (mut deaths, mut given_up, mut now) = (0, Vec::new(), Duration::ZERO);
    for turn in 0..400 {
        let worker = format!("w{turn}");
        scheduler.join(&worker, "host", "cpu", now);
        while let Some(grant) = scheduler.grant(&worker, 1e6, now) {
            if kills(&grant, deaths) {
                deaths += 1;
                let (silent, lost) = wait(scheduler, now.as_secs(), now.as_secs() + 31);
                now += Duration::from_secs(31);
                assert_eq!(silent, [worker.as_str()]);
                scheduler.apply(Record { results: vec![], failures: lost.clone() }, None);
                given_up.extend(lost);
                break;
            }
            report_all(scheduler, &worker, &grant);
        }
        scheduler.leave(&worker);
    }
    (deaths, given_up)
}

#[test]
fn a_sample_that_kills_every_worker_is_found_and_given_up() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    let (deaths, given_up) = die(&mut scheduler, |grant, _| grant.units.iter().any(|u| u.id.sample == SampleId(1)));
    assert_eq!(given_up.iter().map(|failure| failure.sample).collect::<Vec<_>>(), [SampleId(1)]);
    assert!(given_up[0].error.contains("3 more that held nothing else"), "{}", given_up[0].error);
    // Three until the block is suspected, one for each bisection, and three for the sample itself.
    assert!((6..=10).contains(&deaths), "{deaths}");
    assert_eq!(scheduler.finished_shards(), [ShardId(0)]);
}

#[test]
fn no_sample_is_given_up_for_workers_that_are_taken_away() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    // Machines go away again and again, whatever they compute: that alone gives no sample up.
    let (deaths, given_up) = die(&mut scheduler, |_, deaths| deaths < 5);
    assert_eq!((deaths, given_up), (5, vec![]));
    assert_eq!(scheduler.finished_shards(), [ShardId(0)]);
    assert!(scheduler.deaths.is_empty(), "done units keep no count of deaths");
}

#[test]
fn a_block_that_failed_once_is_not_blamed_for_its_next_workers_death() {
    let mut scheduler = scheduler(1, 1);
    open(&mut scheduler, ShardId(0), 1, vec![]);
    scheduler.join("a", "host", "cpu", Duration::ZERO);
    let grant = scheduler.grant("a", 1e9, Duration::ZERO).unwrap();
    assert!(scheduler.fail("a", key(1, grant.lease.0), "out of memory").is_empty());
    let again = scheduler.grant("a", 1e9, Duration::ZERO).unwrap();
    assert_eq!(again.attempt, 1);
    let (silent, given_up) = wait(&mut scheduler, 0, 31);
    assert_eq!((silent.len(), given_up), (1, vec![]));
    scheduler.join("b", "host", "cpu", Duration::from_secs(31));
    let last = scheduler.grant("b", 1e9, Duration::from_secs(31)).unwrap();
    // The second failure gives the sample up.
    assert_eq!(scheduler.fail("b", key(1, last.lease.0), "out of memory").len(), 1);
}

#[test]
fn a_worker_can_not_hand_back_or_fail_a_lease_of_another() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    scheduler.join("owner", "host", "cpu", Duration::ZERO);
    scheduler.join("thief", "host", "cpu", Duration::ZERO);
    let grant = scheduler.grant("owner", 0.0, Duration::ZERO).unwrap();
    let held = key(1, grant.lease.0);
    scheduler.release("thief", &[held]);
    assert!(scheduler.fail("thief", held, "I say so").is_empty());
    assert!(scheduler.leases.contains_key(&held) && scheduler.suspects.is_empty());
}

#[test]
fn the_rest_of_a_failed_block_is_not_blamed_for_units_taken_out_of_it() {
    let mut scheduler = scheduler(2, 1);
    open(&mut scheduler, ShardId(0), 2, vec![]);
    scheduler.join("a", "host", "cpu", Duration::ZERO);
    scheduler.join("b", "host", "cpu", Duration::ZERO);
    let fail_next = |scheduler: &mut Scheduler, worker: &str| {
        let grant = scheduler.grant(worker, 1e9, Duration::ZERO).unwrap();
        (scheduler.fail(worker, key(1, grant.lease.0), "out of memory"), grant)
    };
    assert!(fail_next(&mut scheduler, "a").0.is_empty());
    assert!(fail_next(&mut scheduler, "b").0.is_empty());
    // Each sample is by itself now. One unit is taken out while a worker computes its sample.
    let grant = scheduler.grant("a", 1e9, Duration::ZERO).unwrap();
    let sample = grant.units[0].id.sample;
    assert!(grant.units.iter().all(|unit| unit.id.sample == sample) && grant.units.len() > 1);
    let done = Record { results: vec![evaluate(&grant.units[0])], failures: vec![] };
    let checked = scheduler.check("b", key(1, 1), done, false, Duration::ZERO).unwrap();
    scheduler.apply(checked.record, Some(("b", key(1, 1))));
    // It is unknown whether that unit or another one failed, so the sample gets another try.
    assert!(scheduler.fail("a", key(1, grant.lease.0), "out of memory").is_empty());
    let (given_up, again) = fail_next(&mut scheduler, "b");
    assert_eq!(again.units.len() + 1, grant.units.len());
    assert_eq!(given_up.len(), 1);
}

#[test]
fn a_worker_with_a_deadly_suspect_has_nothing_else_in_hand() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    // Three workers die while they hold the first block.
    let mut now = 0;
    for worker in ["a", "b", "c"] {
        scheduler.join(worker, "host", "cpu", Duration::from_secs(now));
        let block = scheduler.grant(worker, 0.0, Duration::from_secs(now)).unwrap();
        assert_eq!(block.units[0].id.sample, SampleId(0));
        assert_eq!(wait(&mut scheduler, now, now + 31), (vec![worker.to_owned()], vec![]));
        now += 31;
    }
    let at = Duration::from_secs(now);
    let is_suspect = |scheduler: &Scheduler, grant: &LeasedBlock| scheduler.leases[&key(1, grant.lease.0)].blame.deadly;
    for worker in ["busy", "free"] {
        scheduler.join(worker, "host", "cpu", at);
    }
    // The first worker gets the suspects, and nothing more until it is done with them.
    let suspects = scheduler.grant("busy", 0.0, at).unwrap();
    assert!(is_suspect(&scheduler, &suspects) && scheduler.has_ready());
    assert_eq!(scheduler.grant("busy", 0.0, at), None);
    let other = scheduler.grant("free", 0.0, at).unwrap();
    assert!(!is_suspect(&scheduler, &other));
    // The suspects are handed back and stay suspects. A worker that holds something else does not get them.
    scheduler.leave("busy");
    while let Some(more) = scheduler.grant("free", 0.0, at) {
        assert!(!is_suspect(&scheduler, &more));
    }
    scheduler.join("new", "host", "cpu", at);
    let again = scheduler.grant("new", 0.0, at).unwrap();
    assert!(is_suspect(&scheduler, &again));
    assert_eq!(again.units, suspects.units);
}

/// Reports that this worker could not read a sample.
fn could_not_read(scheduler: &mut Scheduler, worker: &str, lease: LeaseId, sample: SampleId, now: u64) -> Checked {
    let failure = SampleFailure { sample, stage: FailureStage::Unread, error: "no such file".into() };
    let report = Record { results: vec![], failures: vec![failure] };
    let checked = scheduler.check(worker, key(1, lease.0), report, false, Duration::from_secs(now)).unwrap();
    scheduler.apply(checked.record.clone(), Some((worker, key(1, lease.0))));
    checked
}

fn join(scheduler: &mut Scheduler, worker: &str, process: &str, now: u64) {
    scheduler.join(worker, "host", "cpu", Duration::from_secs(now));
    scheduler.is_of(worker, process);
}

/// A job of one sample, which the first worker holds and can't read.
fn unread(others: &[(&str, &str)]) -> (Scheduler, LeasedBlock) {
    let mut scheduler = scheduler(1, 1);
    open(&mut scheduler, ShardId(0), 1, vec![]);
    join(&mut scheduler, "a/0", "a", 0);
    others.iter().for_each(|(worker, process)| join(&mut scheduler, worker, process, 0));
    let grant = scheduler.grant("a/0", 1e9, Duration::ZERO).unwrap();
    let checked = could_not_read(&mut scheduler, "a/0", grant.lease, SampleId(0), 1);
    assert_eq!((checked.postponed.len(), checked.record), (1, Record::default()), "the sample is not given up");
    assert!(scheduler.leases.is_empty() && scheduler.has_ready());
    (scheduler, grant)
}

#[test]
fn a_sample_that_one_worker_could_not_read_is_tried_by_another() {
    let (mut scheduler, before) = unread(&[("a/1", "a"), ("b/0", "b")]);
    // An engine of the same process sees the same mount, so it does not get the sample, nor does the first engine again.
    for engine in ["a/0", "a/1"] {
        assert_eq!(scheduler.grant(engine, 1e9, Duration::from_secs(2)), None);
    }
    let again = scheduler.grant("b/0", 1e9, Duration::from_secs(2)).unwrap();
    assert_eq!((again.attempt, &again.units), (0, &before.units));
    report_all(&mut scheduler, "b/0", &again);
    assert!(scheduler.doubts.is_empty());
    assert_eq!(scheduler.totals().quarantined, 0);
    // The next round is for any worker again.
    assert!(scheduler.grant("a/0", 1e9, Duration::from_secs(3)).is_some());
}

#[test]
fn a_sample_that_two_processes_could_not_read_is_given_up() {
    let (mut scheduler, _) = unread(&[("a/1", "a"), ("b/0", "b")]);
    let again = scheduler.grant("b/0", 1e9, Duration::from_secs(2)).unwrap();
    let checked = could_not_read(&mut scheduler, "b/0", again.lease, SampleId(0), 2);
    assert_eq!((checked.postponed.len(), checked.record.failures.len()), (0, 1));
    assert_eq!((scheduler.totals().quarantined, scheduler.finished_shards()), (1, vec![ShardId(0)]));
    assert!(scheduler.doubts.is_empty());
}

#[test]
fn a_single_process_tries_again_before_a_sample_is_given_up() {
    let (mut scheduler, first) = unread(&[("a/1", "a")]);
    // A repeated report is not a second try.
    assert_eq!(could_not_read(&mut scheduler, "a/0", first.lease, SampleId(0), 2).postponed.len(), 1);
    let again = scheduler.grant("a/1", 1e9, Duration::from_secs(2)).unwrap();
    assert_eq!(again.units, first.units);
    assert!(could_not_read(&mut scheduler, "a/1", again.lease, SampleId(0), 3).postponed.is_empty());
    assert_eq!(scheduler.totals().quarantined, 1);
}

#[test]
fn a_worker_that_leaves_returns_the_samples_it_was_to_try() {
    let (mut scheduler, first) = unread(&[("b/0", "b")]);
    let again = scheduler.grant("b/0", 1e9, Duration::from_secs(2)).unwrap();
    scheduler.leave("b/0");
    join(&mut scheduler, "c/0", "c", 3);
    assert_eq!(scheduler.grant("a/0", 1e9, Duration::from_secs(3)), None, "there is another worker again");
    let last = scheduler.grant("c/0", 1e9, Duration::from_secs(3)).unwrap();
    assert_eq!((&last.units, &again.units), (&first.units, &first.units));
}

#[test]
fn many_samples_that_could_not_be_read_are_tried_together() {
    let mut scheduler = scheduler(4, 1);
    open(&mut scheduler, ShardId(0), 4, vec![]);
    join(&mut scheduler, "a", "", 0);
    join(&mut scheduler, "b", "", 0);
    let mut units = 0;
    while let Some(grant) = scheduler.grant("a", 1e9, Duration::ZERO) {
        units += grant.units.len();
        let samples: BTreeSet<_> = grant.units.iter().map(|unit| unit.id.sample).collect();
        for sample in samples {
            could_not_read(&mut scheduler, "a", grant.lease, sample, 0);
        }
    }
    let again = scheduler.grant("b", 1e9, Duration::from_secs(1)).unwrap();
    assert_eq!((again.units.len(), again.samples.len()), (units, 4));
}

#[test]
fn a_worker_that_never_asks_for_work_is_not_waited_for() {
    // The other worker has joined and sends heartbeats, and that is all.
    let beat = |scheduler: &mut Scheduler, now| {
        assert!(scheduler.heartbeat("silent", Heartbeat::default(), Duration::from_secs(now)).is_some());
        wait(scheduler, now, now)
    };
    let patience = LeasePolicy::default().patience().as_secs();
    for stage in [FailureStage::Evaluate, FailureStage::Unread] {
        let mut scheduler = scheduler(1, 1);
        open(&mut scheduler, ShardId(0), 1, vec![]);
        join(&mut scheduler, "silent", "", 0);
        join(&mut scheduler, "a", "", 0);
        let grant = scheduler.grant("a", 1e9, Duration::ZERO).unwrap();
        let fail = |scheduler: &mut Scheduler, lease: LeaseId, now| match stage {
            FailureStage::Unread => drop(could_not_read(scheduler, "a", lease, SampleId(0), now)),
            _ => {
                let failures = scheduler.fail("a", key(1, lease.0), "out of memory");
                scheduler.apply(Record { results: vec![], failures }, None);
            }
        };
        fail(&mut scheduler, grant.lease, 0);
        for now in (0..=patience).step_by(5) {
            beat(&mut scheduler, now);
            assert_eq!(scheduler.grant("a", 1e9, Duration::from_secs(now)), None, "{stage}: it may still ask");
        }
        beat(&mut scheduler, patience + 1);
        let again = scheduler.grant("a", 1e9, Duration::from_secs(patience + 1)).unwrap();
        assert_eq!(again.units, grant.units, "{stage}");
        fail(&mut scheduler, again.lease, patience + 2);
        assert_eq!(scheduler.finished_shards(), [ShardId(0)], "{stage}");
    }
}

#[test]
fn samples_that_others_never_read_go_to_any_worker_after_a_while() {
    let mut scheduler = scheduler(1, 1);
    open(&mut scheduler, ShardId(0), 1, vec![]);
    join(&mut scheduler, "a", "", 0);
    let grant = scheduler.grant("a", 1e9, Duration::ZERO).unwrap();
    could_not_read(&mut scheduler, "a", grant.lease, SampleId(0), 0);
    // Workers without the mount keep joining, take the samples left to others, and leave.
    let patience = LeasePolicy::default().patience().as_secs();
    for now in 1..=patience {
        let name = format!("blind{now}");
        join(&mut scheduler, &name, "", now);
        assert!(scheduler.grant(&name, 1e9, Duration::from_secs(now)).is_some());
        assert_eq!(scheduler.grant("a", 1e9, Duration::from_secs(now)), None);
        scheduler.leave(&name);
    }
    join(&mut scheduler, "blind", "", patience + 1);
    let again = scheduler.grant("a", 1e9, Duration::from_secs(patience + 1)).unwrap();
    could_not_read(&mut scheduler, "a", again.lease, SampleId(0), patience + 1);
    assert_eq!(scheduler.totals().quarantined, 1);
}

#[test]
fn a_failure_from_before_a_retry_gives_nothing_up() {
    // The image was cut off. It has been replaced and its sample retried, while a worker still held the failure.
    let mut old = scheduler(1, 1);
    open(&mut old, ShardId(0), 1, vec![]);
    join(&mut old, "a/0", "a", 0);
    let held: Vec<_> = old.grant("a/0", 1e9, Duration::ZERO).unwrap().units.iter().map(|unit| unit.id).collect();
    for (since, is_void) in [(Some(Epoch(3)), true), (Some(Epoch(1)), false), (None, false)] {
        let mut scheduler = scheduler(1, 3).with_retried(since.map(|since| (ShardId(0), since)).into_iter().collect());
        open(&mut scheduler, ShardId(0), 1, vec![]);
        join(&mut scheduler, "a/0", "a", 0);
        scheduler.adopt("a/0", key(1, 0), &held, Duration::ZERO);
        assert_eq!(scheduler.grant("a/0", 1e9, Duration::ZERO), None, "it has everything");
        let mut fails = |of: LeaseKey| {
            let failure = SampleFailure { sample: SampleId(0), stage: FailureStage::Decode, error: "cut off".into() };
            let report = Record { results: vec![], failures: vec![failure] };
            let checked = scheduler.check("a/0", of, report, false, Duration::from_secs(1)).unwrap();
            scheduler.apply(checked.record.clone(), Some(("a/0", of)));
            let again = scheduler.grant("a/0", 1e9, Duration::from_secs(2));
            (checked.outdated.len(), checked.record.failures.len(), again, scheduler.totals().quarantined)
        };
        let (outdated, failures, again, quarantined) = fails(key(1, 0));
        assert_eq!((outdated, failures, quarantined), if is_void { (1, 0, 0) } else { (0, 1, 1) });
        assert_eq!(again.is_some(), is_void);
        if let Some(again) = again {
            assert!(again.units.iter().map(|unit| unit.id).eq(held.iter().copied()));
            // A failure now counts.
            assert_eq!(fails(key(3, again.lease.0)), (0, 1, None, 1));
        }
    }
}
