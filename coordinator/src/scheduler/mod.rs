//! The coordinator's state and decisions, as a plain state machine: events in, decisions out.
//!
//! It has no IO, no randomness and no clock: callers pass in `now`, the time since the coordinator started. A test can
//! therefore drive any order of faults through it. A result is checked, persisted and applied: [`Scheduler::check`] says
//! which parts of a report are new and valid, the caller makes them durable, and [`Scheduler::apply`] merges them.
//! Replaying the ledger applies the same records again.
//!
//! The cost of an event depends on what it touches: the units of a lease, or the open shards. It never depends on the size
//! of the corpus, or on the number of workers.

mod active;
mod adopt;
mod backup;
mod failure;
mod grants;
mod job;
mod lease;
mod outcome;
mod record;
mod room;
mod sample;
mod shard;
mod unread;
mod worker;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use elbo_core::failure::FailureStage;
use elbo_core::ids::{Epoch, LeaseKey, SampleId, ShardId};
use elbo_core::sample::Sample;
use elbo_core::unit::{PROMPTS_PER_UNIT, SLOTS_PER_UNIT, UnitId};

pub use job::JobShape;
pub use lease::{LeasePolicy, LeasedBlock};
pub use outcome::{Finished, SampleOutcome, SlotError};
pub use record::{Checked, Record, ReportError, ShardTotals, UnitResult, Waste};
pub use shard::Shard;
pub use worker::{Heartbeat, WorkerView};

use adopt::AdoptedLease;
use failure::Suspects;
use grants::Proof;
use lease::Lease;
use record::ResultStatus;
use unread::Doubt;
use worker::Workers;

/// The coordinator's state.
#[derive(Debug)]
pub struct Scheduler {
    job: Arc<JobShape>,
    epoch: Epoch,
    policy: LeasePolicy,
    open: BTreeMap<ShardId, Shard>,
    /// Shards whose outcomes are being written.
    committing: BTreeMap<ShardId, ShardTotals>,
    done: BTreeSet<ShardId>,
    /// The totals of all committed shards.
    committed: ShardTotals,
    /// Every shard before this one is open, being committed or done.
    next: ShardId,
    workers: Workers,
    leases: HashMap<LeaseKey, Lease>,
    suspects: VecDeque<Suspects>,
    /// Samples that one worker could not read and no other worker has tried yet.
    doubts: BTreeMap<SampleId, Doubt>,
    /// For each unit that is not done, how many workers died while they held it.
    deaths: HashMap<UnitId, u32>,
    /// Blocks that workers hold, of shards that are not open yet.
    adopted_leases: BTreeMap<ShardId, Vec<AdoptedLease>>,
    next_lease: u64,
    /// The latest time that any event has passed in.
    now: Duration,
    /// When [`Scheduler::expire`] last ran.
    listened: Duration,
    /// Evaluations that earlier coordinators merged, in committed shards and in those opened so far.
    earlier: u64,
    /// Shards that are not open though a report or a worker's block refers to them.
    requested: BTreeSet<ShardId>,
    /// Shards whose quarantined samples are retried, and the epoch of the retry. Failures under older leases are void.
    retried: BTreeMap<ShardId, Epoch>,
    waste: Waste,
}

impl Scheduler {
    /// A scheduler for a job whose shards `done` are already committed, with the `waste` of earlier runs.
    pub fn new(
        job: JobShape,
        epoch: Epoch,
        policy: LeasePolicy,
        done: BTreeMap<ShardId, ShardTotals>,
        waste: Waste,
    ) -> Self {
        let mut committed = ShardTotals::default();
        done.values().for_each(|totals| committed.add(*totals));
        Self {
            job: Arc::new(job),
            epoch,
            policy,
            open: BTreeMap::new(),
            committing: BTreeMap::new(),
            done: done.into_keys().collect(),
            committed,
            next: ShardId(0),
            workers: Workers::default(),
            leases: HashMap::new(),
            suspects: VecDeque::new(),
            doubts: BTreeMap::new(),
            deaths: HashMap::new(),
            adopted_leases: BTreeMap::new(),
            next_lease: 0,
            now: Duration::ZERO,
            listened: Duration::ZERO,
            earlier: committed.evaluations,
            requested: BTreeSet::new(),
            retried: BTreeMap::new(),
            waste,
        }
    }

    /// Sets the shards whose quarantined samples are retried, with the epoch of the retry.
    pub fn with_retried(self, retried: BTreeMap<ShardId, Epoch>) -> Self {
        Self { retried, ..self }
    }

    /// The job.
    pub fn job(&self) -> &Arc<JobShape> {
        &self.job
    }

    /// The coordinator's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The next shard to open, if there is room in the window and too little work is ready.
    pub fn wants_shard(&mut self) -> Option<ShardId> {
        if let Some(requested) = self.requested.first() {
            return Some(*requested);
        }
        let held = self.open.len() + self.committing.len();
        let enough = self.policy.ready_target(self.workers.len(), self.workers.rate());
        if held >= self.policy.window(&self.job) || (!self.open.is_empty() && self.ready_evaluations() >= enough) {
            return None;
        }
        while self.is_begun(self.next) {
            self.next.0 += 1;
        }
        (self.next.0 < self.job.shards()).then_some(self.next)
    }

    fn is_begun(&self, id: ShardId) -> bool {
        self.open.contains_key(&id) || self.is_settled(id)
    }

    /// Whether all of a shard's results are known.
    fn is_settled(&self, id: ShardId) -> bool {
        self.done.contains(&id) || self.committing.contains_key(&id)
    }

    /// Opens a shard that was restored from the ledger.
    pub fn open_shard(&mut self, id: ShardId, shard: Shard, now: Duration) {
        self.requested.remove(&id);
        if !self.is_begun(id) {
            self.earlier += shard.totals.evaluations;
            self.open.insert(id, shard);
            self.place_orphans(id, now);
        }
    }

    fn shard_of(&self, sample: SampleId) -> ShardId {
        sample.shard(self.job.shard_size())
    }

    /// An upper bound on the evaluations waiting for a worker.
    pub fn ready_evaluations(&self) -> u64 {
        self.open.values().map(Shard::ready_evaluations).sum()
    }

    /// Whether any work is not leased. A particular worker may still get none of it.
    pub fn has_ready(&self) -> bool {
        !self.suspects.is_empty() || self.has_doubts() || self.open.values().any(|shard| shard.ready_evaluations() > 0)
    }

    /// Whether all remaining work is leased. Other workers may get backups of it as time passes.
    pub fn has_only_leased(&self) -> bool {
        !self.leases.is_empty() && !self.has_ready()
    }

    /// Sorts a report into new and known parts. The new parts must be of units and samples that the worker was given under
    /// the lease. Merges nothing: [`Scheduler::apply`] does that, once they are durable. Samples that perhaps only this
    /// worker can't read are left to other workers, and nothing about them may be made durable. `again` says that the
    /// report was sent before and got no answer.
    pub fn check(
        &mut self,
        worker: &str,
        key: LeaseKey,
        report: Record,
        again: bool,
        now: Duration,
    ) -> Result<Checked, ReportError> {
        self.workers.seen(worker, now);
        self.now = self.now.max(now);
        // Leases of an earlier epoch are known only from the workers that named them when they joined.
        let never = key.epoch == self.epoch && key.lease.0 >= self.next_lease;
        if key.epoch > self.epoch {
            return Err(ReportError::Replaced(key));
        }
        if never || key.epoch == Epoch(0) {
            return Err(ReportError::UnknownLease(key));
        }
        let (mut checked, mut waste) = (Checked::default(), self.waste);
        for result in report.results {
            let sample = result.id.sample;
            let refusal = |reason| ReportError::Invalid { sample: sample.0, round: result.id.round.0, reason };
            let (status, proof) = match self.shard(sample, refusal("there is no such sample"))? {
                None => (ResultStatus::Known { before: None }, Proof::Given),
                Some(shard) => (shard.check(&result), shard.gave_unit(key, worker, result.id)),
            };
            match status {
                ResultStatus::New => {
                    self.require(proof, key, sample)?;
                    checked.record.results.push(result);
                }
                // It changes nothing, so its origin does not matter.
                ResultStatus::Known { .. } if proof == Proof::None => checked.duplicates += 1,
                ResultStatus::Known { before } => {
                    checked.duplicates += 1;
                    // The unit may be gone, so its stated size may not have been compared with the unit: cap it.
                    let evaluations = result.evaluations().min((SLOTS_PER_UNIT * PROMPTS_PER_UNIT) as u64);
                    let since = before.filter(|_| key.epoch == self.epoch);
                    if since.is_some_and(|before| key.lease.0 >= before) {
                        waste.recomputed += evaluations;
                    } else if !again {
                        waste.duplicated += evaluations;
                    }
                }
                // Its shard has since been committed and reopened for a retry, so the sample starts over.
                ResultStatus::Ahead if key.epoch < self.epoch => checked.void.push(result.id),
                ResultStatus::Ahead => return Err(refusal("the sample has not reached this round")),
                ResultStatus::Invalid(reason) => return Err(refusal(reason)),
            }
        }
        for failure in report.failures {
            let refusal =
                ReportError::Invalid { sample: failure.sample.0, round: 0, reason: "there is no such sample" };
            match self.shard(failure.sample, refusal)? {
                Some(shard) if shard.is_unfinished(failure.sample) => {
                    let proof = shard.gave_sample(key, worker, failure.sample);
                    self.require(proof, key, failure.sample)?;
                    if self.is_before_retry(key, failure.sample) {
                        let free = self.take_back(worker, key, failure.sample);
                        self.keep_waiting(free);
                        checked.outdated.push(failure);
                    } else if failure.stage == FailureStage::Unread && !self.is_unreadable(worker, key, failure.sample)
                    {
                        self.postpone(worker, key, failure.sample);
                        checked.postponed.push(failure);
                    } else {
                        checked.record.failures.push(failure);
                    }
                }
                _ => checked.duplicates += 1,
            }
        }
        self.waste = waste;
        Ok(checked)
    }

    /// Whether a lease is older than the retry of the sample.
    fn is_before_retry(&self, key: LeaseKey, sample: SampleId) -> bool {
        self.retried.get(&self.shard_of(sample)).is_some_and(|since| key.epoch < *since)
    }

    /// Refuses a result or failure that the worker was not given under the lease it names.
    fn require(&self, proof: Proof, key: LeaseKey, sample: SampleId) -> Result<(), ReportError> {
        match proof {
            Proof::Given => Ok(()),
            Proof::Other => Err(ReportError::NotOfLease { key, sample }),
            Proof::None if key.epoch < self.epoch => Err(ReportError::Unclaimed(key)),
            Proof::None => Err(ReportError::NotHeld(key)),
        }
    }

    /// The open shard of a sample; `None` if all its results are known, and the error `no_such_sample` if it does not
    /// exist.
    fn shard(&mut self, sample: SampleId, no_such_sample: ReportError) -> Result<Option<&mut Shard>, ReportError> {
        let id = self.shard_of(sample);
        if sample.0 >= self.job.samples() {
            return Err(no_such_sample);
        }
        if !self.is_begun(id) {
            self.requested.insert(id);
            return Err(ReportError::NotOpen(id));
        }
        Ok(self.open.get_mut(&id))
    }

    /// Merges a durable record. `of` is the worker and lease it came from; that worker gets the next round of the samples
    /// it has just evaluated.
    ///
    /// Parts that were applied already are ignored, so two copies of a report that were checked at the same time count
    /// once.
    pub fn apply(&mut self, record: Record, of: Option<(&str, LeaseKey)>) {
        let (worker, key) = of.unzip();
        let (mut evaluations, before) = (0, self.next_lease);
        for result in record.results {
            let shard = self.shard_of(result.id.sample);
            if let Some(held) = self.open.get_mut(&shard).and_then(|s| s.apply(result, worker, before)) {
                evaluations += held.evaluations;
                self.dispel(held.unit.sample);
                self.settle(held, key);
            }
        }
        for failure in record.failures {
            let (sample, shard) = (failure.sample, self.shard_of(failure.sample));
            let held = self.open.get_mut(&shard).map(|shard| shard.quarantine(failure)).unwrap_or_default();
            self.dispel(sample);
            held.into_iter().for_each(|held| self.settle(held, key));
        }
        if let Some(worker) = worker {
            self.workers.credit(worker, evaluations);
        }
    }

    /// Shards with nothing left to evaluate, ready to be committed.
    pub fn finished_shards(&self) -> Vec<ShardId> {
        self.open.iter().filter(|(_, s)| s.is_finished()).map(|(id, _)| *id).collect()
    }

    /// Whether [`Scheduler::finished_shards`] has any.
    pub fn has_finished_shard(&self) -> bool {
        self.open.values().any(Shard::is_finished)
    }

    /// The samples of a finished shard, their outcomes and the shard's totals, to be written. The shard counts as being
    /// committed until [`Scheduler::close_shard`].
    pub fn finished(&mut self, id: ShardId) -> Option<(Vec<Sample>, Vec<Finished>, ShardTotals)> {
        let shard = self.open.remove(&id)?;
        if !shard.is_finished() {
            self.open.insert(id, shard);
            return None;
        }
        let totals = shard.totals;
        self.committing.insert(id, totals);
        let (manifest, outcomes) = shard.into_outcomes();
        Some((manifest, outcomes, totals))
    }

    /// Marks a shard as committed.
    pub fn close_shard(&mut self, id: ShardId) {
        if let Some(totals) = self.committing.remove(&id) {
            self.committed.add(totals);
            self.done.insert(id);
        }
    }

    /// Whether every shard is committed.
    pub fn is_done(&self) -> bool {
        self.done.len() as u32 == self.job.shards()
    }

    /// Totals of committed and open shards together.
    pub fn totals(&self) -> ShardTotals {
        let mut totals = self.committed;
        self.committing.values().for_each(|t| totals.add(*t));
        self.open.values().for_each(|s| totals.add(s.totals));
        totals
    }

    /// The estimated evaluations of the whole job; `None` while there is no estimate.
    pub fn expected_evaluations(&self) -> Option<u64> {
        let open = self.open.values().map(Shard::unfinished).sum();
        self.job.expected_evaluations(self.totals(), open)
    }

    /// Evaluations merged by this coordinator, without those of earlier ones.
    pub fn merged_here(&self) -> u64 {
        self.totals().evaluations.saturating_sub(self.earlier)
    }

    /// Wasted evaluations, in all runs.
    pub fn waste(&self) -> Waste {
        self.waste
    }

    /// `(done, active, pending)` shards.
    pub fn shard_counts(&self) -> (u64, u64, u64) {
        let (done, active) = (self.done.len() as u64, (self.open.len() + self.committing.len()) as u64);
        (done, active, u64::from(self.job.shards()).saturating_sub(done + active))
    }
}

#[cfg(test)]
mod tests;
