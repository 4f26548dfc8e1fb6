//! What the coordinator knows and decides, as a plain state machine: events in, decisions out.
//!
//! No IO, no clock (callers hand in `now`, the time since the coordinator started), no randomness: a test can drive any
//! order of faults through it. The protocol of a result is check, persist, apply: [`Brain::check`] says which parts of a
//! report are new and valid, the caller makes them durable, and [`Brain::apply`] merges them. Replaying the ledger is
//! applying the same records again.

mod lease;
mod sample;
mod shard;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use elbo_common::ensemble::Contenders;
use elbo_common::ids::{Epoch, LeaseId, SampleId, ShardId};
use elbo_common::manifest::Sample;
use elbo_common::policy::{RoundSlots, costs};
use elbo_common::record::Totals;
use elbo_common::unit::{Unit, UnitId};

pub use lease::{Grant, LeasePolicy};
pub use sample::{Finished, Outcome, ScoredPrompt, SlotError};
pub use shard::Shard;

use lease::{Lease, Suspects, Worker};
use shard::Refusal;

/// What the brain must know of a job.
#[derive(Clone, Debug)]
pub struct JobShape {
    rounds: Vec<RoundSlots>,
    /// What competes for a sample without captions of its own.
    contenders: Arc<Contenders>,
    samples: u64,
    shard_size: u32,
    keep_errors: bool,
    planned: u64,
}

impl JobShape {
    /// The shape of a job with shards of `shard_size`, in which `contenders` compete for every sample without captions of
    /// its own; `samples` counts the samples by their number of captions, and `keep_errors` says whether single errors are
    /// kept.
    pub fn new(
        rounds: Vec<RoundSlots>,
        contenders: Contenders,
        samples: &BTreeMap<usize, u64>,
        shard_size: u32,
        keep_errors: bool,
    ) -> Self {
        let contenders = Arc::new(contenders);
        let mut job = Self { rounds, contenders, samples: 0, shard_size, keep_errors, planned: 0 };
        for (captions, count) in samples {
            job.samples += count;
            job.planned += count * job.evaluations_of(&job.contenders_of(*captions));
        }
        job
    }

    /// The rounds of every sample.
    pub fn rounds(&self) -> &[RoundSlots] {
        &self.rounds
    }

    /// Samples in the manifest.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// What competes for a sample with so many captions of its own.
    fn contenders_of(&self, captions: usize) -> Arc<Contenders> {
        if captions == 0 { Arc::clone(&self.contenders) } else { Arc::new(Contenders::prompts(captions)) }
    }

    /// How many shards the job has.
    pub fn shards(&self) -> u32 {
        self.samples.div_ceil(u64::from(self.shard_size.max(1))) as u32
    }

    /// The evaluations of all samples if none is given up; the most there can be where classes have unequally many prompts.
    pub fn planned_evaluations(&self) -> u64 {
        self.planned
    }

    /// The evaluations of a sample that is not given up, or the most there can be.
    fn evaluations_of(&self, contenders: &Contenders) -> u64 {
        costs(&self.rounds, contenders).iter().map(|c| c.evaluations).sum()
    }
}

/// The sums of one unit as a worker reports them.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitResult {
    /// The unit.
    pub id: UnitId,
    /// Its prompts, as the worker understood them.
    pub prompts: Vec<u32>,
    /// How many slots each prompt was evaluated on.
    pub slots: u32,
    /// Sum of errors by prompt.
    pub sum: Vec<f64>,
    /// Sum of squared errors by prompt.
    pub sum_sq: Vec<f64>,
    /// Every error, prompt by prompt, where the job keeps them.
    pub errors: Vec<f32>,
}

/// A sample no worker can evaluate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleFailure {
    /// The sample.
    pub sample: SampleId,
    /// Where it failed: read, decode, encode or evaluate.
    pub stage: String,
    /// Why.
    pub error: String,
}

/// What one report adds: the unit of durability.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Results of units that were not known.
    pub results: Vec<UnitResult>,
    /// Samples that failed.
    pub failures: Vec<SampleFailure>,
}

/// A report that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// The shard of a result is neither open nor done: open it and check again.
    #[error("shard {0} is not open")]
    NotOpen(ShardId),
    /// The lease was never granted.
    #[error("lease {0} was never granted by this coordinator")]
    UnknownLease(LeaseId),
    /// A result contradicts the job.
    #[error("the result of sample {sample}, round {round} was refused: {reason}")]
    Invalid {
        /// The sample.
        sample: u64,
        /// The round.
        round: u16,
        /// What is wrong.
        reason: &'static str,
    },
}

/// A checked report.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    /// What is new and must be made durable.
    pub record: Record,
    /// Results that were known already.
    pub duplicates: u32,
}

/// What a done shard contributed to the job's totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardTotals {
    /// Samples in the shard.
    pub samples: u64,
    /// Samples of it that were quarantined.
    pub quarantined: u64,
    /// Evaluations its predictions rest on.
    pub evaluations: u64,
    /// Evaluations that were reported more than once.
    pub recomputed: u64,
    /// Evaluations that were planned and turned out not to be needed: of samples given up, and of classes with fewer
    /// prompts than others.
    pub spared: u64,
}

impl From<ShardTotals> for Totals {
    fn from(totals: ShardTotals) -> Self {
        let ShardTotals { samples, quarantined, evaluations, recomputed, spared: _ } = totals;
        Self { samples, quarantined, evaluations, evaluations_recomputed: recomputed }
    }
}

impl ShardTotals {
    pub(crate) fn add(&mut self, other: Self) {
        self.samples += other.samples;
        self.quarantined += other.quarantined;
        self.evaluations += other.evaluations;
        self.recomputed += other.recomputed;
        self.spared += other.spared;
    }
}

/// The coordinator's state.
#[derive(Debug)]
pub struct Brain {
    job: Arc<JobShape>,
    epoch: Epoch,
    policy: LeasePolicy,
    open: BTreeMap<ShardId, Shard>,
    done: BTreeMap<ShardId, ShardTotals>,
    workers: HashMap<String, Worker>,
    leases: HashMap<LeaseId, Lease>,
    suspects: VecDeque<Suspects>,
    next_lease: u64,
    /// Shards that reports speak of though they are not open.
    requested: BTreeSet<ShardId>,
    /// Evaluations reported a second time, not yet in any shard's totals.
    recomputed: u64,
}

impl Brain {
    /// A brain for a job whose shards `done` are committed already.
    pub fn new(job: JobShape, epoch: Epoch, policy: LeasePolicy, done: BTreeMap<ShardId, ShardTotals>) -> Self {
        Self {
            job: Arc::new(job),
            epoch,
            policy,
            open: BTreeMap::new(),
            done,
            workers: HashMap::new(),
            leases: HashMap::new(),
            suspects: VecDeque::new(),
            next_lease: 0,
            requested: BTreeSet::new(),
            recomputed: 0,
        }
    }

    /// The job.
    pub fn job(&self) -> &JobShape {
        &self.job
    }

    /// The coordinator's incarnation.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The next shard to open, while there is room in the window and too little work is ready.
    pub fn wants_shard(&self) -> Option<ShardId> {
        if let Some(requested) = self.requested.first() {
            return Some(*requested);
        }
        let ready: u64 = self.open.values().map(Shard::ready_evaluations).sum();
        let enough = self.policy.ready_target(self.workers.len(), &self.rates());
        if self.open.len() >= self.policy.window || (!self.open.is_empty() && ready >= enough) {
            return None;
        }
        (0..self.job.shards()).map(ShardId).find(|s| !self.done.contains_key(s) && !self.open.contains_key(s))
    }

    /// Opens a shard with its samples, replaying what the ledger remembers of it.
    pub fn open_shard(&mut self, id: ShardId, samples: Vec<Sample>, records: Vec<Record>) {
        self.requested.remove(&id);
        if self.done.contains_key(&id) || self.open.contains_key(&id) {
            return;
        }
        self.open.insert(id, Shard::new(&self.job, samples));
        records.into_iter().for_each(|record| {
            self.apply(record, None);
        });
    }

    /// A worker introduces itself, or does so again.
    pub fn join(&mut self, worker: &str, host: &str, device: &str, now: Duration) {
        let known = self.workers.entry(worker.to_owned()).or_default();
        known.host = host.to_owned();
        known.device = device.to_owned();
        known.last_seen = now;
    }

    /// Notes that a worker is alive; `false` when it must join (again).
    pub fn heartbeat(&mut self, worker: &str, unreported: u64, now: Duration) -> bool {
        match self.workers.get_mut(worker) {
            Some(known) => {
                known.last_seen = now;
                known.unreported = unreported;
                true
            }
            None => false,
        }
    }

    /// Whether a worker has joined and not been given up.
    pub fn knows(&self, worker: &str) -> bool {
        self.workers.contains_key(worker)
    }

    /// Leases units to a worker; `None` when nothing is ready.
    pub fn grant(&mut self, worker: &str, rate: f64, now: Duration) -> Option<Grant> {
        let workers = self.workers.len();
        let known = self.workers.get_mut(worker)?;
        known.last_seen = now;
        known.rate = if rate.is_finite() { rate.max(0.0) } else { 0.0 };
        let lease = LeaseId(self.next_lease);
        let (units, attempt) = match self.take_suspects(worker) {
            Some(suspects) => (suspects.units, suspects.attempts),
            None => (self.take_ready(worker, workers, rate)?, 0),
        };
        self.next_lease += 1;
        let shard = self.shard_of(units.first()?.sample);
        let open = self.open.get_mut(&shard)?;
        let block: Vec<Unit> = units.iter().filter_map(|&id| open.lease(id, lease)).collect();
        let samples = open.samples_of(&block);
        self.leases.insert(lease, Lease { worker: worker.to_owned(), units, attempt });
        Some(Grant { lease, attempt, units: block, samples })
    }

    fn take_suspects(&mut self, worker: &str) -> Option<Suspects> {
        // Suspects go to somebody else than the one they failed on, as long as there is somebody else.
        let alone = self.workers.len() < 2;
        let position = self.suspects.iter().position(|s| alone || s.failed_on != worker)?;
        let mut suspects = self.suspects.remove(position)?;
        let (open, shard_size) = (&self.open, self.job.shard_size);
        suspects.units.retain(|id| open.get(&id.sample.shard(shard_size)).is_some_and(|s| s.is_wanted(*id)));
        if suspects.units.is_empty() { self.take_suspects(worker) } else { Some(suspects) }
    }

    fn take_ready(&mut self, worker: &str, workers: usize, rate: f64) -> Option<Vec<UnitId>> {
        loop {
            let ready: u64 = self.open.values().map(Shard::ready_evaluations).sum();
            let target = self.policy.block_evaluations(rate, ready, workers);
            // Older shards first, so that they get committed; but latents a worker has at hand come before.
            let own = self.open.iter().find(|(_, s)| s.has_ready_for(worker)).map(|(id, _)| *id);
            let any = self.open.iter().find(|(_, s)| s.ready_evaluations() > 0).map(|(id, _)| *id);
            // A queue may hold nothing but units that were settled meanwhile: then it is empty now, and the next is tried.
            let units = self.open.get_mut(&own.or(any)?)?.take(worker, target);
            if !units.is_empty() {
                return Some(units);
            }
        }
    }

    fn shard_of(&self, sample: SampleId) -> ShardId {
        sample.shard(self.job.shard_size)
    }

    /// Sorts a report into what is new and what was known. Merges nothing: that is for [`Brain::apply`], once it is durable.
    pub fn check(
        &mut self,
        worker: &str,
        epoch: Epoch,
        lease: LeaseId,
        report: Record,
        now: Duration,
    ) -> Result<Checked, ReportError> {
        if let Some(known) = self.workers.get_mut(worker) {
            known.last_seen = now;
        }
        // Leases of an earlier incarnation are unknown here, but their results are as good as any.
        if epoch > self.epoch || (epoch == self.epoch && lease.0 >= self.next_lease) {
            return Err(ReportError::UnknownLease(lease));
        }
        let mut checked = Checked::default();
        for result in report.results {
            let sample = result.id.sample;
            let refusal = |reason| ReportError::Invalid { sample: sample.0, round: result.id.round.0, reason };
            let verdict = match self.shard(sample, refusal("there is no such sample"))? {
                None => Err(Refusal::Known),
                Some(shard) => shard.check(&result),
            };
            match verdict {
                Ok(()) => checked.record.results.push(result),
                Err(Refusal::Known) => {
                    checked.duplicates += 1;
                    self.recomputed += u64::from(result.slots) * result.prompts.len() as u64;
                }
                Err(Refusal::Invalid(reason)) => return Err(refusal(reason)),
            }
        }
        for failure in report.failures {
            let refusal =
                ReportError::Invalid { sample: failure.sample.0, round: 0, reason: "there is no such sample" };
            match self.shard(failure.sample, refusal)? {
                Some(shard) if shard.is_unfinished(failure.sample) => checked.record.failures.push(failure),
                _ => checked.duplicates += 1,
            }
        }
        Ok(checked)
    }

    /// The open shard of a sample, `None` when it is done; `no_such_sample` where there is none.
    fn shard(&mut self, sample: SampleId, no_such_sample: ReportError) -> Result<Option<&Shard>, ReportError> {
        let id = self.shard_of(sample);
        if sample.0 >= self.job.samples {
            return Err(no_such_sample);
        }
        if !self.open.contains_key(&id) && !self.done.contains_key(&id) {
            self.requested.insert(id);
            return Err(ReportError::NotOpen(id));
        }
        Ok(self.open.get(&id))
    }

    /// Merges a durable record. `worker` gets the next round of the samples it has just evaluated.
    ///
    /// Parts that were applied already are ignored, so that two copies of a report that were checked at the same time
    /// count once.
    pub fn apply(&mut self, record: Record, worker: Option<&str>) {
        let mut evaluations = 0;
        for result in record.results {
            let shard = self.shard_of(result.id.sample);
            if let Some(applied) = self.open.get_mut(&shard).and_then(|s| s.apply(result, worker)) {
                evaluations += applied.evaluations;
                if let Some(lease) = applied.lease {
                    self.settle(lease, applied.unit);
                }
            }
        }
        for failure in record.failures {
            let shard = self.shard_of(failure.sample);
            if let Some(shard) = self.open.get_mut(&shard) {
                for (lease, unit) in shard.quarantine(failure) {
                    self.settle(lease, unit);
                }
            }
        }
        if let Some(known) = worker.and_then(|w| self.workers.get_mut(w)) {
            known.evaluations += evaluations;
        }
    }

    fn settle(&mut self, lease: LeaseId, unit: UnitId) {
        if let Some(open) = self.leases.get_mut(&lease) {
            open.units.retain(|u| *u != unit);
            if open.units.is_empty() {
                self.leases.remove(&lease);
            }
        }
    }

    /// A worker hands leases back.
    pub fn release(&mut self, leases: &[LeaseId]) {
        for lease in leases {
            if let Some(lease) = self.leases.remove(lease) {
                self.requeue(lease.units);
            }
        }
    }

    /// Takes back what `worker` was granted but does not hold: a grant whose reply was lost would else be waited for as
    /// long as the worker lives.
    pub fn keep_only(&mut self, worker: &str, held: &[LeaseId]) {
        let lost: Vec<_> =
            self.leases.iter().filter(|(id, l)| l.worker == worker && !held.contains(id)).map(|(id, _)| *id).collect();
        self.release(&lost);
    }

    /// A lease whose evaluation failed. Returns the samples that are beyond help.
    ///
    /// The block is tried once more; then it is bisected, down to single samples, which are given up after their second
    /// failure.
    pub fn fail(&mut self, lease: LeaseId, error: &str) -> Vec<SampleFailure> {
        let Some(failed) = self.leases.remove(&lease) else { return Vec::new() };
        self.unlease(&failed.units);
        let attempts = failed.attempt + 1;
        if attempts < 2 {
            self.suspects.push_back(Suspects { units: failed.units, attempts, failed_on: failed.worker });
            return Vec::new();
        }
        let mut samples: Vec<_> = failed.units.iter().map(|u| u.sample).collect();
        samples.dedup();
        if let [sample] = samples[..] {
            return vec![SampleFailure { sample, stage: "evaluate".into(), error: error.to_owned() }];
        }
        let middle = samples[samples.len() / 2];
        let (low, high): (Vec<_>, Vec<_>) = failed.units.into_iter().partition(|u| u.sample < middle);
        for units in [low, high] {
            // One attempt each is behind them: the next failure of a half splits it again.
            self.suspects.push_back(Suspects { units, attempts: 1, failed_on: failed.worker.clone() });
        }
        Vec::new()
    }

    fn unlease(&mut self, units: &[UnitId]) {
        for unit in units {
            if let Some(shard) = self.open.get_mut(&unit.sample.shard(self.job.shard_size)) {
                shard.unlease(*unit);
            }
        }
    }

    fn requeue(&mut self, units: Vec<UnitId>) {
        self.unlease(&units);
        for unit in units {
            if let Some(shard) = self.open.get_mut(&unit.sample.shard(self.job.shard_size)) {
                shard.make_ready(unit);
            }
        }
    }

    /// Forgets workers that gave no sign of life for the lease time, and takes their leases back.
    pub fn expire(&mut self, now: Duration) -> Vec<String> {
        let silent: Vec<String> = self
            .workers
            .iter()
            .filter(|(_, w)| now.saturating_sub(w.last_seen) > self.policy.time_to_live)
            .map(|(name, _)| name.clone())
            .collect();
        silent.iter().for_each(|worker| self.leave(worker));
        silent
    }

    /// A worker is gone: its leases go to others.
    pub fn leave(&mut self, worker: &str) {
        self.workers.remove(worker);
        let leases: Vec<_> = self.leases.iter().filter(|(_, l)| l.worker == worker).map(|(id, _)| *id).collect();
        self.release(&leases);
        self.open.values_mut().for_each(|shard| shard.forget(worker));
    }

    /// Shards with nothing left to evaluate, ready to be committed.
    pub fn finished_shards(&self) -> Vec<ShardId> {
        self.open.iter().filter(|(_, s)| s.is_finished()).map(|(id, _)| *id).collect()
    }

    /// The samples of a finished shard, how they ended, and its totals, to be written; it stays open until
    /// [`Brain::close_shard`].
    pub fn finished(&mut self, id: ShardId) -> Option<(Vec<Sample>, Vec<Finished>, ShardTotals)> {
        let shard = self.open.get_mut(&id).filter(|s| s.is_finished())?;
        shard.totals.recomputed += std::mem::take(&mut self.recomputed);
        Some((shard.manifest().to_vec(), shard.outcomes(), shard.totals))
    }

    /// A shard is committed: forgets its samples.
    pub fn close_shard(&mut self, id: ShardId, totals: ShardTotals) {
        self.open.remove(&id);
        self.done.insert(id, totals);
    }

    /// Whether every shard is committed.
    pub fn is_done(&self) -> bool {
        self.done.len() as u32 == self.job.shards()
    }

    /// Totals of committed and open shards together.
    pub fn totals(&self) -> ShardTotals {
        let mut totals = ShardTotals { recomputed: self.recomputed, ..ShardTotals::default() };
        self.done.values().for_each(|t| totals.add(*t));
        self.open.values().for_each(|s| totals.add(s.totals));
        totals
    }

    /// `(done, active, pending)` shards.
    pub fn shard_counts(&self) -> (u64, u64, u64) {
        let (done, active) = (self.done.len() as u64, self.open.len() as u64);
        (done, active, u64::from(self.job.shards()).saturating_sub(done + active))
    }

    fn rates(&self) -> Vec<f64> {
        self.workers.values().map(|w| w.rate).collect()
    }

    /// What is known of each worker, for people; sorted by name.
    pub fn workers(&self) -> Vec<WorkerView> {
        let mut views: Vec<_> = self
            .workers
            .iter()
            .map(|(name, w)| WorkerView {
                worker: name.clone(),
                host: w.host.clone(),
                device: w.device.clone(),
                leases: self.leases.values().filter(|l| &l.worker == name).count() as u32,
                evaluations: w.evaluations,
                unreported: w.unreported,
                rate: w.rate,
            })
            .collect();
        views.sort_by(|a, b| a.worker.cmp(&b.worker));
        views
    }
}

/// A worker as people see it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Its name.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// Its device.
    pub device: String,
    /// Leases it holds.
    pub leases: u32,
    /// Evaluations it reported.
    pub evaluations: u64,
    /// Evaluations it has finished and not reported yet.
    pub unreported: u64,
    /// Its measured rate in evaluations per second.
    pub rate: f64,
}

#[cfg(test)]
mod tests;
