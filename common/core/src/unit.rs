//! How one round of one sample is cut into units. Results are reported, stored and merged by unit.
//!
//! The cut depends only on the job: slots in runs of [`SLOTS_PER_UNIT`], remaining prompts in runs of [`PROMPTS_PER_UNIT`]. A
//! lease carries any set of units, chosen to suit the worker. So leases may differ in every run, but the merged sums and the
//! order of merging stay the same.

use std::ops::Range;

use crate::ids::{PromptIndex, Round, SampleId};

/// Slots in a unit. Large enough that a typical round is one unit (20 bytes of sums per prompt in the ledger), and small enough
/// that 1,000 slots of one image keep sixteen workers busy.
pub const SLOTS_PER_UNIT: usize = 64;

/// Prompts in a unit. With 64 slots a unit is at most 4,096 evaluations, seconds on a GPU.
pub const PROMPTS_PER_UNIT: usize = 64;

/// The most slots, and the most prompts, of a job: a unit numbers its runs in 16 bits.
pub const MOST: usize = u16::MAX as usize * 64;

const _: () = assert!(SLOTS_PER_UNIT == 64 && PROMPTS_PER_UNIT == 64);

/// Identifies a unit within a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId {
    /// The sample.
    pub sample: SampleId,
    /// Its round.
    pub round: Round,
    /// Which run of slots.
    pub slots: u16,
    /// Which run of remaining prompts.
    pub prompts: u16,
}

/// How a round is cut: a grid of slot runs and prompt runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    slots: usize,
    prompts: usize,
}

impl Cut {
    /// The cut of a round with `slots` slots for a sample with `prompts` prompts remaining.
    pub fn new(slots: usize, prompts: usize) -> Self {
        Self { slots, prompts }
    }

    /// The number of slot runs.
    pub fn slot_runs(self) -> u16 {
        self.slots.div_ceil(SLOTS_PER_UNIT) as u16
    }

    /// The number of prompt runs.
    pub fn prompt_runs(self) -> u16 {
        self.prompts.div_ceil(PROMPTS_PER_UNIT) as u16
    }

    /// The number of units.
    pub fn units(self) -> usize {
        usize::from(self.slot_runs()) * usize::from(self.prompt_runs())
    }

    /// The units of `sample`'s `round`, ordered by slot run, then by prompt run.
    pub fn ids(self, sample: SampleId, round: Round) -> impl Iterator<Item = UnitId> {
        let prompt_runs = self.prompt_runs();
        (0..self.slot_runs())
            .flat_map(move |slots| (0..prompt_runs).map(move |prompts| UnitId { sample, round, slots, prompts }))
    }

    /// The position of a unit in [`Cut::ids`]; `None` if the unit does not belong to this cut.
    pub fn position(self, unit: UnitId) -> Option<usize> {
        (unit.slots < self.slot_runs() && unit.prompts < self.prompt_runs())
            .then(|| usize::from(unit.slots) * usize::from(self.prompt_runs()) + usize::from(unit.prompts))
    }

    /// The positions of a unit's slots in the round.
    pub fn slot_range(self, unit: UnitId) -> Range<usize> {
        run(unit.slots, SLOTS_PER_UNIT, self.slots)
    }

    /// The positions of a unit's prompts among the sample's remaining prompts.
    pub fn prompt_range(self, unit: UnitId) -> Range<usize> {
        run(unit.prompts, PROMPTS_PER_UNIT, self.prompts)
    }

    /// The number of evaluations in a unit.
    pub fn evaluations(self, unit: UnitId) -> u64 {
        (self.slot_range(unit).len() * self.prompt_range(unit).len()) as u64
    }
}

fn run(index: u16, length: usize, total: usize) -> Range<usize> {
    let start = (usize::from(index) * length).min(total);
    start..(start + length).min(total)
}

/// A unit with everything a worker needs to evaluate it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its identifier.
    pub id: UnitId,
    /// Positions of its slots in the job's course.
    pub slots: Range<usize>,
    /// Its prompts.
    pub prompts: Vec<PromptIndex>,
}

impl Unit {
    /// The number of evaluations in the unit.
    pub fn evaluations(&self) -> u64 {
        (self.slots.len() * self.prompts.len()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_every_slot_and_prompt_exactly_once() {
        for (slots, prompts) in [(1, 1), (64, 64), (65, 10), (20, 1000), (1000, 3), (130, 129)] {
            let cut = Cut::new(slots, prompts);
            let mut seen = vec![0u32; slots * prompts];
            for (i, unit) in cut.ids(SampleId(7), Round(1)).enumerate() {
                assert_eq!(cut.position(unit), Some(i));
                for s in cut.slot_range(unit) {
                    cut.prompt_range(unit).for_each(|p| seen[s * prompts + p] += 1);
                }
            }
            assert_eq!(cut.ids(SampleId(7), Round(1)).count(), cut.units());
            assert!(seen.iter().all(|&n| n == 1), "{slots} x {prompts}");
        }
    }

    #[test]
    fn the_last_prompt_of_the_largest_job_is_in_the_last_unit() {
        let cut = Cut::new(1, MOST);
        assert_eq!(cut.units(), usize::from(u16::MAX));
        let last = cut.ids(SampleId(0), Round(0)).last().map(|unit| cut.prompt_range(unit));
        assert_eq!(last, Some(MOST - 64..MOST));
    }

    #[test]
    fn a_unit_of_another_cut_has_no_position() {
        let beyond = UnitId { sample: SampleId(0), round: Round(0), slots: 2, prompts: 0 };
        assert_eq!(Cut::new(65, 10).position(beyond), None);
    }
}
