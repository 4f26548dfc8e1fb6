//! Leases: who computes what, and how much is given to whom.

use std::time::Duration;

use elbo_common::ids::LeaseId;
use elbo_common::manifest::Sample;
use elbo_common::unit::{Unit, UnitId};

/// How leases are sized and when they end.
#[derive(Clone, Copy, Debug)]
pub struct LeasePolicy {
    /// A worker silent for longer loses its leases.
    pub time_to_live: Duration,
    /// How long a block should take on the worker that asks.
    pub block_seconds: f64,
    /// Evaluations of a block for a worker whose rate is unknown.
    pub first_block: u64,
    /// Shards open at a time, which bounds the coordinator's memory.
    pub window: usize,
}

impl Default for LeasePolicy {
    fn default() -> Self {
        Self { time_to_live: Duration::from_secs(30), block_seconds: 60.0, first_block: 256, window: 8 }
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
    pub(super) fn ready_target(&self, workers: usize, rates: &[f64]) -> u64 {
        let rate: f64 = rates.iter().sum();
        ((2.0 * self.block_seconds * rate) as u64).max(self.first_block * workers as u64).max(1)
    }
}

/// A worker the coordinator knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Worker {
    pub(super) host: String,
    pub(super) device: String,
    pub(super) last_seen: Duration,
    pub(super) rate: f64,
    pub(super) evaluations: u64,
    pub(super) unreported: u64,
}

/// A block out on lease.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) worker: String,
    /// Units not reported yet.
    pub(super) units: Vec<UnitId>,
    pub(super) attempt: u32,
}

/// Units whose evaluation failed as a block.
#[derive(Clone, Debug)]
pub(super) struct Suspects {
    pub(super) units: Vec<UnitId>,
    pub(super) attempts: u32,
    pub(super) failed_on: String,
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
