//! Leases: who computes what, and how much is given to whom.

use std::time::Duration;

use elbo_common::ids::LeaseId;
use elbo_common::manifest::Sample;
use elbo_common::unit::{Unit, UnitId};

use super::{Brain, JobShape, Shard};

/// How leases are sized and when they end.
#[derive(Clone, Copy, Debug)]
pub struct LeasePolicy {
    /// A worker silent for longer loses its leases.
    pub time_to_live: Duration,
    /// How long a block should take on the worker that asks.
    pub block_seconds: f64,
    /// Evaluations of a block for a worker whose rate is unknown.
    pub first_block: u64,
    /// Shards open at a time, however small they are.
    pub window: usize,
    /// Bytes that the samples of open shards may take; two shards are open whatever they take.
    pub memory: u64,
}

impl Default for LeasePolicy {
    fn default() -> Self {
        Self {
            time_to_live: Duration::from_secs(30),
            block_seconds: 60.0,
            first_block: 256,
            window: 256,
            memory: 448 << 20,
        }
    }
}

impl LeasePolicy {
    /// Evaluations for one block: `block_seconds` at the worker's rate, but never more than a fair part of what is
    /// ready, so that the last blocks of a job end together (guided self-scheduling, Polychronopoulos & Kuck 1987).
    pub(super) fn block_evaluations(&self, rate: f64, ready: u64, workers: usize) -> u64 {
        if rate <= 0.0 {
            return self.first_block;
        }
        // Every worker holds two leases: one running, one waiting.
        let fair = ready / (4 * workers.max(1) as u64);
        // Below half a second, asking costs more than it evens out.
        let least = (0.5 * rate) as u64;
        ((self.block_seconds * rate) as u64).min(fair).max(least).max(1)
    }

    /// Evaluations that should be ready so that every worker finds a full block and a spare one.
    pub(super) fn ready_target(&self, workers: usize, rate: f64) -> u64 {
        ((2.0 * self.block_seconds * rate) as u64).max(self.first_block * workers as u64).max(1)
    }

    /// How many shards may be open: more small ones than large ones, so that memory is bounded.
    pub(super) fn window(&self, job: &JobShape) -> usize {
        let fit = self.memory / job.shard_bytes().max(1);
        usize::try_from(fit.max(2)).unwrap_or(usize::MAX).min(self.window)
    }
}

/// A block out on lease.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) worker: String,
    /// Units not reported yet.
    pub(super) units: Vec<UnitId>,
    pub(super) attempt: u32,
}

/// A lease as the worker gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// Its id in this epoch.
    pub lease: LeaseId,
    /// How often the block failed before.
    pub attempt: u32,
    /// What to evaluate.
    pub units: Vec<Unit>,
    /// The samples the units speak of.
    pub samples: Vec<Sample>,
}

impl Brain {
    /// Leases units to a worker; `None` when nothing is ready.
    pub fn grant(&mut self, worker: &str, rate: f64, now: Duration) -> Option<Grant> {
        if !self.workers.seen(worker, now) {
            return None;
        }
        self.workers.set_rate(worker, rate);
        let (units, attempt) = match self.take_suspects(worker) {
            Some(suspects) => (suspects.units, suspects.attempts),
            None => (self.take_ready(worker, rate)?, 0),
        };
        let lease = LeaseId(self.next_lease);
        self.next_lease += 1;
        let shard = self.shard_of(units.first()?.sample);
        let open = self.open.get_mut(&shard)?;
        let block: Vec<Unit> = units.iter().filter_map(|&id| open.lease(id, lease)).collect();
        let samples = open.samples_of(&block);
        self.leases.insert(lease, Lease { worker: worker.to_owned(), units, attempt });
        self.workers.add_lease(worker, lease);
        Some(Grant { lease, attempt, units: block, samples })
    }

    fn take_ready(&mut self, worker: &str, rate: f64) -> Option<Vec<UnitId>> {
        loop {
            let target = self.policy.block_evaluations(rate, self.ready_evaluations(), self.workers.len());
            // Older shards first, so that they get committed; but latents a worker has at hand come before.
            let own = self.open.values_mut().find(|s| s.has_ready_for(worker));
            let shard = match own {
                Some(shard) => shard,
                None => self.open.values_mut().find(|s| s.ready_evaluations() > 0)?,
            };
            // A queue may hold nothing but units that were settled meanwhile: then it is empty now, and the next is tried.
            let units = shard.take(worker, target);
            if !units.is_empty() {
                return Some(units);
            }
        }
    }

    /// Forgets a lease.
    pub(super) fn end_lease(&mut self, id: LeaseId) -> Option<Lease> {
        let lease = self.leases.remove(&id)?;
        self.workers.remove_lease(&lease.worker, id);
        Some(lease)
    }

    /// Notes that a leased unit needs no more work.
    pub(super) fn settle(&mut self, id: LeaseId, unit: UnitId) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.units.retain(|u| *u != unit);
            if lease.units.is_empty() {
                self.end_lease(id);
            }
        }
    }

    /// A worker hands leases back.
    pub fn release(&mut self, leases: &[LeaseId]) {
        for lease in leases {
            if let Some(lease) = self.end_lease(*lease) {
                self.unlease(&lease.units);
                lease.units.into_iter().for_each(|unit| self.make_ready(unit));
            }
        }
    }

    /// Takes back what `worker` was granted but does not hold: a grant whose reply was lost would else be waited for as
    /// long as the worker lives. Returns whether there was any.
    pub fn keep_only(&mut self, worker: &str, held: &[LeaseId]) -> bool {
        let lost: Vec<_> = self.workers.leases(worker).filter(|lease| !held.contains(lease)).collect();
        self.release(&lost);
        !lost.is_empty()
    }

    pub(super) fn unlease(&mut self, units: &[UnitId]) {
        for unit in units {
            if let Some(shard) = self.open_shard_of(*unit) {
                shard.unlease(*unit);
            }
        }
    }

    fn make_ready(&mut self, unit: UnitId) {
        if let Some(shard) = self.open_shard_of(unit) {
            shard.make_ready(unit);
        }
    }

    fn open_shard_of(&mut self, unit: UnitId) -> Option<&mut Shard> {
        let shard = self.shard_of(unit.sample);
        self.open.get_mut(&shard)
    }
}
