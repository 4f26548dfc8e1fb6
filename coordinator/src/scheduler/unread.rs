//! Samples that one worker could not read, though it can read others. Another worker tries before they are given up.
//!
//! A worker that has lost its access to all images leaves, and no image is given up. The other case is a worker that can't
//! read single images. Even then the fault may be its own: a directory that is not mounted there, a key it may not read, a
//! stale answer. So the first such report only records the worker's process, and the sample goes to other workers. The
//! sample is given up
//! - when a worker of another process has also failed to read it, or
//! - when the same process has failed again, under a lease granted after the first report, while no other worker asked for
//!   work, or after all others had [`LeasePolicy::patience`](super::LeasePolicy) to try and did not.
//!
//! Engines of one process see the same storage with the same credentials, so their failures count as one. Processes on one
//! host count separately, since each has its own mounts, user and environment.
//!
//! None of this is durable: a restarted coordinator has forgotten the first report, and gets another.

use std::collections::BTreeSet;
use std::time::Duration;

use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::unit::UnitId;

use super::Scheduler;
use super::failure::Blame;

/// A sample that could not be read, and the process that failed.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    process: String,
    since: Duration,
    /// Leases from this number on were granted after the failure.
    before: u64,
    /// Its units that are not leased.
    waiting: BTreeSet<UnitId>,
}

impl Scheduler {
    /// Whether to give up a sample that this worker could not read.
    pub(super) fn is_unreadable(&self, worker: &str, key: LeaseKey, sample: SampleId) -> bool {
        let Some(doubt) = self.doubts.get(&sample) else { return false };
        let process = self.workers.process(worker);
        if doubt.process != process {
            return true;
        }
        let is_later = key.epoch == self.epoch && key.lease.0 >= doubt.before;
        is_later && (self.has_waited(doubt.since) || !self.is_other_process_there(process))
    }

    /// Leaves a sample that this worker could not read to other workers.
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

    /// Takes a sample's units out of a worker's lease. Returns the units that have no other lease.
    pub(super) fn take_back(&mut self, worker: &str, key: LeaseKey, sample: SampleId) -> Vec<UnitId> {
        let lease = self.leases.get(&key).filter(|lease| lease.worker == worker);
        let units = lease.map(|lease| lease.units.iter().filter(|unit| unit.sample == sample).copied().collect());
        let units: Vec<_> = units.unwrap_or_default();
        for unit in &units {
            let evaluations = self.open_shard_of(*unit).map_or(0, |shard| shard.unit_evaluations(*unit));
            // The worker is finished with this unit, as if it were done.
            self.drop_unit(key, *unit, evaluations, true);
        }
        self.unlease(&units, key)
    }

    /// Clears the doubt about a sample that was read after all, or has ended: its waiting units go to any worker.
    pub(super) fn dispel(&mut self, sample: SampleId) {
        if let Some(doubt) = self.doubts.remove(&sample) {
            doubt.waiting.into_iter().for_each(|unit| self.make_ready(unit));
        }
    }

    /// Takes back units of doubtful samples from a worker that returned them, or whose block had no room for them.
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

    /// Whether any doubtful samples wait for another worker.
    pub(super) fn has_doubts(&self) -> bool {
        self.doubts.values().any(|doubt| !doubt.waiting.is_empty())
    }

    /// Units of samples that others could not read, for a worker to try: from one shard, worth about a block.
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
    /// The blame of units that have only failed to be read.
    pub(super) const UNREAD: Self = Self { failures: 0, deadly: false, deaths: 0, unread: true };
}
