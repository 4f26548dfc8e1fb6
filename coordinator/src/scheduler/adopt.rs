//! Blocks that workers hold without a current lease from this coordinator: an earlier coordinator leased them, or they were
//! taken back from a worker that seemed dead. The worker continues with the units that no other worker has.
//!
//! The grants of an earlier coordinator are unknown, so the worker is believed. This coordinator knows its own grants.

use std::time::Duration;

use elbo_core::ids::{LeaseKey, ShardId};
use elbo_core::unit::UnitId;

use super::failure::Blame;
use super::grants::Proof;
use super::{Scheduler, Shard};

/// Units a worker holds of a shard that is not open yet.
#[derive(Clone, Debug)]
pub(super) struct AdoptedLease {
    worker: String,
    key: LeaseKey,
    units: Vec<UnitId>,
}

impl Scheduler {
    /// Records a block that a worker already holds as leased to it, except for units that others have. If its shard is not
    /// open, this waits until it is.
    pub fn adopt(&mut self, worker: &str, key: LeaseKey, units: &[UnitId], now: Duration) {
        if !self.knows(worker) {
            return;
        }
        let known = units.iter().filter(|unit| unit.sample.0 < self.job.samples());
        // A block's units are all of one shard.
        let Some(shard) = known.clone().map(|unit| self.shard_of(unit.sample)).next() else { return };
        let mut units: Vec<_> = known.copied().filter(|unit| self.shard_of(unit.sample) == shard).collect();
        if key.epoch == self.epoch {
            let given = |open: &Shard, unit: &UnitId| open.gave_unit(key, worker, *unit) == Proof::Given;
            units.retain(|unit| self.open.get(&shard).is_some_and(|open| given(open, unit)));
            if units.is_empty() {
                return;
            }
        }
        let adopted = AdoptedLease { worker: worker.to_owned(), key, units };
        if self.open.contains_key(&shard) {
            self.place(shard, adopted, now);
        } else if !self.is_begun(shard) {
            self.requested.insert(shard);
            let waiting = self.adopted_leases.entry(shard).or_default();
            waiting.retain(|other| other.key != key || other.worker != adopted.worker);
            waiting.push(adopted);
        }
    }

    /// Leases the blocks that were waiting for a shard.
    pub(super) fn place_orphans(&mut self, shard: ShardId, now: Duration) {
        for adopted in self.adopted_leases.remove(&shard).unwrap_or_default() {
            if self.knows(&adopted.worker) {
                self.place(shard, adopted, now);
            }
        }
    }

    fn place(&mut self, shard: ShardId, adopted: AdoptedLease, now: Duration) {
        let AdoptedLease { worker, key, units } = adopted;
        let Some(open) = self.open.get_mut(&shard) else { return };
        // Accept results of all its units, including those that others have or that are known by now.
        open.note_grant(key, &worker, units.iter().copied());
        if self.leases.contains_key(&key) {
            return;
        }
        let free = units.into_iter().filter(|unit| open.is_wanted(*unit)).collect::<Vec<_>>();
        let block: Vec<_> = free.into_iter().filter_map(|unit| Shard::lease(open, unit, key)).collect();
        if !block.is_empty() {
            self.hold(key, &worker, &block, Blame::default(), now);
        }
    }

    /// Returns the leases of a worker that are no longer needed: their units are settled, or other workers have them.
    pub(super) fn unwanted(&self, held: &[LeaseKey]) -> Vec<LeaseKey> {
        let waits = |key: &LeaseKey| self.adopted_leases.values().flatten().any(|adopted| adopted.key == *key);
        held.iter().copied().filter(|key| !self.leases.contains_key(key) && !waits(key)).collect()
    }
}
