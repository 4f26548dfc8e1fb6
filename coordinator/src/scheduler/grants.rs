//! Which worker was given which units. A result counts only if its worker was given the unit under the lease it names.
//!
//! An ended lease is remembered for as long as a result of it could count, since one may be on its way. Leases of earlier
//! coordinators are known from the workers that name them when they join.

use std::collections::BTreeMap;

use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::unit::UnitId;

/// Nothing is forgotten while there are at most this many units.
const FEW: usize = 1024;

/// Whether a worker was given a unit or sample under a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// It was given the lease, with that unit or sample.
    Given,
    /// It was given the lease, but without that unit or sample.
    Other,
    /// It was not given the lease.
    None,
}

/// The leases of one shard, with their workers and units.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// The units a worker was given, ascending. Several workers may say that they hold the same lease of an earlier
    /// coordinator.
    of_lease: BTreeMap<LeaseKey, BTreeMap<String, Vec<UnitId>>>,
    /// The total number of units.
    units: usize,
    /// How many units were left after the last call of [`Grants::forget`].
    left: usize,
}

impl Grants {
    /// Remembers that a worker was given some units.
    pub(super) fn note(&mut self, key: LeaseKey, worker: &str, units: impl IntoIterator<Item = UnitId>) {
        let workers = self.of_lease.entry(key).or_default();
        let known = workers.entry(worker.to_owned()).or_default();
        let before = known.len();
        known.extend(units);
        known.sort_unstable();
        known.dedup();
        self.units += known.len() - before;
    }

    fn units_of(&self, key: LeaseKey, worker: &str) -> Option<&Vec<UnitId>> {
        self.of_lease.get(&key)?.get(worker)
    }

    /// Whether a worker was given a unit under a lease.
    pub(super) fn unit(&self, key: LeaseKey, worker: &str, unit: UnitId) -> Proof {
        match self.units_of(key, worker) {
            None => Proof::None,
            Some(units) if units.binary_search(&unit).is_ok() => Proof::Given,
            Some(_) => Proof::Other,
        }
    }

    /// Whether a worker was given any unit of a sample under a lease.
    pub(super) fn sample(&self, key: LeaseKey, worker: &str, sample: SampleId) -> Proof {
        let Some(units) = self.units_of(key, worker) else { return Proof::None };
        let first = units.partition_point(|unit| unit.sample < sample);
        if units.get(first).is_some_and(|unit| unit.sample == sample) { Proof::Given } else { Proof::Other }
    }

    /// Whether enough units were added since then to make another [`Grants::forget`] worthwhile.
    pub(super) fn has_grown(&self) -> bool {
        self.units > FEW.max(2 * self.left)
    }

    /// Forgets units that are no longer `useful`. If more than `most` remain, then forgets the oldest leases that are not
    /// `held`. Only a worker that endlessly takes leases and hands them back causes that.
    pub(super) fn forget(
        &mut self,
        most: usize,
        useful: impl Fn(&UnitId) -> bool,
        held: impl Fn(LeaseKey, &UnitId) -> bool,
    ) {
        self.of_lease.retain(|_, workers| {
            workers.retain(|_, units| {
                units.retain(&useful);
                units.shrink_to_fit();
                !units.is_empty()
            });
            !workers.is_empty()
        });
        let count = |workers: &BTreeMap<String, Vec<UnitId>>| workers.values().map(Vec::len).sum::<usize>();
        self.units = self.of_lease.values().map(count).sum();
        // Go well below the limit, or every further lease would make this necessary again.
        let target = if self.units > most { most / 2 } else { most };
        let mut units = self.units;
        self.of_lease.retain(|key, workers| {
            let keep = units <= target || workers.values().flatten().any(|unit| held(*key, unit));
            units -= if keep { 0 } else { count(workers) };
            keep
        });
        (self.units, self.left) = (units, units);
    }

    /// How many units are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.units
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_core::ids::{Epoch, LeaseId, Round};

    fn key(lease: u64) -> LeaseKey {
        LeaseKey { epoch: Epoch(1), lease: LeaseId(lease) }
    }

    fn unit(sample: u64, slots: u16) -> UnitId {
        UnitId { sample: SampleId(sample), round: Round(0), slots, prompts: 0 }
    }

    #[test]
    fn grants_are_remembered_by_worker_lease_unit_and_sample() {
        let mut grants = Grants::default();
        grants.note(key(1), "a", [unit(3, 1), unit(1, 0)]);
        grants.note(key(1), "a", [unit(1, 0), unit(5, 0)]);
        grants.note(key(2), "b", [unit(2, 0)]);
        assert_eq!(grants.len(), 4);
        assert_eq!(grants.unit(key(1), "a", unit(3, 1)), Proof::Given);
        assert_eq!(grants.unit(key(1), "a", unit(3, 0)), Proof::Other);
        assert_eq!(grants.unit(key(2), "a", unit(2, 0)), Proof::None);
        assert_eq!(grants.unit(key(3), "b", unit(2, 0)), Proof::None);
        assert_eq!(grants.sample(key(1), "a", SampleId(3)), Proof::Given);
        assert_eq!(grants.sample(key(1), "a", SampleId(2)), Proof::Other);
        assert_eq!(grants.sample(key(1), "b", SampleId(2)), Proof::None);
    }

    #[test]
    fn useless_units_are_forgotten_and_then_the_oldest_leases_that_are_not_held() {
        let mut grants = Grants::default();
        for lease in 0..100 {
            grants.note(key(lease), "a", [unit(lease % 4, 0), unit(4, 0)]);
        }
        assert!(!grants.has_grown());
        grants.forget(1_000, |unit| unit.sample.0 > 1, |_, _| false);
        assert_eq!(grants.len(), 150);
        assert_eq!(grants.unit(key(0), "a", unit(0, 0)), Proof::Other);
        grants.forget(100, |_| true, |held, _| held == key(0));
        assert!((40..=50).contains(&grants.len()), "{}", grants.len());
        assert_eq!(grants.unit(key(0), "a", unit(4, 0)), Proof::Given);
        assert_eq!(grants.unit(key(1), "a", unit(4, 0)), Proof::None);
        assert_eq!(grants.unit(key(99), "a", unit(4, 0)), Proof::Given);
    }
}
