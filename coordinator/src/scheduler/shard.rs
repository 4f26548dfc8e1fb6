//! An open shard: its samples and their ready units.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::sample::Sample;
use elbo_core::unit::{Unit, UnitId};

use super::grants::{Grants, Proof};
use super::lease::{Holders, LeasedUnit};
use super::outcome::Finished;
use super::record::ResultStatus;
use super::room::{self, Room};
use super::sample::SampleState;
use super::{JobShape, Record, ShardTotals, UnitResult};

/// A unit that waits for a worker.
#[derive(Clone, Copy, Debug)]
struct Ready {
    unit: UnitId,
    evaluations: u64,
}

/// A contiguous range of samples, the unit of output and of memory.
#[derive(Debug)]
pub struct Shard {
    job: Arc<JobShape>,
    manifest: Vec<Sample>,
    states: Vec<SampleState>,
    first: u64,
    unfinished: usize,
    /// Ready units of samples whose latents no worker has.
    fresh: VecDeque<Ready>,
    /// The first sample whose units are not queued yet. From here on, all units of the first round are ready.
    unqueued: usize,
    /// Ready units of samples whose latents a worker has, by worker. No queue is empty.
    by_worker: BTreeMap<String, VecDeque<Ready>>,
    ready_evaluations: u64,
    /// Which worker was given which units.
    grants: Grants,
    pub(super) totals: ShardTotals,
}

/// The queue that a unit was taken from.
#[derive(Clone, Copy, Debug)]
enum Queue {
    Fresh,
    /// The front of the worker's own queue.
    Own,
    /// The back of another worker's queue.
    Others,
}

impl Shard {
    /// A shard of these samples, restored from the ledger's `records`. The samples in `kept` are done, after the given
    /// number of evaluations. Samples that can't be sent to any worker are quarantined.
    pub fn restore(job: &Arc<JobShape>, manifest: Vec<Sample>, kept: &[(SampleId, u64)], records: Vec<Record>) -> Self {
        let states: Vec<_> = manifest.iter().map(|s| SampleState::new(job, s)).collect();
        let mut shard = Self {
            job: Arc::clone(job),
            first: manifest.first().map_or(0, |s| s.id.0),
            unfinished: states.iter().filter(|s| !s.is_finished()).count(),
            fresh: VecDeque::new(),
            unqueued: 0,
            by_worker: BTreeMap::new(),
            grants: Grants::default(),
            ready_evaluations: states.iter().map(|s| s.first_evaluations(job)).sum(),
            totals: ShardTotals::default(),
            manifest,
            states,
        };
        for (sample, evaluations) in kept {
            shard.keep(*sample, *evaluations);
        }
        let unfit: Vec<_> = shard.manifest.iter().filter_map(|sample| unfit(job, sample)).collect();
        for failure in unfit {
            shard.quarantine(failure);
        }
        for record in records {
            for result in record.results {
                shard.apply(result, None, 0);
            }
            for failure in record.failures {
                shard.quarantine(failure);
            }
        }
        shard
    }

    fn index(&self, sample: SampleId) -> Option<usize> {
        let index = sample.0.checked_sub(self.first)? as usize;
        (index < self.states.len()).then_some(index)
    }

    fn ready(&self, index: usize) -> impl Iterator<Item = Ready> + '_ {
        let state = &self.states[index];
        let job = &self.job;
        state.unit_ids(job).into_iter().map(|unit| Ready { unit, evaluations: state.unit_evaluations(job, unit) })
    }

    /// Queues a unit of its sample's current round.
    fn push_ready(&mut self, ready: Ready, worker: Option<&str>) {
        self.ready_evaluations += ready.evaluations;
        match worker.map(|worker| (worker, self.by_worker.get_mut(worker))) {
            None => self.fresh.push_back(ready),
            Some((_, Some(queue))) => queue.push_back(ready),
            Some((worker, None)) => {
                self.by_worker.insert(worker.to_owned(), VecDeque::from([ready]));
            }
        }
    }

    /// An upper bound on the evaluations waiting for a worker: units of quarantined samples stay queued until they are
    /// popped.
    pub(super) fn ready_evaluations(&self) -> u64 {
        self.ready_evaluations
    }

    pub(super) fn has_ready_for(&self, worker: &str) -> bool {
        self.by_worker.contains_key(worker)
    }

    /// Takes ready units worth about `target` evaluations: at least one, and no more than there is room for. Units whose
    /// latents the worker has come first, then fresh ones, then those whose latents other workers have: affinity never
    /// makes a worker wait.
    pub(super) fn take(&mut self, worker: &str, target: u64, mut room: Room) -> Vec<UnitId> {
        let mut taken = Vec::new();
        let (mut evaluations, mut robbed) = (0, None);
        while evaluations < target {
            let Some((ready, queue)) = self.pop(worker, &mut robbed) else { break };
            let wanted = self.is_wanted(ready.unit);
            if wanted && !self.has_room(&mut room, ready.unit) {
                self.put_back(ready, worker, robbed.as_deref(), queue);
                break;
            }
            self.ready_evaluations = self.ready_evaluations.saturating_sub(ready.evaluations);
            if wanted {
                evaluations += ready.evaluations;
                taken.push(ready.unit);
            }
        }
        taken.sort_unstable();
        // A unit that was adopted while it waited, and then handed back, is queued twice.
        taken.dedup();
        taken
    }

    /// Whether a unit fits into a block; if so, takes its room.
    pub(super) fn has_room(&self, room: &mut Room, id: UnitId) -> bool {
        self.index(id.sample).is_some_and(|index| {
            let unit = self.states[index].unit_bytes(&self.job, id);
            room.takes(id.sample, unit, || room::of_sample(&self.manifest[index]))
        })
    }

    /// The next ready unit for a worker.
    fn pop(&mut self, worker: &str, robbed: &mut Option<String>) -> Option<(Ready, Queue)> {
        if let Some(ready) = self.pop_of(worker, VecDeque::pop_front) {
            return Some((ready, Queue::Own));
        }
        if let Some(ready) = self.pop_fresh() {
            return Some((ready, Queue::Fresh));
        }
        Some((self.steal(robbed)?, Queue::Others))
    }

    /// Puts a unit back where it was taken from.
    fn put_back(&mut self, ready: Ready, worker: &str, robbed: Option<&str>, queue: Queue) {
        match (queue, robbed) {
            (Queue::Own, _) => self.by_worker.entry(worker.to_owned()).or_default().push_front(ready),
            (Queue::Others, Some(owner)) => self.by_worker.entry(owner.to_owned()).or_default().push_back(ready),
            (Queue::Fresh | Queue::Others, _) => self.fresh.push_front(ready),
        }
    }

    fn pop_of(&mut self, worker: &str, pop: fn(&mut VecDeque<Ready>) -> Option<Ready>) -> Option<Ready> {
        let queue = self.by_worker.get_mut(worker)?;
        let ready = pop(queue);
        if queue.is_empty() {
            self.by_worker.remove(worker);
        }
        ready
    }

    fn pop_fresh(&mut self) -> Option<Ready> {
        while self.fresh.is_empty() && self.unqueued < self.states.len() {
            let index = self.unqueued;
            self.unqueued += 1;
            if self.states[index].is_in_first_round() {
                self.fresh = self.ready(index).collect();
            } else {
                // The ledger had results for this sample, and the units of its later round are already queued.
                let first = self.states[index].first_evaluations(&self.job);
                self.ready_evaluations = self.ready_evaluations.saturating_sub(first);
            }
        }
        self.fresh.pop_front()
    }

    /// Takes a unit from the back of another worker's queue: the longest one, whose owner needs longest to reach its end.
    /// Further calls take from the same queue until it is empty.
    fn steal(&mut self, robbed: &mut Option<String>) -> Option<Ready> {
        let still = robbed.as_ref().is_some_and(|worker| self.by_worker.contains_key(worker));
        if !still {
            *robbed = self.by_worker.iter().max_by_key(|(_, queue)| queue.len()).map(|(worker, _)| worker.clone());
        }
        self.pop_of(robbed.as_deref()?, VecDeque::pop_back)
    }

    /// Whether a unit is not done and not leased.
    pub(super) fn is_wanted(&self, id: UnitId) -> bool {
        self.index(id.sample).is_some_and(|i| self.states[i].is_ready(&self.job, id))
    }

    pub(super) fn is_unfinished(&self, sample: SampleId) -> bool {
        self.index(sample).is_some_and(|i| !self.states[i].is_finished())
    }

    /// The leases on a unit.
    pub(super) fn holders(&self, id: UnitId) -> Holders {
        self.index(id.sample).map(|i| self.states[i].holders(id)).unwrap_or_default()
    }

    /// Whether a lease is the only one on a unit.
    pub(super) fn is_held_by(&self, id: UnitId, key: LeaseKey) -> bool {
        self.holders(id) == Holders { first: Some(key), backup: None }
    }

    /// The evaluations a unit of its sample's current round takes.
    pub(super) fn unit_evaluations(&self, id: UnitId) -> u64 {
        self.index(id.sample).map_or(0, |i| self.states[i].unit_evaluations(&self.job, id))
    }

    /// Leases a unit that is not done and has fewer than two leases, and describes it.
    pub(super) fn lease(&mut self, id: UnitId, key: LeaseKey) -> Option<Unit> {
        let index = self.index(id.sample)?;
        self.states[index].lease(&self.job, id, key)
    }

    /// Removes a lease from a unit. Returns whether the unit is ready now.
    pub(super) fn unlease(&mut self, id: UnitId, key: LeaseKey) -> bool {
        self.index(id.sample).is_some_and(|index| self.states[index].unlease(id, key))
    }

    /// Queues a unit that came back, for any worker.
    pub(super) fn make_ready(&mut self, id: UnitId) {
        if self.is_wanted(id) {
            self.push_ready(Ready { unit: id, evaluations: self.unit_evaluations(id) }, None);
        }
    }

    /// Forgets a worker that is gone: its queued units go to the fresh queue.
    pub(super) fn forget(&mut self, worker: &str) {
        if let Some(queue) = self.by_worker.remove(worker) {
            self.fresh.extend(queue);
        }
    }

    /// The samples of these units, each once.
    pub(super) fn samples_of(&self, units: &[Unit]) -> Vec<Sample> {
        let mut ids: Vec<_> = units.iter().map(|u| u.id.sample).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().filter_map(|id| self.index(id)).map(|i| self.manifest[i].clone()).collect()
    }

    /// Remembers the units that a worker was given under a lease.
    pub(super) fn note_grant(&mut self, key: LeaseKey, worker: &str, units: impl IntoIterator<Item = UnitId>) {
        self.grants.note(key, worker, units);
        if self.grants.has_grown() {
            // Keep the memory of grants small compared with the shard's own.
            let most = 64 * self.states.len() + (self.job.shard_bytes() / 64) as usize;
            let (states, first) = (&self.states, self.first);
            let state = |unit: &UnitId| states.get(unit.sample.0.checked_sub(first)? as usize);
            self.grants.forget(
                most,
                |unit| state(unit).is_some_and(|state| !state.is_finished()),
                |key, unit| state(unit).is_some_and(|state| state.holders(*unit).iter().any(|holder| holder == key)),
            );
        }
    }

    /// Whether a worker was given a unit under a lease.
    pub(super) fn gave_unit(&self, key: LeaseKey, worker: &str, unit: UnitId) -> Proof {
        self.grants.unit(key, worker, unit)
    }

    /// Whether a worker was given a sample under a lease.
    pub(super) fn gave_sample(&self, key: LeaseKey, worker: &str, sample: SampleId) -> Proof {
        self.grants.sample(key, worker, sample)
    }

    /// How many leased units are remembered.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.grants.len()
    }

    pub(super) fn check(&mut self, result: &UnitResult) -> ResultStatus {
        match self.index(result.id.sample) {
            Some(index) => self.states[index].check(&self.job, result),
            None => ResultStatus::Invalid("there is no such sample"),
        }
    }

    /// Merges a new result; `None` if it was already known. `before` is the number of the next lease to be granted.
    pub(super) fn apply(&mut self, result: UnitResult, worker: Option<&str>, before: u64) -> Option<LeasedUnit> {
        let index = self.index(result.id.sample)?;
        let settled = self.states[index].apply(&self.job, result, before)?;
        self.totals.evaluations += settled.held.evaluations;
        if settled.round_complete {
            if self.states[index].is_finished() {
                self.finish_one(index);
            } else {
                let next: Vec<_> = self.ready(index).collect();
                next.into_iter().for_each(|ready| self.push_ready(ready, worker));
            }
        }
        Some(settled.held)
    }

    fn keep(&mut self, sample: SampleId, evaluations: u64) {
        if let Some(index) = self.index(sample).filter(|&i| !self.states[i].is_finished()) {
            self.states[index].keep(evaluations);
            self.totals.evaluations += evaluations;
            self.finish_one(index);
        }
    }

    pub(super) fn quarantine(&mut self, failure: SampleFailure) -> Vec<LeasedUnit> {
        let Some(index) = self.index(failure.sample).filter(|&i| !self.states[i].is_finished()) else {
            return Vec::new();
        };
        let held = self.states[index].quarantine(failure);
        self.totals.quarantined += u64::from(self.states[index].is_quarantined());
        self.finish_one(index);
        held
    }

    fn finish_one(&mut self, index: usize) {
        self.unfinished -= 1;
        self.totals.samples += 1;
        self.totals.spared += self.states[index].spared(&self.job);
    }

    /// How many samples have not ended.
    pub(super) fn unfinished(&self) -> u64 {
        self.unfinished as u64
    }

    /// Whether every sample has ended.
    pub fn is_finished(&self) -> bool {
        self.unfinished == 0
    }

    /// The samples as listed, and the outcomes of the finished ones, in manifest order.
    pub fn into_outcomes(self) -> (Vec<Sample>, Vec<Finished>) {
        let outcomes = self.states.into_iter().filter_map(SampleState::into_finished).collect();
        (self.manifest, outcomes)
    }
}

/// The reason why a sample can't be sent to any worker, if there is one.
fn unfit(job: &JobShape, sample: &Sample) -> Option<SampleFailure> {
    let (bytes, most) = (room::of_sample(sample), room::LARGEST_SAMPLE);
    let error = if job.prompts_of(sample.candidates.len()) == 0 {
        "the dataset has no caption for it: give every image at least one".to_owned()
    } else if bytes > most {
        format!(
            "its key, location and captions take {bytes} bytes on the way to a worker, and a sample may take {most}: give it fewer or shorter captions"
        )
    } else {
        return None;
    };
    Some(SampleFailure { sample: sample.id, stage: FailureStage::Read, error })
}
