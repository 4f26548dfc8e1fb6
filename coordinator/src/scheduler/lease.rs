//! Leases: which worker computes which units, and how many.

use std::collections::BTreeSet;
use std::time::Duration;

use elbo_core::ids::{LeaseId, LeaseKey};
use elbo_core::sample::Sample;
use elbo_core::unit::{Unit, UnitId};

use super::failure::{Blame, Suspects};
use super::room::Room;
use super::{JobShape, Scheduler, Shard};

/// How leases are sized and when they end.
#[derive(Clone, Copy, Debug)]
pub struct LeasePolicy {
    /// A worker that is silent for longer loses its leases.
    pub time_to_live: Duration,
    /// How long a block should take on the worker that gets it.
    pub block_seconds: f64,
    /// Evaluations in a block for a worker whose rate is unknown.
    pub first_block: u64,
    /// The most shards open at a time, however small they are.
    pub window: usize,
    /// Bytes that the samples of open shards may take. Two shards are open whatever they take.
    pub memory: u64,
    /// Bytes of a block's message, without its first sample.
    pub block_bytes: usize,
}

impl Default for LeasePolicy {
    fn default() -> Self {
        Self {
            time_to_live: Duration::from_secs(30),
            block_seconds: 60.0,
            first_block: 256,
            window: 256,
            memory: 448 << 20,
            block_bytes: elbo_proto::FULL_MESSAGE_BYTES,
        }
    }
}

impl LeasePolicy {
    /// How long a worker that does not ask for work still counts as present, and how long failed units wait for other
    /// workers. It is longer than a lease takes, since a worker has no reason to ask while it is busy.
    pub(super) fn patience(&self) -> Duration {
        let block = Duration::try_from_secs_f64(self.block_seconds).unwrap_or(self.time_to_live);
        2 * block.max(self.time_to_live)
    }

    /// Evaluations for one block: `block_seconds` at the worker's rate, but at most a fair part of the ready work, so that
    /// the last blocks of a job end together (guided self-scheduling, Polychronopoulos & Kuck 1987).
    pub(super) fn block_evaluations(&self, rate: f64, ready: u64, workers: usize) -> u64 {
        if rate <= 0.0 {
            return self.first_block;
        }
        // Every worker holds two leases: one running, one waiting.
        let fair = ready / (4 * workers.max(1) as u64);
        // Blocks below half a second cost more in requests than they gain in balance.
        let least = (0.5 * rate) as u64;
        ((self.block_seconds * rate) as u64).min(fair).max(least).max(1)
    }

    /// Evaluations that should be ready so that every worker finds a full block and a spare one.
    pub(super) fn ready_target(&self, workers: usize, rate: f64) -> u64 {
        ((2.0 * self.block_seconds * rate) as u64).max(self.first_block * workers as u64).max(1)
    }

    /// How many shards may be open: more small ones than large ones, which bounds the memory.
    pub(super) fn window(&self, job: &JobShape) -> usize {
        let fit = self.memory / job.shard_bytes().max(1);
        usize::try_from(fit.max(2)).unwrap_or(usize::MAX).min(self.window)
    }
}

/// A leased block.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) worker: String,
    /// The units that are not reported yet.
    pub(super) units: BTreeSet<UnitId>,
    /// The evaluations of these units.
    pub(super) evaluations: u64,
    /// The failures and deaths that the block caused before.
    pub(super) blame: Blame,
    /// Whether units were taken out of it that its worker may still be computing. If the worker fails, they may be at
    /// fault.
    pub(super) mixed: bool,
}

/// A lease as sent to the worker.
#[derive(Clone, Debug, PartialEq)]
pub struct LeasedBlock {
    /// Its id in this epoch.
    pub lease: LeaseId,
    /// How often the block has failed before.
    pub attempt: u32,
    /// The units to evaluate.
    pub units: Vec<Unit>,
    /// The samples of these units.
    pub samples: Vec<Sample>,
}

/// A leased unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeasedUnit {
    pub(super) unit: UnitId,
    pub(super) holders: Holders,
    pub(super) evaluations: u64,
}

/// The leases on a unit: none, one, or two at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holders {
    pub(super) first: Option<LeaseKey>,
    pub(super) backup: Option<LeaseKey>,
}

impl Holders {
    /// Adds a lease if there are fewer than two. Returns whether it did.
    pub(super) fn add(&mut self, key: LeaseKey) -> bool {
        let place = if self.first.is_none() { &mut self.first } else { &mut self.backup };
        place.is_none() && place.replace(key).is_none()
    }

    /// Removes a lease.
    pub(super) fn remove(&mut self, key: LeaseKey) {
        if self.first == Some(key) {
            self.first = self.backup.take();
        } else if self.backup == Some(key) {
            self.backup = None;
        }
    }

    pub(super) fn is_empty(self) -> bool {
        self.first.is_none()
    }

    pub(super) fn iter(self) -> impl Iterator<Item = LeaseKey> {
        self.first.into_iter().chain(self.backup)
    }
}

impl Scheduler {
    /// Leases units to a worker; `None` if there is nothing for it. If nothing is ready, this may be a backup: a second
    /// lease on the units that would otherwise finish last.
    pub fn grant(&mut self, worker: &str, rate: f64, now: Duration) -> Option<LeasedBlock> {
        self.now = self.now.max(now);
        if !self.workers.asks(worker, now) || self.is_in_danger(worker) {
            return None;
        }
        let rate = self.workers.set_rate(worker, rate);
        let (units, blame) = if let Some(Suspects { units, blame, failed_on, since }) = self.take_suspects(worker) {
            let (units, rest) = self.that_fit(units);
            if !rest.is_empty() {
                self.suspects.push_front(Suspects { units: rest, blame, failed_on, since });
            }
            (units, blame)
        } else if let Some(units) = self.take_doubts(worker, rate) {
            let (units, rest) = self.that_fit(units);
            self.keep_waiting(rest);
            (units, Blame::UNREAD)
        } else if let Some(units) = self.take_ready(worker, rate) {
            (units, Blame::default())
        } else {
            let (units, blame) = self.take_backup(worker, rate, now)?;
            (self.that_fit(units).0, blame)
        };
        let lease = LeaseId(self.next_lease);
        self.next_lease += 1;
        let (shard, key) = (self.shard_of(units.first()?.sample), LeaseKey { epoch: self.epoch, lease });
        let open = self.open.get_mut(&shard)?;
        let block: Vec<Unit> = units.iter().filter_map(|&id| open.lease(id, key)).collect();
        let samples = open.samples_of(&block);
        open.note_grant(key, worker, block.iter().map(|unit| unit.id));
        self.hold(key, worker, &block, blame, now);
        Some(LeasedBlock { lease, attempt: blame.failures, units: block, samples })
    }

    /// Splits units of one shard in two: the first ones, as many as fit into a block, and the rest.
    fn that_fit(&self, mut units: Vec<UnitId>) -> (Vec<UnitId>, Vec<UnitId>) {
        let mut room = Room::new(self.policy.block_bytes);
        let fits = |unit: &&UnitId| {
            let shard = self.open.get(&self.shard_of(unit.sample));
            shard.is_some_and(|shard| shard.has_room(&mut room, **unit))
        };
        let fitting = units.iter().take_while(fits).count();
        let rest = units.split_off(fitting.max(1).min(units.len()));
        (units, rest)
    }

    /// Notes that a worker holds a lease on some units.
    pub(super) fn hold(&mut self, key: LeaseKey, worker: &str, block: &[Unit], blame: Blame, now: Duration) {
        let evaluations = block.iter().map(Unit::evaluations).sum();
        let units = block.iter().map(|unit| unit.id).collect();
        self.leases.insert(key, Lease { worker: worker.to_owned(), units, evaluations, blame, mixed: false });
        self.workers.add_lease(worker, key, now);
    }

    pub(super) fn take_ready(&mut self, worker: &str, rate: f64) -> Option<Vec<UnitId>> {
        loop {
            let target = self.policy.block_evaluations(rate, self.ready_evaluations(), self.workers.len());
            // Prefer older shards, so that they get committed; but first use latents that the worker has.
            let own = self.open.values_mut().find(|s| s.has_ready_for(worker));
            let shard = match own {
                Some(shard) => shard,
                None => self.open.values_mut().find(|s| s.ready_evaluations() > 0)?,
            };
            // All queued units may have been settled meanwhile: the queue is empty now, so try the next one.
            let units = shard.take(worker, target, Room::new(self.policy.block_bytes));
            if !units.is_empty() {
                return Some(units);
            }
        }
    }

    /// Forgets a lease.
    pub(super) fn end_lease(&mut self, key: LeaseKey) -> Option<Lease> {
        let lease = self.leases.remove(&key)?;
        self.workers.remove_lease(&lease.worker, key);
        Some(lease)
    }

    /// Notes that a leased unit needs no more work. `by` is the lease that settled it, if known.
    pub(super) fn settle(&mut self, held: LeasedUnit, by: Option<LeaseKey>) {
        self.deaths.remove(&held.unit);
        for key in held.holders.iter() {
            self.drop_unit(key, held.unit, held.evaluations, by == Some(key));
        }
    }

    /// Takes a unit out of a lease, and ends the lease if that was its last unit. `done` says whether the lease's own
    /// worker has finished the unit.
    pub(super) fn drop_unit(&mut self, key: LeaseKey, unit: UnitId, evaluations: u64, done: bool) {
        if let Some(lease) = self.leases.get_mut(&key)
            && lease.units.remove(&unit)
        {
            lease.mixed |= !done;
            lease.evaluations = lease.evaluations.saturating_sub(evaluations);
            if lease.units.is_empty() {
                self.end_lease(key);
            }
        }
    }

    /// A worker hands leases back. Leases of other workers are left alone.
    pub fn release(&mut self, worker: &str, leases: &[LeaseKey]) {
        for key in leases {
            if let Some(lease) = self.end_lease_of(worker, *key) {
                let free = self.unlease(&lease.units, *key);
                self.hand_back(free, lease.blame);
            }
        }
    }

    /// Ends a lease, if it is this worker's.
    pub(super) fn end_lease_of(&mut self, worker: &str, key: LeaseKey) -> Option<Lease> {
        if self.leases.get(&key)?.worker == worker { self.end_lease(key) } else { None }
    }

    /// Takes back leases that `worker` was granted but does not hold. Without this, a grant whose reply was lost would stay
    /// leased for as long as the worker lives. Returns whether there were any.
    pub fn keep_only(&mut self, worker: &str, held: &[LeaseKey]) -> bool {
        let lost: Vec<_> = self.workers.leases(worker).filter(|key| !held.contains(key)).collect();
        self.release(worker, &lost);
        !lost.is_empty()
    }

    /// Removes a lease from units. Returns the units that have no other lease.
    pub(super) fn unlease<'a>(&mut self, units: impl IntoIterator<Item = &'a UnitId>, key: LeaseKey) -> Vec<UnitId> {
        let mut free = Vec::new();
        for unit in units {
            if self.open_shard_of(*unit).is_some_and(|shard| shard.unlease(*unit, key)) {
                free.push(*unit);
            }
        }
        free
    }

    pub(super) fn make_ready(&mut self, unit: UnitId) {
        if let Some(shard) = self.open_shard_of(unit) {
            shard.make_ready(unit);
        }
    }

    pub(super) fn open_shard_of(&mut self, unit: UnitId) -> Option<&mut Shard> {
        let shard = self.shard_of(unit.sample);
        self.open.get_mut(&shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::ids::Epoch;

    #[test]
    fn a_unit_has_at_most_two_leases_and_the_second_replaces_the_first() {
        let key = |lease| LeaseKey { epoch: Epoch(1), lease: LeaseId(lease) };
        let mut holders = Holders::default();
        assert!(holders.add(key(1)) && holders.add(key(2)) && !holders.add(key(3)));
        holders.remove(key(1));
        assert_eq!(holders, Holders { first: Some(key(2)), backup: None });
        holders.remove(key(7));
        assert!(!holders.is_empty());
        holders.remove(key(2));
        assert!(holders.is_empty());
    }
}
