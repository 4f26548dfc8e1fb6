//! Blocks that failed, and blocks whose workers died. They are tried again, then bisected down to the sample at fault.
//!
//! The two cases are treated differently. A failed block is reported by its worker, and two failures are no accident. A
//! worker that dies may have been removed by its cluster, which is nobody's fault. Only units that many dying workers held
//! are suspected of killing them.

use std::time::Duration;

use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::unit::UnitId;

use super::Scheduler;

/// A block is bisected, or its sample given up, after this many failures.
const FAILURES: u32 = 2;

/// After this many deaths of workers, the units that they held are suspected. Suspected units go to workers that have
/// nothing else in hand, and are bisected at every further death, which costs only time.
const SUSPICION: u32 = 3;

/// A sample is given up after the deaths of this many workers that held nothing else. If every tenth lease is lost with its
/// machine, one sample in a million is given up by accident; `--retry-quarantined` then finds it sound.
const DEATHS: u32 = 3;

/// The failures and deaths that a block has caused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Blame {
    /// How often its evaluation failed.
    pub(super) failures: u32,
    /// Whether too many workers died while they held it.
    pub(super) deadly: bool,
    /// How many workers died while they held nothing else.
    pub(super) deaths: u32,
    /// Whether a worker could not read its samples.
    pub(super) unread: bool,
}

/// Units that are kept apart until it is known which of them is at fault.
#[derive(Clone, Debug)]
pub(super) struct Suspects {
    pub(super) units: Vec<UnitId>,
    pub(super) blame: Blame,
    pub(super) failed_on: String,
    /// Since when they have been waiting for other workers.
    pub(super) since: Duration,
}

impl Scheduler {
    /// Handles a lease whose evaluation failed. Returns the samples to give up.
    ///
    /// The block is tried once more. Then it is bisected down to single samples, which are given up after their second
    /// failure.
    pub fn fail(&mut self, worker: &str, key: LeaseKey, error: &str) -> Vec<SampleFailure> {
        let Some(failed) = self.end_lease_of(worker, key) else { return Vec::new() };
        self.unlease(&failed.units, key);
        for unit in &failed.units {
            // Other workers with a lease on it may go on, but the unit must be tested now.
            for other in self.open_shard_of(*unit).map(|shard| shard.holders(*unit)).unwrap_or_default().iter() {
                let evaluations = self.open_shard_of(*unit).map_or(0, |shard| shard.unit_evaluations(*unit));
                self.drop_unit(other, *unit, evaluations, false);
                self.unlease([unit], other);
            }
        }
        // Units that were taken out of it meanwhile may have been at fault: try the remaining units alone first.
        let failures = if failed.mixed { failed.blame.failures.max(1) } else { failed.blame.failures + 1 };
        let blame = Blame { failures, ..failed.blame };
        let units = failed.units.into_iter().collect();
        self.judge(Suspects { units, blame, failed_on: failed.worker, since: self.now }, error)
    }

    /// Handles a lease whose worker died. Returns the samples to give up.
    pub(super) fn lose(&mut self, key: LeaseKey) -> Vec<SampleFailure> {
        let Some(lost) = self.end_lease(key) else { return Vec::new() };
        let free = self.unlease(&lost.units, key);
        let (blame, failed_on, since) = (lost.blame, lost.worker, self.now);
        if blame.deadly {
            let blame = Blame { deaths: blame.deaths + u32::from(!lost.mixed), ..blame };
            return self.judge_dead(Suspects { units: free, blame, failed_on, since });
        }
        let (mut deadly, mut others) = (Vec::new(), Vec::new());
        for unit in free {
            let deaths = self.deaths.entry(unit).or_default();
            *deaths += 1;
            if *deaths >= SUSPICION { deadly.push(unit) } else { others.push(unit) }
        }
        self.hand_back(others, blame);
        self.judge_dead(Suspects { units: deadly, blame: Blame { deadly: true, ..blame }, failed_on, since })
    }

    fn judge_dead(&mut self, suspects: Suspects) -> Vec<SampleFailure> {
        let error = format!(
            "{SUSPICION} workers died while they held it, and {} more that held nothing else, the last one {}: see their logs",
            suspects.blame.deaths, suspects.failed_on
        );
        self.judge(suspects, &error)
    }

    /// Takes back units of a block with this `blame` that no lease holds any more. Suspects stay suspects.
    pub(super) fn hand_back(&mut self, units: Vec<UnitId>, blame: Blame) {
        if blame == Blame::default() {
            units.into_iter().for_each(|unit| self.make_ready(unit));
        } else if blame == Blame::UNREAD {
            self.keep_waiting(units);
        } else if !units.is_empty() {
            // It did not fail on its last worker, so that worker may get it again.
            self.suspects.push_back(Suspects { units, blame, failed_on: String::new(), since: self.now });
        }
    }

    /// Decides between another try, a bisection, and giving the sample up.
    fn judge(&mut self, suspects: Suspects, error: &str) -> Vec<SampleFailure> {
        let Suspects { units, blame, failed_on, since } = suspects;
        if units.is_empty() {
            return Vec::new();
        }
        let mut samples: Vec<SampleId> = units.iter().map(|unit| unit.sample).collect();
        samples.dedup();
        let deaths = if samples.len() == 1 { DEATHS } else { 1 };
        if blame.failures < FAILURES && blame.deaths < deaths {
            self.suspects.push_back(Suspects { units, blame, failed_on, since });
            return Vec::new();
        }
        if let [sample] = samples[..] {
            return vec![SampleFailure { sample, stage: FailureStage::Evaluate, error: error.to_owned() }];
        }
        let middle = samples[samples.len() / 2];
        let (low, high): (Vec<_>, Vec<_>) = units.into_iter().partition(|unit| unit.sample < middle);
        // One failure is behind each half: the next one splits it again.
        let blame = Blame { failures: blame.failures.min(FAILURES - 1), deaths: 0, ..blame };
        for units in [low, high] {
            self.suspects.push_back(Suspects { units, blame, failed_on: failed_on.clone(), since });
        }
        Vec::new()
    }

    /// Whether any of these workers has asked for work lately. A worker that joined and never asks does not count.
    pub(super) fn is_somebody_there(&self, is_meant: impl Fn(&str) -> bool) -> bool {
        self.workers.iter().any(|(name, worker)| is_meant(name) && !self.has_waited(worker.asked))
    }

    /// Whether other workers have had time since then to take what was left to them.
    pub(super) fn has_waited(&self, since: Duration) -> bool {
        self.now.saturating_sub(since) > self.policy.patience()
    }

    /// Whether a worker holds a block that may kill it. It gets nothing else until that is over.
    pub(super) fn is_in_danger(&self, worker: &str) -> bool {
        self.workers.leases(worker).any(|key| self.leases.get(&key).is_some_and(|lease| lease.blame.deadly))
    }

    /// Suspects for a worker, without units that are no longer wanted.
    pub(super) fn take_suspects(&mut self, worker: &str) -> Option<Suspects> {
        if self.suspects.is_empty() {
            return None;
        }
        // For a while, suspects go to a worker other than the one they failed on, if another worker asks for work. Units
        // that may be deadly go to a worker that has nothing else in hand, so that the cause of a death is clear.
        let alone = !self.is_somebody_there(|other| other != worker);
        let busy = self.workers.leases(worker).next().is_some();
        let may_try = |s: &Suspects| alone || s.failed_on != worker || self.has_waited(s.since);
        let position = self.suspects.iter().position(|s| may_try(s) && !(busy && s.blame.deadly))?;
        let mut suspects = self.suspects.remove(position)?;
        let (open, job) = (&self.open, &self.job);
        suspects.units.retain(|id| open.get(&id.sample.shard(job.shard_size())).is_some_and(|s| s.is_wanted(*id)));
        if suspects.units.is_empty() { self.take_suspects(worker) } else { Some(suspects) }
    }
}
