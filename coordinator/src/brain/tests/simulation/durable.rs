//! What survives every crash: the ledger, with the fencing of its writers, and the output. Both hold what happens to them to
//! the rules.

use super::*;

/// A write to the ledger, atomic.
#[derive(Clone, Debug)]
pub(super) enum Write {
    Record(Record),
    Done(ShardId, ShardTotals),
}

#[derive(Debug, Default)]
pub(super) struct Durable {
    /// What the job is.
    pub(super) kind: Kind,
    epoch: u64,
    records: BTreeMap<ShardId, Vec<Record>>,
    pub(super) done: BTreeMap<ShardId, ShardTotals>,
    pub(super) waste: Waste,
    pub(super) output: BTreeMap<ShardId, Vec<Finished>>,
    /// Units whose results a worker was told are safe.
    pub(super) acknowledged: BTreeSet<UnitId>,
}

impl Durable {
    /// What is on the store of a job that was never begun.
    pub(super) fn of(kind: Kind) -> Self {
        Self { kind, ..Self::default() }
    }

    /// A coordinator takes the ledger over.
    pub(super) fn open(&mut self) -> Epoch {
        self.epoch += 1;
        Epoch(self.epoch)
    }

    pub(super) fn is_fenced(&self, epoch: Epoch) -> bool {
        epoch.0 != self.epoch
    }

    /// A write arrives; `false` if the writer is fenced, and nothing is written.
    pub(super) fn write(&mut self, epoch: Epoch, write: Write, waste: Waste) -> bool {
        if self.is_fenced(epoch) {
            return false;
        }
        self.waste = waste;
        match write {
            Write::Record(record) => {
                let sample = record.results.first().map(|r| r.id.sample);
                let sample = sample.or_else(|| record.failures.first().map(|f| f.sample)).expect("not empty");
                self.records.entry(sample.shard(SHARD_SIZE)).or_default().push(record);
            }
            Write::Done(shard, totals) => {
                assert!(self.output.contains_key(&shard), "shard {shard} is marked done and not written");
                self.records.remove(&shard);
                self.done.insert(shard, totals);
            }
        }
        true
    }

    /// A shard's predictions are put in place.
    pub(super) fn put(&mut self, shard: ShardId, outcomes: Vec<Finished>) {
        if let Some(before) = self.output.insert(shard, outcomes) {
            assert_eq!(comparable(&before), comparable(&self.output[&shard]), "shard {shard} was written differently");
        }
    }

    pub(super) fn records(&self, shard: ShardId) -> Vec<Record> {
        self.records.get(&shard).cloned().unwrap_or_default()
    }

    /// A worker is told that its report is safe.
    pub(super) fn acknowledge(&mut self, record: &Record) {
        for result in &record.results {
            let shard = result.id.sample.shard(SHARD_SIZE);
            let given_up = |r: &Record| r.failures.iter().any(|failure| failure.sample == result.id.sample);
            let recorded = |r: &Record| r.results.iter().any(|known| known.id == result.id) || given_up(r);
            let safe = self.done.contains_key(&shard) || self.records.get(&shard).into_iter().flatten().any(recorded);
            assert!(safe, "{:?} was acknowledged and is not durable", result.id);
            self.acknowledged.insert(result.id);
        }
    }
}

/// Outcomes without the words of errors, which name workers.
pub(super) fn comparable(outcomes: &[Finished]) -> Vec<Finished> {
    let mut outcomes = outcomes.to_vec();
    for finished in &mut outcomes {
        if let Outcome::Quarantined(failure) = &mut finished.outcome {
            failure.error.clear();
        }
    }
    outcomes
}
