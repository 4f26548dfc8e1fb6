//! The coordinator's durable memory: a SlateDB database beside the output.
//!
//! ```text
//! epoch                              u64, grows by one with every coordinator
//! fingerprint                        the job the ledger belongs to
//! result/<shard>/<epoch>/<sequence>  a Record: results and failures of an open shard
//! done/<shard>                       totals of a committed shard, whose results are gone
//! ```
//! Writes are acknowledged when durable. Opening fences any coordinator that had the ledger open.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use elbo_common::ids::{Epoch, Round, SampleId, ShardId};
use elbo_common::layout;
use elbo_common::store::Store;
use elbo_common::unit::UnitId;
use elbo_proto::v1;
use prost::Message;
use slatedb::config::Settings;
use slatedb::{CloseReason, Db, ErrorKind, WriteBatch};

use crate::brain::{Record, SampleFailure, ShardTotals, UnitResult};

/// A ledger that can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Another coordinator has taken over.
    #[error(
        "another coordinator has taken over this job's ledger: this one stops; only one coordinator may work on an output at a time"
    )]
    Fenced,
    /// The storage or the database failed.
    #[error("{action} the ledger: {source}; check the output's storage, then run the same command again to resume")]
    Database {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: slatedb::Error,
    },
    /// An entry can't be understood.
    #[error(
        "the ledger entry {key} can't be understood: {reason}; it was written by another version of elbo or damaged: start over with --fresh or another --out"
    )]
    Entry {
        /// The entry.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

/// An open ledger.
pub struct Ledger {
    db: Db,
    epoch: Epoch,
    sequence: AtomicU64,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Message)]
struct StoredRecord {
    #[prost(message, repeated, tag = "1")]
    results: Vec<v1::UnitResult>,
    #[prost(message, repeated, tag = "2")]
    failures: Vec<v1::SampleFailure>,
}

#[derive(Clone, PartialEq, Message)]
struct StoredTotals {
    #[prost(uint64, tag = "1")]
    samples: u64,
    #[prost(uint64, tag = "2")]
    quarantined: u64,
    #[prost(uint64, tag = "3")]
    evaluations: u64,
    #[prost(uint64, tag = "4")]
    recomputed: u64,
    #[prost(uint64, tag = "5")]
    spared: u64,
}

/// How often an operation is repeated on a failing store before the ledger gives up: for a minute or two, not for ever.
const STORE_RETRIES: u32 = 40;

const EPOCH: &str = "epoch";
const FINGERPRINT: &str = "fingerprint";
const DONE: &str = "done/";

fn result_prefix(shard: ShardId) -> String {
    format!("result/{:08x}/", shard.0)
}

fn done_key(shard: ShardId) -> String {
    format!("{DONE}{:08x}", shard.0)
}

fn failed(action: &'static str) -> impl Fn(slatedb::Error) -> LedgerError {
    move |source| match source.kind() {
        ErrorKind::Closed(CloseReason::Fenced) => LedgerError::Fenced,
        _ => LedgerError::Database { action, source },
    }
}

fn broken(key: &[u8], reason: impl ToString) -> LedgerError {
    LedgerError::Entry { key: String::from_utf8_lossy(key).into_owned(), reason: reason.to_string() }
}

impl Ledger {
    /// Opens an output's ledger, makes it where there is none, and begins a new epoch.
    pub async fn open(out: &Store) -> Result<Self, LedgerError> {
        let settings = Settings { object_store_max_retries: Some(STORE_RETRIES), ..Settings::default() };
        let opening = Db::builder(layout::LEDGER, out.inner()).with_settings(settings).build();
        let db = opening.await.map_err(failed("opening"))?;
        let before = match db.get(EPOCH).await.map_err(failed("reading"))? {
            None => 0,
            Some(bytes) => u64::from_le_bytes(
                bytes.as_ref().try_into().map_err(|_| broken(EPOCH.as_bytes(), "it is not eight bytes"))?,
            ),
        };
        let ledger = Self { db, epoch: Epoch(before + 1), sequence: AtomicU64::new(0) };
        let mut batch = WriteBatch::new();
        batch.put(EPOCH, ledger.epoch.0.to_le_bytes());
        ledger.write(batch).await?;
        Ok(ledger)
    }

    /// Fails once another coordinator has taken over, for a coordinator that has nothing to write.
    pub fn check(&self) -> Result<(), LedgerError> {
        match self.db.status().close_reason {
            Some(CloseReason::Fenced) => Err(LedgerError::Fenced),
            _ => Ok(()),
        }
    }

    /// This coordinator's incarnation.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    async fn write(&self, batch: WriteBatch) -> Result<(), LedgerError> {
        let handle = self.db.write(batch).await.map_err(failed("writing"))?;
        handle.await_durable().await.map_err(failed("writing"))
    }

    /// The fingerprint the ledger was begun with.
    pub async fn fingerprint(&self) -> Result<Option<String>, LedgerError> {
        let found = self.db.get(FINGERPRINT).await.map_err(failed("reading"))?;
        Ok(found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Binds the ledger to a job.
    pub async fn set_fingerprint(&self, fingerprint: &str) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        batch.put(FINGERPRINT, fingerprint);
        self.write(batch).await
    }

    /// Makes a record durable: when this returns, no crash loses it. A record that speaks of several shards is split.
    pub async fn append(&self, record: &Record, shard_size: u32) -> Result<(), LedgerError> {
        let mut parts: BTreeMap<ShardId, StoredRecord> = BTreeMap::new();
        for result in &record.results {
            parts.entry(result.id.sample.shard(shard_size)).or_default().results.push(to_wire(result.clone()));
        }
        for failure in &record.failures {
            parts.entry(failure.sample.shard(shard_size)).or_default().failures.push(failure_to_wire(failure.clone()));
        }
        let mut batch = WriteBatch::new();
        for (shard, part) in parts {
            let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
            let key = format!("{}{:016x}/{sequence:016x}", result_prefix(shard), self.epoch.0);
            batch.put(key, part.encode_to_vec());
        }
        if batch.is_empty() { Ok(()) } else { self.write(batch).await }
    }

    /// The records of an open shard, in the order they were appended.
    pub async fn records(&self, shard: ShardId) -> Result<Vec<Record>, LedgerError> {
        let mut entries = self.db.scan_prefix(result_prefix(shard), ..).await.map_err(failed("reading"))?;
        let mut records = Vec::new();
        while let Some(entry) = entries.next().await.map_err(failed("reading"))? {
            let stored = StoredRecord::decode(entry.value.as_ref()).map_err(|e| broken(&entry.key, e))?;
            let results = stored.results.into_iter().map(from_wire).collect::<Option<Vec<_>>>();
            records.push(Record {
                results: results.ok_or_else(|| broken(&entry.key, "a result names no unit"))?,
                failures: stored.failures.into_iter().map(failure_from_wire).collect(),
            });
        }
        Ok(records)
    }

    /// Marks a shard as committed and drops its records, in one atomic write.
    pub async fn commit(&self, shard: ShardId, totals: ShardTotals) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        let mut entries = self.db.scan_prefix(result_prefix(shard), ..).await.map_err(failed("reading"))?;
        while let Some(entry) = entries.next().await.map_err(failed("reading"))? {
            batch.delete(&entry.key);
        }
        let ShardTotals { samples, quarantined, evaluations, recomputed, spared } = totals;
        let stored = StoredTotals { samples, quarantined, evaluations, recomputed, spared };
        batch.put(done_key(shard), stored.encode_to_vec());
        self.write(batch).await
    }

    /// The committed shards and their totals.
    pub async fn done(&self) -> Result<BTreeMap<ShardId, ShardTotals>, LedgerError> {
        let mut entries = self.db.scan_prefix(DONE, ..).await.map_err(failed("reading"))?;
        let mut done = BTreeMap::new();
        while let Some(entry) = entries.next().await.map_err(failed("reading"))? {
            let hex = String::from_utf8_lossy(&entry.key[DONE.len()..]).into_owned();
            let shard = u32::from_str_radix(&hex, 16).map_err(|e| broken(&entry.key, e))?;
            let stored = StoredTotals::decode(entry.value.as_ref()).map_err(|e| broken(&entry.key, e))?;
            let StoredTotals { samples, quarantined, evaluations, recomputed, spared } = stored;
            done.insert(ShardId(shard), ShardTotals { samples, quarantined, evaluations, recomputed, spared });
        }
        Ok(done)
    }

    /// Closes the ledger; everything appended is durable already.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.db.close().await.map_err(failed("closing"))
    }
}

/// A result as it travels and is stored.
pub fn to_wire(result: UnitResult) -> v1::UnitResult {
    let UnitResult { id, prompts, slots, sum, sum_sq, errors } = result;
    let id = v1::UnitId {
        sample: id.sample.0,
        round: u32::from(id.round.0),
        slots: u32::from(id.slots),
        prompts: u32::from(id.prompts),
    };
    v1::UnitResult { id: Some(id), prompts, slots, sum, sum_sq, errors }
}

/// The reverse of [`to_wire`]; `None` where the unit is missing or out of range.
pub fn from_wire(wire: v1::UnitResult) -> Option<UnitResult> {
    let v1::UnitResult { id, prompts, slots, sum, sum_sq, errors } = wire;
    let id = id?;
    let id = UnitId {
        sample: SampleId(id.sample),
        round: Round(id.round.try_into().ok()?),
        slots: id.slots.try_into().ok()?,
        prompts: id.prompts.try_into().ok()?,
    };
    Some(UnitResult { id, prompts, slots, sum, sum_sq, errors })
}

fn failure_to_wire(failure: SampleFailure) -> v1::SampleFailure {
    v1::SampleFailure { sample: failure.sample.0, stage: failure.stage, error: failure.error }
}

/// A failure as it arrives.
pub fn failure_from_wire(wire: v1::SampleFailure) -> SampleFailure {
    SampleFailure { sample: SampleId(wire.sample), stage: wire.stage, error: wire.error }
}

#[cfg(test)]
mod tests {
    use super::*;
    use elbo_common::store::Location;
    use slatedb::object_store::memory::InMemory;
    use std::sync::Arc;

    fn store() -> Store {
        Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap())
    }

    fn record(sample: u64) -> Record {
        let id = UnitId { sample: SampleId(sample), round: Round(1), slots: 2, prompts: 0 };
        let result = UnitResult {
            id,
            prompts: vec![3, 5],
            slots: 2,
            sum: vec![0.5, 1.0],
            sum_sq: vec![0.25, 1.0],
            errors: vec![],
        };
        let failure = SampleFailure { sample: SampleId(sample + 1), stage: "decode".into(), error: "cut off".into() };
        Record { results: vec![result], failures: vec![failure] }
    }

    #[tokio::test]
    async fn records_survive_a_coordinator_that_never_closed_its_ledger() {
        let out = store();
        let first = Ledger::open(&out).await.unwrap();
        first.set_fingerprint("f").await.unwrap();
        first.append(&record(1), 10).await.unwrap();
        first.append(&record(5), 10).await.unwrap();
        // Not closed: as after a kill.
        let second = Ledger::open(&out).await.unwrap();
        assert_eq!(second.epoch(), Epoch(2));
        assert_eq!(second.fingerprint().await.unwrap().as_deref(), Some("f"));
        second.append(&record(3), 10).await.unwrap();
        assert_eq!(second.records(ShardId(0)).await.unwrap(), [record(1), record(5), record(3)]);
        assert!(second.records(ShardId(1)).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_committed_shard_leaves_its_totals_and_nothing_else() {
        let out = store();
        let ledger = Ledger::open(&out).await.unwrap();
        ledger.append(&record(1), 10).await.unwrap();
        ledger.append(&record(21), 10).await.unwrap();
        let totals = ShardTotals { samples: 10, quarantined: 1, evaluations: 99, recomputed: 4, spared: 7 };
        ledger.commit(ShardId(0), totals).await.unwrap();
        assert!(ledger.records(ShardId(0)).await.unwrap().is_empty());
        assert_eq!(ledger.records(ShardId(2)).await.unwrap().len(), 1);
        assert_eq!(ledger.done().await.unwrap(), BTreeMap::from([(ShardId(0), totals)]));
    }

    #[tokio::test]
    async fn a_second_coordinator_fences_the_first() {
        let out = store();
        let first = Ledger::open(&out).await.unwrap();
        let _second = Ledger::open(&out).await.unwrap();
        let error = first.append(&record(1), 10).await.unwrap_err();
        assert!(matches!(error, LedgerError::Fenced), "{error}");
    }
}
