//! Blocks that fail, and blocks that kill their workers.

use super::*;

/// Reports everything of a block.
fn report_all(brain: &mut Brain, worker: &str, grant: &Grant) {
    let report = Record { results: grant.units.iter().map(evaluate).collect(), failures: vec![] };
    let checked = brain.check(worker, key(1, grant.lease.0), report, false, Duration::ZERO).unwrap();
    brain.apply(checked.record, Some((worker, key(1, grant.lease.0))));
}

#[test]
fn a_failing_sample_is_found_by_bisection_and_only_it_is_given_up() {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    brain.join("a", "host", "cpu", Duration::ZERO);
    brain.join("b", "host", "cpu", Duration::ZERO);
    let (mut given_up, mut failures) = (Vec::new(), 0);
    for turn in 0..200 {
        let worker = ["a", "b"][turn % 2];
        let Some(grant) = brain.grant(worker, 1e6, Duration::ZERO) else { continue };
        if grant.units.iter().any(|u| u.id.sample == SampleId(2)) {
            failures += 1;
            let lost = brain.fail(worker, key(1, grant.lease.0), "out of memory");
            given_up.extend(lost.iter().map(|f| f.sample));
            brain.apply(Record { results: vec![], failures: lost }, None);
        } else {
            report_all(&mut brain, worker, &grant);
        }
    }
    assert_eq!(given_up, [SampleId(2)]);
    assert!(failures <= 8, "{failures}");
    assert_eq!(brain.finished_shards(), [ShardId(0)]);
    assert_eq!(brain.totals().quarantined, 1);
}

/// Lets workers take blocks one after the other and die of those that `kills` says; how many died, and who was given up.
fn die(brain: &mut Brain, kills: impl Fn(&Grant, u32) -> bool) -> (u32, Vec<SampleFailure>) {
    let (mut deaths, mut given_up, mut now) = (0, Vec::new(), Duration::ZERO);
    for turn in 0..400 {
        let worker = format!("w{turn}");
        brain.join(&worker, "host", "cpu", now);
        while let Some(grant) = brain.grant(&worker, 1e6, now) {
            if kills(&grant, deaths) {
                deaths += 1;
                let (silent, lost) = wait(brain, now.as_secs(), now.as_secs() + 31);
                now += Duration::from_secs(31);
                assert_eq!(silent, [worker.as_str()]);
                brain.apply(Record { results: vec![], failures: lost.clone() }, None);
                given_up.extend(lost);
                break;
            }
            report_all(brain, &worker, &grant);
        }
        brain.leave(&worker);
    }
    (deaths, given_up)
}

#[test]
fn a_sample_that_kills_every_worker_is_found_and_given_up() {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    let (deaths, given_up) = die(&mut brain, |grant, _| grant.units.iter().any(|u| u.id.sample == SampleId(1)));
    assert_eq!(given_up.iter().map(|failure| failure.sample).collect::<Vec<_>>(), [SampleId(1)]);
    assert!(given_up[0].error.contains("3 that had nothing else in hand"), "{}", given_up[0].error);
    // Three until the block is suspected, one for each bisection, and three for the sample itself.
    assert!((6..=10).contains(&deaths), "{deaths}");
    assert_eq!(brain.finished_shards(), [ShardId(0)]);
}

#[test]
fn workers_that_are_taken_away_blame_nobody() {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    // Machines go again and again, whatever they compute: that alone gives nobody up.
    let (deaths, given_up) = die(&mut brain, |_, deaths| deaths < 5);
    assert_eq!((deaths, given_up), (5, vec![]));
    assert_eq!(brain.finished_shards(), [ShardId(0)]);
    assert!(brain.deaths.is_empty(), "what is done needs no suspicion");
}

#[test]
fn a_block_that_failed_once_is_not_blamed_for_its_next_workers_death() {
    let mut brain = brain(1, 1);
    open(&mut brain, ShardId(0), 1, vec![]);
    brain.join("a", "host", "cpu", Duration::ZERO);
    let grant = brain.grant("a", 1e9, Duration::ZERO).unwrap();
    assert!(brain.fail("a", key(1, grant.lease.0), "out of memory").is_empty());
    let again = brain.grant("a", 1e9, Duration::ZERO).unwrap();
    assert_eq!(again.attempt, 1);
    let (silent, given_up) = wait(&mut brain, 0, 31);
    assert_eq!((silent.len(), given_up), (1, vec![]));
    brain.join("b", "host", "cpu", Duration::from_secs(31));
    let last = brain.grant("b", 1e9, Duration::from_secs(31)).unwrap();
    // A second failure is one too many.
    assert_eq!(brain.fail("b", key(1, last.lease.0), "out of memory").len(), 1);
}

#[test]
fn nobody_hands_back_or_fails_what_somebody_else_holds() {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    brain.join("owner", "host", "cpu", Duration::ZERO);
    brain.join("thief", "host", "cpu", Duration::ZERO);
    let grant = brain.grant("owner", 0.0, Duration::ZERO).unwrap();
    let held = key(1, grant.lease.0);
    brain.release("thief", &[held]);
    assert!(brain.fail("thief", held, "I say so").is_empty());
    assert!(brain.leases.contains_key(&held) && brain.suspects.is_empty());
}

#[test]
fn what_is_left_of_a_failed_block_is_not_blamed_for_what_was_taken_out_of_it() {
    let mut brain = brain(2, 1);
    open(&mut brain, ShardId(0), 2, vec![]);
    brain.join("a", "host", "cpu", Duration::ZERO);
    brain.join("b", "host", "cpu", Duration::ZERO);
    let fail_next = |brain: &mut Brain, worker: &str| {
        let grant = brain.grant(worker, 1e9, Duration::ZERO).unwrap();
        (brain.fail(worker, key(1, grant.lease.0), "out of memory"), grant)
    };
    assert!(fail_next(&mut brain, "a").0.is_empty());
    assert!(fail_next(&mut brain, "b").0.is_empty());
    // Each sample is by itself now. One is given up for another reason while its worker is at it.
    let grant = brain.grant("a", 1e9, Duration::ZERO).unwrap();
    let sample = grant.units[0].id.sample;
    assert!(grant.units.iter().all(|unit| unit.id.sample == sample) && grant.units.len() > 1);
    let done = Record { results: vec![evaluate(&grant.units[0])], failures: vec![] };
    let checked = brain.check("b", key(1, 1), done, false, Duration::ZERO).unwrap();
    brain.apply(checked.record, Some(("b", key(1, 1))));
    // Whether it failed of that unit or of another is not known: it gets another try.
    assert!(brain.fail("a", key(1, grant.lease.0), "out of memory").is_empty());
    let (given_up, again) = fail_next(&mut brain, "b");
    assert_eq!(again.units.len() + 1, grant.units.len());
    assert_eq!(given_up.len(), 1);
}

#[test]
fn whoever_is_at_something_that_may_be_deadly_has_nothing_else_in_hand() {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    // Three workers die of the first block.
    let mut now = 0;
    for worker in ["a", "b", "c"] {
        brain.join(worker, "host", "cpu", Duration::from_secs(now));
        let block = brain.grant(worker, 0.0, Duration::from_secs(now)).unwrap();
        assert_eq!(block.units[0].id.sample, SampleId(0));
        assert_eq!(wait(&mut brain, now, now + 31), (vec![worker.to_owned()], vec![]));
        now += 31;
    }
    let at = Duration::from_secs(now);
    let is_suspect = |brain: &Brain, grant: &Grant| brain.leases[&key(1, grant.lease.0)].blame.deadly;
    for worker in ["busy", "free"] {
        brain.join(worker, "host", "cpu", at);
    }
    // The first is given the suspects, and until it has done with them nothing more.
    let suspects = brain.grant("busy", 0.0, at).unwrap();
    assert!(is_suspect(&brain, &suspects) && brain.has_ready());
    assert_eq!(brain.grant("busy", 0.0, at), None);
    let other = brain.grant("free", 0.0, at).unwrap();
    assert!(!is_suspect(&brain, &other));
    // They are handed back, and are no less suspect for that; who holds something else is not given them.
    brain.leave("busy");
    while let Some(more) = brain.grant("free", 0.0, at) {
        assert!(!is_suspect(&brain, &more));
    }
    brain.join("new", "host", "cpu", at);
    let again = brain.grant("new", 0.0, at).unwrap();
    assert!(is_suspect(&brain, &again));
    assert_eq!(again.units, suspects.units);
}
