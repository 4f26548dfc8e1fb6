//! Blocks that workers hold though this coordinator has not leased them to them, or no longer: they were leased by a
//! coordinator before it, or taken from a worker that was thought dead. The worker goes on with what nobody else has.
//!
//! What an earlier coordinator has granted is not known, so the worker is believed. What this one has granted it knows.

use std::time::Duration;

use elbo_core::ids::{LeaseKey, ShardId};
use elbo_core::unit::UnitId;

use super::failure::Blame;
use super::grants::Proof;
use super::{Scheduler, Shard};

/// Units a worker holds of a shard that is not open yet.
#[derive(Clone, Debug)]
pub(super) struct Orphan {
    worker: String,
    key: LeaseKey,
    units: Vec<UnitId>,
}

impl Scheduler {
    /// Takes a block that a worker has in hand for leased to it, as far as nobody else has it. Of shards that are not open
    /// that is done when they are.
    pub fn adopt(&mut self, worker: &str, key: LeaseKey, units: &[UnitId], now: Duration) {
        if !self.knows(worker) {
            return;
        }
        let known = units.iter().filter(|unit| unit.sample.0 < self.job.samples());
        // A block is of one shard.
        let Some(shard) = known.clone().map(|unit| self.shard_of(unit.sample)).next() else { return };
        let mut units: Vec<_> = known.copied().filter(|unit| self.shard_of(unit.sample) == shard).collect();
        if key.epoch == self.epoch {
            let given = |open: &Shard, unit: &UnitId| open.gave_unit(key, worker, *unit) == Proof::Given;
            units.retain(|unit| self.open.get(&shard).is_some_and(|open| given(open, unit)));
            if units.is_empty() {
                return;
            }
        }
        let orphan = Orphan { worker: worker.to_owned(), key, units };
        if self.open.contains_key(&shard) {
            self.place(shard, orphan, now);
        } else if !self.is_begun(shard) {
            self.requested.insert(shard);
            let waiting = self.orphans.entry(shard).or_default();
            waiting.retain(|other| other.key != key || other.worker != orphan.worker);
            waiting.push(orphan);
        }
    }

    /// Leases what was waiting for a shard.
    pub(super) fn place_orphans(&mut self, shard: ShardId, now: Duration) {
        for orphan in self.orphans.remove(&shard).unwrap_or_default() {
            if self.knows(&orphan.worker) {
                self.place(shard, orphan, now);
            }
        }
    }

    fn place(&mut self, shard: ShardId, orphan: Orphan, now: Duration) {
        let Orphan { worker, key, units } = orphan;
        let Some(open) = self.open.get_mut(&shard) else { return };
        // Results of all of it are expected, also of what others have or is known by now.
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

    /// Of the leases a worker is at, those nobody needs any more: their units are settled, or somebody else has them.
    pub(super) fn unwanted(&self, held: &[LeaseKey]) -> Vec<LeaseKey> {
        let waits = |key: &LeaseKey| self.orphans.values().flatten().any(|orphan| orphan.key == *key);
        held.iter().copied().filter(|key| !self.leases.contains_key(key) && !waits(key)).collect()
    }
}
