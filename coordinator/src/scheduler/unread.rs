//! Samples that one worker could not read though it can read others: another looks at them before they are blamed.
//!
//! A worker that has lost its access to the images leaves and blames none. What is left are single images it can't read, and
//! even then the fault may be its own: a directory that is not mounted there, a key it may not read, an answer that was stale. So
//! the first such report only notes who it was, and the sample goes to others. It is given up
//! - when a worker of another process has failed to read it too, or
//! - when the same process has failed again under a lease it was granted after the first report, while nobody else asked for
//!   work, or after all others had [`LeasePolicy::patience`](super::LeasePolicy) to look and did not.
//!
//! Engines of one process see the same storage with the same credentials: they bear no witness for each other. Processes on one
//! host do, since each has its own mounts, user and environment.
//!
//! None of this is durable: a coordinator that was started again has forgotten a first report, and gets another.

use std::collections::BTreeSet;
use std::time::Duration;

use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::unit::UnitId;

use super::Scheduler;
use super::failure::Blame;

/// The stage of a failure to read that may be the worker's own.
pub const UNREAD: &str = "unread";

/// A sample that was not read, and by whom.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    process: String,
    since: Duration,
    /// Leases from this number on were granted afterwards.
    before: u64,
    /// Its units that nobody has.
    waiting: BTreeSet<UnitId>,
}

impl Scheduler {
    /// Whether a sample that this worker could not read is to be given up.
    pub(super) fn is_unreadable(&self, worker: &str, key: LeaseKey, sample: SampleId) -> bool {
        let Some(doubt) = self.doubts.get(&sample) else { return false };
        let process = self.workers.process(worker);
        if doubt.process != process {
            return true;
        }
        let is_later = key.epoch == self.epoch && key.lease.0 >= doubt.before;
        is_later && (self.has_waited(doubt.since) || !self.is_other_process_there(process))
    }

    /// Leaves a sample that this worker could not read to others.
    pub(super) fn postpone(&mut self, worker: &str, key: LeaseKey, sample: SampleId) {
        let free = self.take_back(worker, key, sample);
        let first = || Doubt {
            process: self.workers.process(worker).to_owned(),
            since: self.now,
            before: self.next_lease,
            waiting: BTreeSet::new(),
        };
        self.doubts.entry(sample).or_insert_with(first).waiting.extend(free);
    }

    /// Takes a sample's units out of a worker's lease; those nobody else computes.
    pub(super) fn take_back(&mut self, worker: &str, key: LeaseKey, sample: SampleId) -> Vec<UnitId> {
        let lease = self.leases.get(&key).filter(|lease| lease.worker == worker);
        let units = lease.map(|lease| lease.units.iter().filter(|unit| unit.sample == sample).copied().collect());
        let units: Vec<_> = units.unwrap_or_default();
        for unit in &units {
            let evaluations = self.open_shard_of(*unit).map_or(0, |shard| shard.unit_evaluations(*unit));
            // Its worker is through with it, as with one that is done.
            self.drop_unit(key, *unit, evaluations, true);
        }
        self.unlease(&units, key)
    }

    /// A sample was read after all, or has ended: what is left of it is for anyone.
    pub(super) fn dispel(&mut self, sample: SampleId) {
        if let Some(doubt) = self.doubts.remove(&sample) {
            doubt.waiting.into_iter().for_each(|unit| self.make_ready(unit));
        }
    }

    /// Units that came back from a worker that was to look at them, or found no room in its block.
    pub(super) fn keep_waiting(&mut self, units: Vec<UnitId>) {
        for unit in units {
            match self.doubts.get_mut(&unit.sample) {
                Some(doubt) => {
                    doubt.waiting.insert(unit);
                }
                None => self.make_ready(unit),
            }
        }
    }

    /// Whether samples wait for somebody to look at them.
    pub(super) fn has_doubts(&self) -> bool {
        self.doubts.values().any(|doubt| !doubt.waiting.is_empty())
    }

    /// Units of samples that others could not read, for a worker to look at: of one shard, worth about a block.
    pub(super) fn take_doubts(&mut self, worker: &str, rate: f64) -> Option<Vec<UnitId>> {
        if self.doubts.is_empty() {
            return None;
        }
        let process = self.workers.process(worker).to_owned();
        let is_alone = !self.is_other_process_there(&process);
        let may_look = |doubt: &Doubt| is_alone || doubt.process != process || self.has_waited(doubt.since);
        let waiting = self.doubts.iter().filter(|(_, doubt)| !doubt.waiting.is_empty() && may_look(doubt));
        let samples: Vec<_> = waiting.map(|(sample, _)| *sample).collect();
        let target = self.policy.block_evaluations(rate, self.ready_evaluations(), self.workers.len());
        let (mut taken, mut evaluations) = (Vec::new(), 0);
        for sample in samples {
            if taken.first().is_some_and(|first: &UnitId| self.shard_of(first.sample) != self.shard_of(sample)) {
                break;
            }
            let waiting = self.doubts.get_mut(&sample).map(|doubt| std::mem::take(&mut doubt.waiting));
            for unit in waiting.unwrap_or_default() {
                if let Some(shard) = self.open_shard_of(unit).filter(|shard| shard.is_wanted(unit)) {
                    evaluations += shard.unit_evaluations(unit);
                    taken.push(unit);
                }
            }
            if evaluations >= target {
                break;
            }
        }
        (!taken.is_empty()).then_some(taken)
    }

    fn is_other_process_there(&self, process: &str) -> bool {
        self.is_somebody_there(|other| self.workers.process(other) != process)
    }
}

impl Blame {
    /// What has to answer for nothing but that somebody could not read it.
    pub(super) const UNREAD: Self = Self { failures: 0, deadly: false, deaths: 0, unread: true };
}
