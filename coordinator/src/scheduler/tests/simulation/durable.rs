//! The state that survives every crash: an output with its files, and its ledger with the fencing of writers. Both check
//! every change against the rules.

use super::*;

/// A write to the ledger, atomic.
#[derive(Clone, Debug)]
pub(super) enum Write {
    Record(Record),
    Done(ShardId, ShardTotals),
    /// Nothing new: the writer checks that it has not been replaced.
    Hold,
}

/// A file of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// The pilot's result, in the output of the job that follows it.
    Learned,
    Predictions(ShardId),
    Quarantine(ShardId),
    Job,
}

/// The content of a file, and the job that wrote it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Learned { job: u64, from: u64 },
    Rows { job: u64, outcomes: Vec<Finished>, confidence: Option<u64> },
    Quarantine { job: u64, samples: Vec<SampleId> },
    Job { job: u64, done: bool },
}

impl Content {
    fn job(&self) -> u64 {
        match self {
            Self::Learned { job, .. }
            | Self::Rows { job, .. }
            | Self::Quarantine { job, .. }
            | Self::Job { job, .. } => *job,
        }
    }

    /// The content without error texts, which name workers.
    fn comparable(&self) -> Self {
        match self {
            Self::Rows { job, outcomes, confidence } => {
                Self::Rows { job: *job, outcomes: comparable(outcomes), confidence: *confidence }
            }
            other => other.clone(),
        }
    }
}

#[derive(Debug)]
struct Object {
    version: u64,
    /// The epoch of the writer.
    epoch: Epoch,
    content: Content,
}

/// A put on its way, and its condition.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub(super) name: Name,
    pub(super) content: Content,
    /// The version that it replaces.
    pub(super) seen: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Durable {
    /// The kind of the job.
    pub(super) kind: Kind,
    epoch: u64,
    /// The job the ledger belongs to.
    pub(super) job: u64,
    records: BTreeMap<ShardId, Vec<(Epoch, Record)>>,
    pub(super) done: BTreeMap<ShardId, ShardTotals>,
    /// Shards whose quarantined samples are retried, with the epoch of the retry.
    pub(super) retried: BTreeMap<ShardId, Epoch>,
    pub(super) waste: Waste,
    objects: BTreeMap<Name, Object>,
    versions: u64,
    /// Units whose results were acknowledged to a worker.
    pub(super) acknowledged: BTreeSet<UnitId>,
    /// Whether puts are conditional. If not, the rules must find faults.
    pub(super) conditional: bool,
}

impl Durable {
    /// The store of a job that was never begun.
    pub(super) fn of(kind: Kind, job: u64) -> Self {
        Self {
            kind,
            epoch: 0,
            job,
            records: BTreeMap::new(),
            done: BTreeMap::new(),
            retried: BTreeMap::new(),
            waste: Waste::default(),
            objects: BTreeMap::new(),
            versions: 0,
            acknowledged: BTreeSet::new(),
            conditional: true,
        }
    }

    /// A coordinator takes the ledger over.
    pub(super) fn open(&mut self) -> Epoch {
        self.epoch += 1;
        Epoch(self.epoch)
    }

    /// Discards the job for another one. Removes all its files, unless the coordinator is `interrupted` before.
    pub(super) fn discard(&mut self, job: u64, interrupted: bool) {
        self.job = job;
        self.records.clear();
        self.done.clear();
        self.retried.clear();
        self.acknowledged.clear();
        self.waste = Waste::default();
        if !interrupted {
            self.objects.clear();
        }
    }

    /// Deletes files of discarded jobs that this job does not overwrite.
    pub(super) fn clear_late(&mut self) {
        self.objects.retain(|name, object| !matches!(name, Name::Quarantine(_)) || object.content.job() == self.job);
    }

    /// Retries the quarantined samples.
    pub(super) fn retry(&mut self) {
        let again: Vec<_> = self.done.iter().filter(|(_, totals)| totals.quarantined > 0).map(|(id, _)| *id).collect();
        for shard in again.iter().chain(self.records.keys()) {
            self.retried.insert(*shard, Epoch(self.epoch));
        }
        // Results of a quarantined sample were useless and were not kept.
        let records = || self.records.values().flatten().map(|(_, record)| record);
        let given_up: BTreeSet<_> =
            records().flat_map(|record| &record.failures).map(|failure| failure.sample).collect();
        let recorded: BTreeSet<_> = records().flat_map(|record| &record.results).map(|result| result.id).collect();
        self.acknowledged.retain(|unit| !given_up.contains(&unit.sample) || recorded.contains(unit));
        for shard in again {
            self.done.remove(&shard);
            // Results that will be computed again are no longer known.
            let kept = self.kept(shard);
            self.acknowledged.retain(|unit| unit.sample.shard(SHARD_SIZE) != shard || kept.contains_key(&unit.sample));
        }
    }

    pub(super) fn is_fenced(&self, epoch: Epoch) -> bool {
        epoch.0 != self.epoch
    }

    /// A write arrives; `false` if the writer is fenced, and nothing is written.
    pub(super) fn write(&mut self, epoch: Epoch, write: Write, waste: Waste) -> bool {
        if self.is_fenced(epoch) {
            return false;
        }
        match write {
            Write::Record(record) => {
                self.waste = waste;
                let sample = record.results.first().map(|r| r.id.sample);
                let sample = sample.or_else(|| record.failures.first().map(|f| f.sample)).expect("not empty");
                self.records.entry(sample.shard(SHARD_SIZE)).or_default().push((epoch, record));
            }
            Write::Done(shard, totals) => {
                self.waste = waste;
                let Some(Content::Rows { job, .. }) = self.content(Name::Predictions(shard)) else {
                    panic!("shard {shard} is marked done but not written");
                };
                assert_eq!(*job, self.job, "shard {shard} is marked done with another job's rows");
                self.records.remove(&shard);
                self.retried.remove(&shard);
                self.done.insert(shard, totals);
            }
            Write::Hold => {}
        }
        true
    }

    /// The version of a file, for a put that replaces it.
    pub(super) fn look(&self, name: Name) -> Option<u64> {
        self.objects.get(&name).map(|object| object.version)
    }

    /// The content of a file.
    pub(super) fn content(&self, name: Name) -> Option<&Content> {
        self.objects.get(&name).map(|object| &object.content)
    }

    /// The rows of a shard's predictions, and their confidence.
    pub(super) fn rows(&self, shard: ShardId) -> Option<(&Vec<Finished>, Option<u64>)> {
        match self.content(Name::Predictions(shard)) {
            Some(Content::Rows { outcomes, confidence, .. }) => Some((outcomes, *confidence)),
            _ => None,
        }
    }

    /// A put arrives, perhaps long after it was sent. Returns whether the file now has its intended content.
    pub(super) fn put(&mut self, epoch: Epoch, Put { name, content, seen }: Put) -> bool {
        let before = self.objects.get(&name);
        if self.conditional && before.map(|object| object.version) != seen {
            return before.is_some_and(|object| object.content == content);
        }
        if let Some(before) = before {
            let same = before.content.comparable() == content.comparable();
            assert!(same || before.epoch <= epoch, "{name:?}: a replaced coordinator has written it");
            let own = before.content.job() == content.job();
            if let (true, Content::Rows { outcomes: old, .. }, Content::Rows { outcomes: new, .. }) =
                (own, &before.content, &content)
            {
                for (old, new) in comparable(old).iter().zip(comparable(new)) {
                    let was_given_up = matches!(old.outcome, SampleOutcome::Quarantined(_));
                    assert!(was_given_up || *old == new, "{name:?}: {} was written differently", old.sample);
                }
            }
        }
        self.versions += 1;
        self.objects.insert(name, Object { version: self.versions, epoch, content });
        true
    }

    /// The records of a shard, without failures that a retry has voided.
    pub(super) fn records(&self, shard: ShardId) -> Vec<Record> {
        let since = self.retried.get(&shard).copied();
        let of_shard = self.records.get(&shard).into_iter().flatten();
        let without_void = of_shard.map(|(epoch, record)| match since {
            Some(since) if *epoch < since => Record { failures: Vec::new(), ..record.clone() },
            _ => record.clone(),
        });
        without_void.collect()
    }

    /// The samples of a shard that a retry leaves unchanged.
    pub(super) fn kept(&self, shard: ShardId) -> BTreeMap<SampleId, SampleOutcome> {
        let rows = self.rows(shard).filter(|_| self.retried.contains_key(&shard));
        let sound = |finished: &&Finished| !matches!(finished.outcome, SampleOutcome::Quarantined(_));
        let of = rows.into_iter().flat_map(|(rows, _)| rows.iter().filter(sound));
        of.map(|finished| (finished.sample, finished.outcome.clone())).collect()
    }

    /// Acknowledges a report to a worker.
    pub(super) fn acknowledge(&mut self, record: &Record) {
        for result in &record.results {
            let shard = result.id.sample.shard(SHARD_SIZE);
            let given_up = |r: &Record| r.failures.iter().any(|failure| failure.sample == result.id.sample);
            let recorded = |r: &Record| r.results.iter().any(|known| known.id == result.id) || given_up(r);
            let records = self.records.get(&shard).into_iter().flatten();
            let kept = self.kept(shard).contains_key(&result.id.sample);
            let safe = kept || self.done.contains_key(&shard) || records.map(|(_, record)| record).any(recorded);
            assert!(safe, "{:?} was acknowledged but is not durable", result.id);
            self.acknowledged.insert(result.id);
        }
    }
}

/// Outcomes without error texts, which name workers.
pub(super) fn comparable(outcomes: &[Finished]) -> Vec<Finished> {
    let mut outcomes = outcomes.to_vec();
    for finished in &mut outcomes {
        if let SampleOutcome::Quarantined(failure) = &mut finished.outcome {
            failure.error.clear();
        }
    }
    outcomes
}
