//! Tests of the scheduler without a network or a clock: single events, and whole simulated clusters.

mod backups;
mod blocks;
mod events;
mod failures;
mod simulation;
mod trust;

use elbo_core::audit::Audit;
use elbo_core::class::{Classes, Hierarchy};
use elbo_core::ensemble::Contenders;
use elbo_core::failure::SampleFailure;
use elbo_core::ids::{LeaseId, PromptIndex, Round};
use elbo_core::noise::{NoiseScope, NoiseSource};
use elbo_core::policy::{Course, Policy, Timesteps};
use elbo_core::unit::Unit;
use elbo_proto::v1;

use super::*;

const SHARD_SIZE: u32 = 4;

fn reference() -> Policy {
    Policy::reference(&[3, 1], &[10, 100], 1).unwrap()
}

/// Seventy prompts. Three remain after ten slots, and one after a hundred.
fn shape(samples: u64, keep_errors: bool) -> JobShape {
    let contenders = Contenders::prompts(70);
    let course = Course::new(&reference(), None, 1000, Some(&contenders)).unwrap();
    JobShape::new(course, contenders, &[(0, samples)].into(), SHARD_SIZE, keep_errors)
}

/// The same seventy prompts in a race with an audit.
fn race(samples: u64, keep_errors: bool) -> JobShape {
    race_among(Contenders::prompts(70), samples, keep_errors)
}

/// The same race below groups: forty classes are in four groups, two of which are in a larger group; thirty classes are in
/// none.
fn grouped(samples: u64, keep_errors: bool) -> JobShape {
    let classes = Classes::parse(&(0..70).map(|i| format!("c{i}\n")).collect::<String>(), &[]).unwrap();
    let group = |g: u32| (0..10).map(|i| format!("c{},g{g}\n", 10 * g + i)).collect::<String>();
    let links = format!("class,parent\ng0,large\ng1,large\n{}", (0..4).map(group).collect::<String>());
    let hierarchy = Hierarchy::parse(&links, &classes, &[]).unwrap();
    race_among(Contenders::prompts(70).below(&hierarchy, &classes), samples, keep_errors)
}

fn race_among(contenders: Contenders, samples: u64, keep_errors: bool) -> JobShape {
    let policy = Policy::race(0.05, 40, Timesteps::default()).unwrap();
    let audit = reference();
    let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
    let course = course.with_audit(&audit, 1000, Some(&contenders)).unwrap();
    let shape = JobShape::new(course, contenders, &[(0, samples)].into(), SHARD_SIZE, keep_errors);
    shape.with_audit(Some(Audit { share: "30%".parse().unwrap(), policy: audit }), 0)
}

/// The course of a job's samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Reference,
    Race,
    Groups,
}

impl Kind {
    fn shape(self, samples: u64) -> JobShape {
        match self {
            Self::Reference => shape(samples, true),
            Self::Race => race(samples, true),
            Self::Groups => grouped(samples, true),
        }
    }

    /// The fewest evaluations of a sample.
    fn least(self) -> u64 {
        match self {
            Self::Reference => self.shape(1).planned_evaluations(),
            Self::Race => 2 * 70,
            // Thirty classes, the large group and two of its size.
            Self::Groups => 2 * 33,
        }
    }
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

fn open(scheduler: &mut Scheduler, shard: ShardId, samples: u64, records: Vec<Record>) {
    let restored = Shard::restore(scheduler.job(), manifest(shard, samples), &[], records);
    scheduler.open_shard(shard, restored, Duration::ZERO);
}

fn scheduler(samples: u64, epoch: u64) -> Scheduler {
    let policy = LeasePolicy { window: 2, first_block: 300, ..LeasePolicy::default() };
    Scheduler::new(shape(samples, true), Epoch(epoch), policy, BTreeMap::new(), Waste::default())
}

/// The error of an evaluation: arbitrary, but the same for every worker.
fn error(sample: SampleId, slot: usize, prompt: PromptIndex) -> f32 {
    let mut out = [0.0];
    let key = format!("{sample}/{slot}");
    NoiseSource::Counter { seed: 1, scope: NoiseScope::Sample }.fill(&key, prompt.0, &mut out);
    out[0].abs() + 0.001 * prompt.0 as f32
}

fn evaluate(unit: &Unit) -> UnitResult {
    let mut reported = v1::UnitResult {
        id: Some(unit.id.into()),
        prompts: unit.prompts.iter().map(|p| p.0).collect(),
        slots: unit.slots.len() as u32,
        ..v1::UnitResult::default()
    };
    for prompt in &unit.prompts {
        let of_slot = |slot| error(unit.id.sample, slot, *prompt);
        reported.errors.extend(unit.slots.clone().map(of_slot));
    }
    UnitResult { id: unit.id, reported }
}

fn key(epoch: u64, lease: u64) -> LeaseKey {
    LeaseKey { epoch: Epoch(epoch), lease: LeaseId(lease) }
}

/// Lets time pass, and expires workers every second as the steward does. Returns the workers and samples that were given
/// up.
fn wait(scheduler: &mut Scheduler, from: u64, to: u64) -> (Vec<String>, Vec<SampleFailure>) {
    let (mut silent, mut given_up) = (Vec::new(), Vec::new());
    for second in from..=to {
        let (workers, samples) = scheduler.expire(Duration::from_secs(second));
        silent.extend(workers);
        given_up.extend(samples);
    }
    (silent, given_up)
}

/// A small deterministic generator, so that a failing seed can be replayed.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides.max(1)
    }
}
