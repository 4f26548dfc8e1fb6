//! An open shard: its samples and the units of them that are ready.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use elbo_common::ids::{LeaseId, SampleId};
use elbo_common::manifest::Sample;
use elbo_common::unit::{Unit, UnitId};

use super::sample::{Finished, SampleState};
use super::{JobShape, SampleFailure, ShardTotals, UnitResult};

/// Why a result adds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is known already.
    Known,
    /// It contradicts the job.
    Invalid(&'static str),
}

/// A result that was merged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Applied {
    pub(super) unit: UnitId,
    pub(super) lease: Option<LeaseId>,
    pub(super) evaluations: u64,
}

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
    /// Ready units of samples nobody has latents of.
    fresh: VecDeque<Ready>,
    /// Ready units of samples whose latents a worker has at hand.
    by_worker: HashMap<String, VecDeque<Ready>>,
    ready_evaluations: u64,
    pub(super) totals: ShardTotals,
}

impl Shard {
    pub(super) fn new(job: &Arc<JobShape>, manifest: Vec<Sample>) -> Self {
        let states: Vec<_> = manifest.iter().map(|s| SampleState::new(job, s)).collect();
        let mut shard = Self {
            job: Arc::clone(job),
            first: manifest.first().map_or(0, |s| s.id.0),
            unfinished: states.iter().filter(|s| !s.is_finished()).count(),
            fresh: VecDeque::new(),
            by_worker: HashMap::new(),
            ready_evaluations: 0,
            totals: ShardTotals::default(),
            manifest,
            states,
        };
        for unit in shard.states.iter().flat_map(|s| s.unit_ids(job)).collect::<Vec<_>>() {
            shard.push_ready(unit, None);
        }
        shard
    }

    fn index(&self, sample: SampleId) -> Option<usize> {
        let index = sample.0.checked_sub(self.first)? as usize;
        (index < self.states.len()).then_some(index)
    }

    /// Queues a unit of its sample's current round.
    fn push_ready(&mut self, unit: UnitId, worker: Option<&str>) {
        let Some(index) = self.index(unit.sample) else { return };
        let ready = Ready { unit, evaluations: self.states[index].unit_evaluations(&self.job, unit) };
        self.ready_evaluations += ready.evaluations;
        match worker {
            Some(worker) => self.by_worker.entry(worker.to_owned()).or_default().push_back(ready),
            None => self.fresh.push_back(ready),
        }
    }

    /// Evaluations waiting for a worker; an upper bound, since units of samples given up are dropped only when met.
    pub(super) fn ready_evaluations(&self) -> u64 {
        self.ready_evaluations
    }

    pub(super) fn has_ready_for(&self, worker: &str) -> bool {
        self.by_worker.get(worker).is_some_and(|q| !q.is_empty())
    }

    /// Takes ready units worth about `target` evaluations, at least one: first those whose latents the worker has, then
    /// fresh ones, then those others have latents of, since affinity never makes anyone wait.
    pub(super) fn take(&mut self, worker: &str, target: u64) -> Vec<UnitId> {
        let mut taken = Vec::new();
        let mut evaluations = 0;
        while evaluations < target {
            let Some(ready) = self.pop(worker) else { break };
            self.ready_evaluations = self.ready_evaluations.saturating_sub(ready.evaluations);
            if self.is_wanted(ready.unit) {
                evaluations += ready.evaluations;
                taken.push(ready.unit);
            }
        }
        taken.sort_unstable();
        taken
    }

    fn pop(&mut self, worker: &str) -> Option<Ready> {
        if let Some(ready) = self.by_worker.get_mut(worker).and_then(VecDeque::pop_front) {
            return Some(ready);
        }
        if let Some(ready) = self.fresh.pop_front() {
            return Some(ready);
        }
        self.by_worker.values_mut().filter(|q| !q.is_empty()).max_by_key(|q| q.len())?.pop_back()
    }

    /// Whether a unit still has to be evaluated by somebody.
    pub(super) fn is_wanted(&self, id: UnitId) -> bool {
        self.index(id.sample).is_some_and(|i| self.states[i].is_ready(&self.job, id))
    }

    pub(super) fn is_unfinished(&self, sample: SampleId) -> bool {
        self.index(sample).is_some_and(|i| !self.states[i].is_finished())
    }

    pub(super) fn lease(&mut self, id: UnitId, lease: LeaseId) -> Option<Unit> {
        let index = self.index(id.sample)?;
        self.states[index].lease(&self.job, id, lease)
    }

    pub(super) fn unlease(&mut self, id: UnitId) {
        if let Some(index) = self.index(id.sample) {
            self.states[index].unlease(&self.job, id);
        }
    }

    /// Puts a unit that came back where anyone finds it.
    pub(super) fn make_ready(&mut self, id: UnitId) {
        if self.is_wanted(id) {
            self.push_ready(id, None);
        }
    }

    /// The latents of a worker that is gone are nobody's.
    pub(super) fn forget(&mut self, worker: &str) {
        if let Some(queue) = self.by_worker.remove(worker) {
            self.fresh.extend(queue);
        }
    }

    /// The samples some units speak of, each once.
    pub(super) fn samples_of(&self, units: &[Unit]) -> Vec<Sample> {
        let mut ids: Vec<_> = units.iter().map(|u| u.id.sample).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.into_iter().filter_map(|id| self.index(id)).map(|i| self.manifest[i].clone()).collect()
    }

    pub(super) fn check(&self, result: &UnitResult) -> Result<(), Refusal> {
        let index = self.index(result.id.sample).ok_or(Refusal::Invalid("there is no such sample"))?;
        match self.states[index].check(&self.job, result) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refusal::Known),
            Err(reason) => Err(Refusal::Invalid(reason)),
        }
    }

    pub(super) fn apply(&mut self, result: UnitResult, worker: Option<&str>) -> Option<Applied> {
        let index = self.index(result.id.sample)?;
        let unit = result.id;
        let settled = self.states[index].apply(&self.job, result)?;
        self.totals.evaluations += settled.evaluations;
        if settled.round_complete {
            if self.states[index].is_finished() {
                self.finish_one(index);
            } else {
                for id in self.states[index].unit_ids(&self.job) {
                    self.push_ready(id, worker);
                }
            }
        }
        Some(Applied { unit, lease: settled.lease, evaluations: settled.evaluations })
    }

    pub(super) fn quarantine(&mut self, failure: SampleFailure) -> Vec<(LeaseId, UnitId)> {
        let Some(index) = self.index(failure.sample).filter(|&i| !self.states[i].is_finished()) else {
            return Vec::new();
        };
        let held = self.states[index].quarantine(&self.job, failure);
        self.totals.quarantined += 1;
        self.finish_one(index);
        held
    }

    fn finish_one(&mut self, index: usize) {
        self.unfinished -= 1;
        self.totals.samples += 1;
        self.totals.spared += self.states[index].spared(&self.job);
    }

    /// Whether every sample has ended.
    pub fn is_finished(&self) -> bool {
        self.unfinished == 0
    }

    /// The samples as listed.
    pub fn manifest(&self) -> &[Sample] {
        &self.manifest
    }

    /// How every finished sample ended, in manifest order.
    pub fn outcomes(&self) -> Vec<Finished> {
        self.states.iter().filter_map(SampleState::finished).collect()
    }
}
