//! The blocks that a worker has in hand: leased and not completely acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use elbo_core::ids::{LeaseKey, SampleId};
use elbo_core::unit::UnitId;
use elbo_proto::v1;

use crate::finding::Finding;

#[derive(Debug)]
struct HeldBlock {
    /// Unacknowledged units, and whether each has a finding to report.
    units: BTreeMap<UnitId, bool>,
    unwanted: Arc<AtomicBool>,
}

/// The blocks in hand, shared by the tasks that compute, report and ask for work.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<BTreeMap<LeaseKey, HeldBlock>>>);

impl Held {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseKey, HeldBlock>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a block. The returned flag becomes true when its results are no longer needed.
    pub fn add(&self, block: &v1::Block) -> Arc<AtomicBool> {
        let named = block.units.iter().filter_map(|unit| unit.id?.try_into().ok());
        let unwanted = Arc::new(AtomicBool::new(false));
        let units = named.map(|unit| (unit, false)).collect();
        self.lock().insert(block.key(), HeldBlock { units, unwanted: Arc::clone(&unwanted) });
        unwanted
    }

    /// Notes a finding that will be reported. Returns how many units it covers.
    pub(crate) fn found(&self, key: LeaseKey, finding: &Finding) -> usize {
        let mut held = self.lock();
        let Some(block) = held.get_mut(&key) else { return 0 };
        match finding {
            Finding::Unit(result) => {
                let unit = result.id.and_then(|id| UnitId::try_from(id).ok());
                let known = unit.and_then(|unit| block.units.get_mut(&unit));
                known.map_or(0, |found| {
                    *found = true;
                    1
                })
            }
            Finding::Bad(failure) => {
                let sample = SampleId(failure.sample);
                let mut count = 0;
                for (_, found) in block.units.iter_mut().filter(|(unit, _)| unit.sample == sample) {
                    *found = true;
                    count += 1;
                }
                count
            }
        }
    }

    /// Removes units whose results were acknowledged or whose samples were given up. An empty block is removed.
    pub fn acknowledge(&self, key: LeaseKey, report: &v1::ReportRequest) {
        let mut held = self.lock();
        let Some(block) = held.get_mut(&key) else { return };
        for id in report.results.iter().filter_map(|result| result.id?.try_into().ok()) {
            block.units.remove(&id);
        }
        let bad: BTreeSet<_> = report.failures.iter().map(|failure| SampleId(failure.sample)).collect();
        block.units.retain(|unit, _| !bad.contains(&unit.sample));
        if block.units.is_empty() {
            held.remove(&key);
        }
    }

    /// Removes a block that is handed back or given up. Its units with findings stay until these are reported, since a
    /// restarted coordinator accepts only units that the worker says it holds.
    pub fn remove(&self, key: LeaseKey) {
        let mut held = self.lock();
        let Some(block) = held.get_mut(&key) else { return };
        block.units.retain(|_, found| *found);
        if block.units.is_empty() {
            held.remove(&key);
        }
    }

    /// Marks blocks whose results are no longer needed.
    pub fn abandon(&self, keys: impl IntoIterator<Item = LeaseKey>) {
        let held = self.lock();
        for block in keys.into_iter().filter_map(|key| held.get(&key)) {
            block.unwanted.store(true, Ordering::Relaxed);
        }
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The leases.
    pub fn leases(&self) -> Vec<v1::HeldLease> {
        self.lock().keys().map(|key| (*key).into()).collect()
    }

    /// The leases with their units, for a coordinator that does not know of them.
    pub fn blocks(&self) -> Vec<v1::HeldBlock> {
        let block = |(key, block): (&LeaseKey, &HeldBlock)| v1::HeldBlock {
            epoch: key.epoch.0,
            lease: key.lease.0,
            units: block.units.keys().map(|unit| (*unit).into()).collect(),
        };
        self.lock().iter().map(block).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_in_hand_until_every_unit_is_acknowledged_or_its_sample_given_up() {
        let id = |sample, slots| v1::UnitId { sample, round: 0, slots, prompts: 0 };
        let unit = |sample, slots| v1::Unit { id: Some(id(sample, slots)), ..v1::Unit::default() };
        let block =
            v1::Block { lease: 3, epoch: 1, units: vec![unit(1, 0), unit(1, 1), unit(2, 0)], ..v1::Block::default() };
        let held = Held::default();
        let unwanted = held.add(&block);
        let result = |id| v1::UnitResult { id: Some(id), ..v1::UnitResult::default() };
        let acknowledged = v1::ReportRequest { results: vec![result(id(2, 0))], ..v1::ReportRequest::default() };
        held.acknowledge(block.key(), &acknowledged);
        assert_eq!(held.blocks(), [v1::HeldBlock { epoch: 1, lease: 3, units: vec![id(1, 0), id(1, 1)] }]);
        held.abandon([block.key()]);
        assert!(unwanted.load(Ordering::Relaxed));
        let bad = v1::SampleFailure { sample: 1, ..v1::SampleFailure::default() };
        held.acknowledge(block.key(), &v1::ReportRequest { failures: vec![bad], ..v1::ReportRequest::default() });
        assert!(held.is_empty());
    }

    #[test]
    fn findings_of_a_block_that_is_given_up_stay_in_hand_until_they_are_acknowledged() {
        let id = |sample, slots| v1::UnitId { sample, round: 0, slots, prompts: 0 };
        let unit = |sample, slots| v1::Unit { id: Some(id(sample, slots)), ..v1::Unit::default() };
        let units = vec![unit(1, 0), unit(1, 1), unit(2, 0), unit(3, 0)];
        let block = v1::Block { lease: 3, epoch: 1, units, ..v1::Block::default() };
        let held = Held::default();
        held.add(&block);
        let result = v1::UnitResult { id: Some(id(2, 0)), ..v1::UnitResult::default() };
        let failure = v1::SampleFailure { sample: 1, ..v1::SampleFailure::default() };
        assert_eq!(held.found(block.key(), &Finding::Unit(result.clone())), 1);
        assert_eq!(held.found(block.key(), &Finding::Bad(failure.clone())), 2);
        held.remove(block.key());
        let left = vec![id(1, 0), id(1, 1), id(2, 0)];
        assert_eq!(held.blocks(), [v1::HeldBlock { epoch: 1, lease: 3, units: left }]);
        let (results, failures) = (vec![result], vec![failure]);
        held.acknowledge(block.key(), &v1::ReportRequest { results, failures, ..v1::ReportRequest::default() });
        assert!(held.is_empty());
        held.add(&block);
        held.remove(block.key());
        assert!(held.is_empty());
    }
}
