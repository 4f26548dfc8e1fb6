//! The brain driven through whole jobs, in any order of results and with faults, without a network or a clock.

use super::*;
use elbo_common::ensemble::Contenders;
use elbo_common::ids::{PromptIndex, Round};
use elbo_common::noise::{NoiseScope, NoiseSource};
use elbo_common::policy::Policy;
use elbo_common::unit::{Cut, Unit, UnitId};

const SHARD_SIZE: u32 = 4;

fn shape(samples: u64, keep_errors: bool) -> JobShape {
    let contenders = Contenders::prompts(70);
    let rounds = Policy::reference(&[3, 1], &[10, 100], 1).unwrap().rounds(1000, Some(&contenders)).unwrap();
    JobShape::new(rounds, contenders, &[(0, samples)].into(), SHARD_SIZE, keep_errors)
}

fn manifest(shard: ShardId, samples: u64) -> Vec<Sample> {
    let first = shard.first_sample(SHARD_SIZE).0;
    (first..samples.min(first + u64::from(SHARD_SIZE)))
        .map(|id| Sample {
            id: SampleId(id),
            key: format!("{id}.png"),
            location: format!("/{id}.png"),
            part: None,
            size: 1,
            etag: None,
            label: None,
            candidates: Vec::new(),
            pair: None,
        })
        .collect()
}

fn open(brain: &mut Brain, shard: ShardId, samples: u64, records: Vec<Record>) {
    let restored = Shard::restore(brain.job(), manifest(shard, samples), &[], records);
    brain.open_shard(shard, restored);
}

fn brain(samples: u64, epoch: u64) -> Brain {
    let policy = LeasePolicy { window: 2, first_block: 300, ..LeasePolicy::default() };
    Brain::new(shape(samples, true), Epoch(epoch), policy, BTreeMap::new())
}

/// The error of an evaluation, as good as any and the same for everyone.
fn error(sample: SampleId, round: Round, slot: usize, prompt: PromptIndex) -> f32 {
    let mut out = [0.0];
    let key = format!("{sample}/{round}/{slot}");
    NoiseSource::Counter { seed: 1, scope: NoiseScope::Sample }.fill(&key, prompt.0, &mut out);
    out[0].abs() + 0.001 * prompt.0 as f32
}

fn evaluate(unit: &Unit) -> UnitResult {
    let mut result = UnitResult {
        id: unit.id,
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots: unit.slots.len() as u32,
        sum: Vec::new(),
        sum_sq: Vec::new(),
        errors: Vec::new(),
    };
    for prompt in &unit.prompts {
        let mut sums = elbo_common::sums::Sums::default();
        for slot in unit.slots.clone() {
            let error = error(unit.id.sample, unit.id.round, slot, *prompt);
            sums.add(error);
            result.errors.push(error);
        }
        result.sum.push(sums.sum);
        result.sum_sq.push(sums.sum_sq);
    }
    result
}

/// A small deterministic generator, so that a failing seed replays.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides.max(1)
    }
}

/// Everything a job leaves behind.
type Outcomes = BTreeMap<ShardId, Vec<Finished>>;

/// The world around a brain: what is durable, and what workers hold.
struct World {
    brain: Brain,
    samples: u64,
    ledger: BTreeMap<ShardId, Vec<Record>>,
    committed: Outcomes,
    totals: BTreeMap<ShardId, ShardTotals>,
    in_flight: Vec<(String, Epoch, LeaseId, UnitResult)>,
    accepted: u64,
    now: Duration,
}

impl World {
    fn new(samples: u64) -> Self {
        Self {
            brain: brain(samples, 1),
            samples,
            ledger: BTreeMap::new(),
            committed: Outcomes::new(),
            totals: BTreeMap::new(),
            in_flight: Vec::new(),
            accepted: 0,
            now: Duration::ZERO,
        }
    }

    fn steward(&mut self) {
        while let Some(shard) = self.brain.wants_shard() {
            let records = self.ledger.get(&shard).cloned().unwrap_or_default();
            open(&mut self.brain, shard, self.samples, records);
        }
        for shard in self.brain.finished_shards() {
            let (_, outcomes, totals) = self.brain.finished(shard).unwrap();
            let before = self.committed.insert(shard, outcomes.clone());
            assert!(before.is_none_or(|b| b == outcomes), "a shard written twice must not differ");
            self.ledger.remove(&shard);
            self.totals.insert(shard, totals);
            self.brain.close_shard(shard);
        }
    }

    fn lease(&mut self, worker: &str) {
        if let Some(grant) = self.brain.grant(worker, 50.0, self.now) {
            let epoch = self.brain.epoch();
            let results = grant.units.iter().map(evaluate);
            self.in_flight.extend(results.map(|r| (worker.to_owned(), epoch, grant.lease, r)));
        }
    }

    /// Delivers one result: check, persist, apply.
    fn deliver(&mut self, (worker, epoch, lease, result): (String, Epoch, LeaseId, UnitResult)) {
        let shard = result.id.sample.shard(SHARD_SIZE);
        let report = Record { results: vec![result.clone()], failures: vec![] };
        match self.brain.check(&worker, epoch, lease, report, self.now) {
            Ok(checked) => {
                self.accepted += checked.record.results.len() as u64;
                if !checked.record.results.is_empty() {
                    self.ledger.entry(shard).or_default().push(checked.record.clone());
                }
                self.brain.apply(checked.record, Some(&worker));
            }
            Err(ReportError::NotOpen(_)) => {
                self.steward();
                self.deliver((worker, epoch, lease, result));
            }
            Err(other) => panic!("a valid result was refused: {other}"),
        }
    }

    /// The coordinator dies; a new one finds what was durable.
    fn crash(&mut self) {
        let epoch = self.brain.epoch().0 + 1;
        let policy = LeasePolicy { window: 2, first_block: 300, ..LeasePolicy::default() };
        self.brain = Brain::new(shape(self.samples, true), Epoch(epoch), policy, self.totals.clone());
    }
}

/// Runs a job to its end with `workers` workers and, with faults, crashes, lost and repeated results.
fn run(samples: u64, workers: usize, seed: u64, faults: bool) -> World {
    let mut world = World::new(samples);
    let mut dice = Dice(seed);
    let names: Vec<String> = (0..workers).map(|i| format!("w{i}")).collect();
    for step in 0.. {
        assert!(step < 200_000, "seed {seed}: the job does not end");
        world.now += Duration::from_millis(100);
        world.steward();
        if world.brain.is_done() {
            break;
        }
        let worker = &names[dice.roll(workers)];
        if !world.brain.knows(worker) {
            world.brain.join(worker, "host", "cpu", world.now);
        }
        match dice.roll(if faults { 12 } else { 6 }) {
            0..=1 => world.lease(worker),
            2..=5 if !world.in_flight.is_empty() => {
                let which = dice.roll(world.in_flight.len());
                let result = world.in_flight.swap_remove(which);
                world.deliver(result);
            }
            6 if !world.in_flight.is_empty() => {
                // Delivered, but the reply is lost: it will come again.
                let again = world.in_flight[dice.roll(world.in_flight.len())].clone();
                world.deliver(again);
            }
            7 if dice.roll(10) == 0 => {
                // A worker dies with what it holds.
                world.in_flight.retain(|(w, ..)| w != worker);
                world.brain.leave(worker);
            }
            8 if dice.roll(20) == 0 => world.crash(),
            9 => world.brain.release(&[LeaseId(dice.roll(50) as u64)]),
            10 if dice.roll(5) == 0 => {
                world.now += Duration::from_secs(40);
                world.brain.expire(world.now);
            }
            _ => {}
        }
    }
    world
}

#[test]
fn any_order_of_results_and_faults_gives_the_same_outcomes() {
    let expected = run(10, 1, 0, false);
    assert_eq!(expected.committed.len(), 3);
    for seed in 1..60 {
        let world = run(10, 1 + seed as usize % 5, seed, true);
        assert_eq!(world.committed, expected.committed, "seed {seed}");
        let totals = world.brain.totals();
        assert_eq!(totals.evaluations, shape(10, true).planned_evaluations(), "seed {seed}");
        assert_eq!(totals.samples, 10, "seed {seed}");
    }
}

#[test]
fn every_unit_is_accepted_exactly_once() {
    let shape = shape(1, true);
    let units = |round: usize, prompts| Cut::new(shape.rounds()[round].slots.len(), prompts).units();
    let per_sample = units(0, 70) + units(1, 3);
    for seed in 100..120 {
        let world = run(6, 3, seed, true);
        assert_eq!(world.accepted, 6 * per_sample as u64, "seed {seed}");
    }
}

#[test]
fn without_faults_nothing_is_computed_twice() {
    let world = run(9, 3, 7, false);
    assert_eq!(world.brain.totals().recomputed, 0);
}

#[test]
fn the_outcome_is_that_of_the_policy_applied_to_all_errors() {
    let world = run(4, 2, 5, false);
    let shape = shape(4, true);
    let Outcome::Scored { prompts, errors } = &world.committed[&ShardId(0)][2].outcome else { panic!() };
    let all: Vec<_> = (0..70).map(PromptIndex).collect();
    let mean = |prompt: PromptIndex, rounds: u16| {
        let all: Vec<f64> = (0..rounds)
            .flat_map(|r| (0..shape.rounds()[usize::from(r)].slots.len()).map(move |s| (r, s)))
            .map(|(r, s)| f64::from(error(SampleId(2), Round(r), s, prompt)))
            .collect();
        all.iter().sum::<f64>() / all.len() as f64
    };
    let mut by_first: Vec<_> = all.clone();
    by_first.sort_by(|a, b| mean(*a, 1).total_cmp(&mean(*b, 1)));
    for prompt in &all {
        let survived = by_first[..3].contains(prompt);
        let scored = prompts[prompt.at()];
        assert_eq!(scored.round, Round(u16::from(survived)));
        assert!((scored.sums.mean() - mean(*prompt, 1 + u16::from(survived))).abs() < 1e-9);
    }
    // One row per evaluation, in the order round, prompt, slot.
    assert_eq!(4 * errors.len() as u64, shape.planned_evaluations());
    assert!(errors.is_sorted_by_key(|e| (e.round, e.prompt, e.slot)));
    assert!(errors.iter().all(|e| e.error == error(SampleId(2), e.round, e.slot, e.prompt)));
}

fn started() -> (Brain, Grant) {
    let mut brain = brain(4, 1);
    open(&mut brain, ShardId(0), 4, vec![]);
    brain.join("w", "host", "cpu", Duration::ZERO);
    let grant = brain.grant("w", 0.0, Duration::ZERO).unwrap();
    (brain, grant)
}

fn check(brain: &mut Brain, lease: LeaseId, result: UnitResult) -> Result<Checked, ReportError> {
    let report = Record { results: vec![result], failures: vec![] };
    brain.check("w", Epoch(1), lease, report, Duration::ZERO)
}

#[test]
fn results_that_contradict_the_job_are_refused() {
    let (mut brain, grant) = started();
    let good = evaluate(&grant.units[0]);
    let mut refused = |change: fn(&mut UnitResult)| {
        let mut bad = good.clone();
        change(&mut bad);
        check(&mut brain, grant.lease, bad).unwrap_err().to_string()
    };
    assert!(refused(|r| r.id.round = Round(1)).contains("not come to this round"));
    assert!(refused(|r| r.id.slots = 9).contains("no such unit"));
    assert!(refused(|r| r.id.sample = SampleId(99)).contains("no such sample"));
    assert!(refused(|r| r.prompts[0] = 5).contains("not the unit's"));
    assert!(refused(|r| r.slots = 3).contains("not the unit's"));
    assert!(refused(|r| r.sum.truncate(1)).contains("one sum per prompt"));
    assert!(refused(|r| r.sum[0] = f64::NAN).contains("not sums of errors"));
    assert!(refused(|r| r.sum[0] = -1.0).contains("not sums of errors"));
    assert!(refused(|r| r.errors.clear()).contains("every single error"));
    let never = check(&mut brain, LeaseId(77), good.clone()).unwrap_err();
    assert_eq!(never, ReportError::UnknownLease(LeaseId(77)));
    assert!(check(&mut brain, grant.lease, good).is_ok());
}

#[test]
fn a_known_result_is_a_duplicate_and_counts_as_recomputed() {
    let (mut brain, grant) = started();
    let result = evaluate(&grant.units[0]);
    let checked = check(&mut brain, grant.lease, result.clone()).unwrap();
    brain.apply(checked.record, Some("w"));
    let again = check(&mut brain, grant.lease, result).unwrap();
    assert_eq!((again.record.results.len(), again.duplicates), (0, 1));
    assert_eq!(brain.totals().recomputed, grant.units[0].evaluations());
}

#[test]
fn a_silent_worker_loses_its_leases_to_others() {
    let (mut brain, grant) = started();
    brain.join("other", "host", "cpu", Duration::from_secs(29));
    assert_eq!(brain.expire(Duration::from_secs(31)), ["w"]);
    let mut seen = Vec::new();
    while let Some(next) = brain.grant("other", 0.0, Duration::from_secs(31)) {
        seen.extend(next.units.into_iter().map(|u| u.id));
    }
    assert!(grant.units.iter().all(|u| seen.contains(&u.id)));
}

#[test]
fn a_grant_whose_reply_was_lost_is_granted_again() {
    let (mut brain, lost) = started();
    let second = brain.grant("w", 0.0, Duration::ZERO).unwrap();
    // The worker asks again, and knows of the second lease only.
    brain.keep_only("w", &[second.lease]);
    let mut again = Vec::new();
    while let Some(next) = brain.grant("w", 0.0, Duration::ZERO) {
        again.extend(next.units.into_iter().map(|u| u.id));
    }
    assert!(lost.units.iter().all(|u| again.contains(&u.id)));
    assert!(second.units.iter().all(|u| !again.contains(&u.id)));
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
            let lost = brain.fail(grant.lease, "out of memory");
            given_up.extend(lost.iter().map(|f| f.sample));
            brain.apply(Record { results: vec![], failures: lost }, None);
        } else {
            for unit in &grant.units {
                let checked = brain.check(
                    worker,
                    Epoch(1),
                    grant.lease,
                    Record { results: vec![evaluate(unit)], failures: vec![] },
                    Duration::ZERO,
                );
                brain.apply(checked.unwrap().record, Some(worker));
            }
        }
    }
    assert_eq!(given_up, [SampleId(2)]);
    assert!(failures <= 8, "{failures}");
    assert_eq!(brain.finished_shards(), [ShardId(0)]);
    assert_eq!(brain.totals().quarantined, 1);
}

#[test]
fn a_bad_sample_ends_while_the_rest_of_its_block_goes_on() {
    let (mut brain, grant) = started();
    let sample = grant.units[0].id.sample;
    let failure = SampleFailure { sample, stage: "decode".into(), error: "truncated".into() };
    let report = Record { results: vec![], failures: vec![failure.clone(), failure] };
    let checked = brain.check("w", Epoch(1), grant.lease, report, Duration::ZERO).unwrap();
    brain.apply(checked.record, Some("w"));
    assert_eq!(brain.totals().quarantined, 1);
    let late = evaluate(&grant.units[0]);
    assert_eq!(check(&mut brain, grant.lease, late).unwrap().duplicates, 1);
}

#[test]
fn the_next_round_goes_to_the_worker_that_has_the_latents_but_waits_for_nobody() {
    let (mut brain, grant) = started();
    brain.join("other", "host", "cpu", Duration::ZERO);
    let mut all = vec![grant];
    while let Some(next) = brain.grant("w", 0.0, Duration::ZERO) {
        all.push(next);
    }
    for grant in &all {
        for unit in &grant.units {
            let checked = check(&mut brain, grant.lease, evaluate(unit)).unwrap();
            // Samples 0 and 1 were evaluated by w, the others by somebody else.
            let worker = if unit.id.sample.0 < 2 { "w" } else { "other" };
            brain.apply(checked.record, Some(worker));
        }
    }
    let own = brain.grant("w", 1.0, Duration::ZERO).unwrap();
    assert!(own.units.iter().all(|u| u.id.sample.0 < 2 && u.id.round == Round(1)));
    // When its own are gone, it takes the other's rather than wait.
    let mut samples = Vec::new();
    while let Some(next) = brain.grant("w", 1.0, Duration::ZERO) {
        samples.extend(next.units.iter().map(|u| u.id.sample.0));
    }
    assert!(samples.contains(&3));
}

#[test]
fn memory_is_bounded_by_the_window_whatever_the_corpus() {
    let mut world = World::new(4_000);
    world.brain.join("w", "host", "cpu", Duration::ZERO);
    for _ in 0..2_000 {
        world.steward();
        assert!(world.brain.open.len() <= 2);
        world.lease("w");
        while let Some(result) = world.in_flight.pop() {
            world.deliver(result);
        }
    }
    assert!(world.committed.len() > 100);
}

#[test]
fn fewer_shards_are_open_the_more_they_weigh() {
    let policy = LeasePolicy::default();
    let window = |prompts: usize, shard_size| {
        let contenders = Contenders::prompts(prompts);
        let rounds = Policy::exhaustive(&[10], 1).unwrap().rounds(1000, Some(&contenders)).unwrap();
        policy.window(&JobShape::new(rounds, contenders, &[(0, 1_000_000)].into(), shard_size, false))
    };
    assert_eq!(window(10, 1000), policy.window);
    let large = window(1000, 1000);
    assert!((3..20).contains(&large));
    assert!(large as u64 * 1_000_000 * active::PROMPT_BYTES as u64 <= policy.memory);
    // Two are open whatever they take: one to finish, one to go on with.
    assert_eq!(window(100_000, 1000), 2);
}

#[test]
fn a_restored_shard_hands_out_what_is_left_and_nothing_twice() {
    let (mut before, mut known) = (brain(4, 1), Vec::new());
    open(&mut before, ShardId(0), 4, vec![]);
    before.join("w", "host", "cpu", Duration::ZERO);
    // Sample 0 comes to its second round, sample 1 to half of its first.
    for unit in before.grant("w", 1e6, Duration::ZERO).unwrap().units.iter().filter(|u| u.id.sample.0 < 2) {
        if unit.id.sample.0 == 0 || unit.id.prompts == 0 {
            known.push(Record { results: vec![evaluate(unit)], failures: vec![] });
        }
    }
    let mut after = brain(4, 2);
    let reported: Vec<_> = known.iter().map(|record| record.results[0].id).collect();
    open(&mut after, ShardId(0), 4, known);
    after.join("w", "host", "cpu", Duration::ZERO);
    let mut granted: Vec<UnitId> = Vec::new();
    while let Some(grant) = after.grant("w", 10.0, Duration::ZERO) {
        granted.extend(grant.units.iter().map(|unit| unit.id));
    }
    let shape = shape(4, true);
    let first = Cut::new(shape.rounds()[0].slots.len(), 70);
    let mut expected: Vec<_> = (1..4).flat_map(|sample| first.ids(SampleId(sample), Round(0))).collect();
    expected.retain(|unit| !reported.contains(unit));
    expected.extend(Cut::new(shape.rounds()[1].slots.len(), 3).ids(SampleId(0), Round(1)));
    granted.sort_unstable();
    expected.sort_unstable();
    assert_eq!(granted, expected);
    assert!(!after.has_ready(), "what is counted as ready must be gone when all is granted");
}

#[test]
fn a_shard_that_is_opened_again_leaves_alone_what_it_keeps() {
    let mut brain = brain(4, 1);
    let kept: Vec<_> = [0, 1, 3].map(|id| (SampleId(id), 800)).to_vec();
    let shard = Shard::restore(brain.job(), manifest(ShardId(0), 4), &kept, Vec::new());
    brain.open_shard(ShardId(0), shard);
    brain.join("w", "host", "cpu", Duration::ZERO);
    while let Some(grant) = brain.grant("w", 1e9, Duration::ZERO) {
        assert!(grant.units.iter().all(|unit| unit.id.sample == SampleId(2)));
        let results = grant.units.iter().map(evaluate).collect();
        let report = Record { results, failures: Vec::new() };
        let checked = brain.check("w", Epoch(1), grant.lease, report, Duration::ZERO).unwrap();
        brain.apply(checked.record, Some("w"));
    }
    let (_, outcomes, totals) = brain.finished(ShardId(0)).unwrap();
    let scored: Vec<_> = outcomes.iter().map(|o| matches!(o.outcome, Outcome::Scored { .. })).collect();
    assert_eq!(scored, [false, false, true, false]);
    assert_eq!((totals.samples, totals.quarantined), (4, 0));
    assert_eq!(totals.evaluations + totals.spared, brain.job().planned_evaluations());
}
