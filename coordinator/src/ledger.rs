//! The coordinator's durable memory: a SlateDB database beside the output.
//!
//! ```text
//! epoch                              u64, grows by one with every coordinator
//! fingerprint                        the job the ledger belongs to
//! waste                              evaluations that came to nothing so far
//! result/<shard>/<epoch>/<sequence>  a Record: results and failures of an open shard
//! done/<shard>                       totals of a committed shard, whose results are gone, and what its files hash to
//! discarded/<fingerprint>            a job that --fresh has discarded: files of it may still arrive, and count for nothing
//! retry/<shard>                      u64, the epoch in which its quarantined samples were given another try: failures of
//!                                    earlier epochs are void, predictions written before stay
//! ```
//! Writes are acknowledged when durable. Opening fences any coordinator that had the ledger open.

mod glance;
mod mark;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_output::layout;
use elbo_proto::{bytes_of, v1};
use elbo_store::checksum::Checksum;
use elbo_store::{Location, Store, StoreError};
use prost::Message;
use slatedb::config::{CompactorOptions, GarbageCollectorDirectoryOptions, GarbageCollectorOptions, Settings};
use slatedb::{CloseReason, Db, ErrorKind, KeyValue, WriteBatch};

pub use glance::{given_up, marks};
pub use mark::Mark;

use mark::done_entry;

use crate::scheduler::{Record, SampleFailure, ShardTotals, UnitResult, Waste};

/// A ledger that can't be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Another coordinator has taken over.
    #[error(
        "another coordinator has taken over this job's ledger: this one stops; only one coordinator may work on an output at a time"
    )]
    Fenced,
    /// Its files are damaged.
    #[error(
        "the ledger is damaged ({source}). Make sure that no coordinator works on this output, delete {directory} by hand, and \
         run the same command again: committed shards whose files are sound are kept, and of the others everything is computed \
         again"
    )]
    Damaged {
        /// Where it lies.
        directory: String,
        /// What is wrong, and with which file.
        source: Box<slatedb::Error>,
    },
    /// The storage or the database failed.
    #[error("{action} the ledger: {source}; check the output's storage, then run the same command again to resume")]
    Database {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: slatedb::Error,
    },
    /// The output can't be read.
    #[error(transparent)]
    Store(StoreError),
    /// An entry can't be understood.
    #[error(
        "the ledger entry {key} can't be understood: {reason}; it was written by another version of elbo or damaged. Make sure that \
         no coordinator works on this output, delete the directory ledger in it by hand, and run the same command again: committed \
         shards whose files are sound are kept, and of the others everything is computed again"
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
    /// Where it lies, for people.
    directory: String,
    epoch: Epoch,
    sequence: AtomicU64,
    /// What is stored of it.
    waste: Mutex<Waste>,
    /// The epoch and sequence of every record of the shards in work, so that a commit deletes them without a scan.
    records: Mutex<HashMap<ShardId, Vec<(Epoch, u64)>>>,
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

/// A shard's part of a record, in entries of bounded size.
#[derive(Debug, Default)]
struct Parts(Vec<Part>);

#[derive(Debug, Default)]
struct Part {
    record: StoredRecord,
    bytes: usize,
}

impl Parts {
    /// The entry for something of so many bytes: the last one, or another where that is full.
    fn with_room(&mut self, bytes: usize) -> &mut StoredRecord {
        if self.0.last().is_none_or(|last| last.bytes + bytes > RECORD_BYTES) {
            self.0.push(Part::default());
        }
        let last = self.0.len() - 1;
        self.0[last].bytes += bytes;
        &mut self.0[last].record
    }
}

#[derive(Clone, Copy, PartialEq, Message)]
struct StoredWaste {
    #[prost(uint64, tag = "1")]
    recomputed: u64,
    #[prost(uint64, tag = "2")]
    duplicated: u64,
}

/// Bytes of a record's entry at most: what has more is stored in several.
const RECORD_BYTES: usize = 1 << 20;

/// How often an operation is repeated on a failing store before the ledger gives up: for a minute or two, not for ever.
const STORE_RETRIES: u32 = 40;

const EPOCH: &str = "epoch";
const FINGERPRINT: &str = "fingerprint";
const WASTE: &str = "waste";
const DONE: &str = "done/";
const RESULT: &str = "result/";
const RETRY: &str = "retry/";
const DISCARDED: &str = "discarded/";

fn result_prefix(shard: ShardId) -> String {
    format!("{RESULT}{:08x}/", shard.0)
}

fn result_key(shard: ShardId, epoch: Epoch, sequence: u64) -> String {
    format!("{}{:016x}/{sequence:016x}", result_prefix(shard), epoch.0)
}

fn retry_key(shard: ShardId) -> String {
    format!("{RETRY}{:08x}", shard.0)
}

/// The shard that follows a prefix in a key.
fn parse_shard(key: &[u8], prefix: &str) -> Option<ShardId> {
    let digits = std::str::from_utf8(key).ok()?.strip_prefix(prefix)?.get(..8)?;
    u32::from_str_radix(digits, 16).ok().map(ShardId)
}

fn parse_u64(key: &[u8], value: &[u8]) -> Result<u64, LedgerError> {
    Ok(u64::from_le_bytes(value.try_into().map_err(|_| broken(key, "it is not eight bytes"))?))
}

/// The reverse of [`result_key`].
fn parse_result_key(key: &[u8]) -> Option<(Epoch, u64)> {
    let mut parts = std::str::from_utf8(key).ok()?.rsplit('/');
    let (sequence, epoch) = (parts.next()?, parts.next()?);
    Some((Epoch(u64::from_str_radix(epoch, 16).ok()?), u64::from_str_radix(sequence, 16).ok()?))
}

/// How the database keeps its size in bounds: what shards leave behind when they are done is compacted and deleted within
/// a minute or two, where the defaults would leave it for half an hour. Files that no manifest speaks of yet are safe at any
/// age: nothing newer than the newest file of the manifest, or than a compaction in progress, is collected.
fn settings(location: &Location) -> Settings {
    let is_local = matches!(location, Location::Local(_));
    let (minute, half) = (Duration::from_secs(60), Duration::from_secs(30));
    let collect = |interval, min_age| {
        Some(GarbageCollectorDirectoryOptions { interval: Some(interval), min_age, dry_run: false })
    };
    Settings {
        // A write that waits to be durable waits for its turn: on a disk that costs the latency of every round, on an object
        // store puts cost money.
        flush_interval: Some(Duration::from_millis(if is_local { 10 } else { 100 })),
        l0_sst_size_bytes: 16 << 20,
        // Writers wait when the store takes no more, rather than fill the memory.
        max_unflushed_bytes: 64 << 20,
        object_store_max_retries: Some(STORE_RETRIES),
        compactor_options: Some(CompactorOptions {
            // No scan of ours takes so long.
            checkpoint_lifetime: minute,
            max_concurrent_compactions: 2,
            ..CompactorOptions::default()
        }),
        garbage_collector_options: Some(GarbageCollectorOptions {
            wal_options: collect(half, half),
            compacted_options: collect(half, half),
            manifest_options: collect(5 * minute, 60 * minute),
            compactions_options: collect(5 * minute, 60 * minute),
            // Local files know no conditional overwrite; without it nothing would ever be deleted.
            boundary_files_enabled: !is_local,
            ..GarbageCollectorOptions::default()
        }),
        ..Settings::default()
    }
}

fn done_key(shard: ShardId) -> String {
    format!("{DONE}{:08x}", shard.0)
}

/// What a failure of the database in a directory means.
fn failure(action: &'static str, directory: &str, source: slatedb::Error) -> LedgerError {
    match source.kind() {
        ErrorKind::Closed(CloseReason::Fenced) => LedgerError::Fenced,
        // A manifest that makes no sense is an internal error to the database.
        ErrorKind::Data | ErrorKind::Internal if action != "writing" => {
            LedgerError::Damaged { directory: directory.to_owned(), source: Box::new(source) }
        }
        _ => LedgerError::Database { action, source },
    }
}

fn broken(key: &[u8], reason: impl ToString) -> LedgerError {
    LedgerError::Entry { key: String::from_utf8_lossy(key).into_owned(), reason: reason.to_string() }
}

impl Ledger {
    /// Opens an output's ledger, makes it where there is none, and begins a new epoch.
    pub async fn open(out: &Store) -> Result<Self, LedgerError> {
        let directory = out.location().below(layout::LEDGER);
        let failed = |action| {
            let directory = directory.clone();
            move |source| failure(action, &directory, source)
        };
        let db = Db::builder(layout::LEDGER, out.inner()).with_settings(settings(out.location()));
        let db = db.build().await.map_err(failed("opening"))?;
        let before = match db.get(EPOCH).await.map_err(failed("reading"))? {
            None => 0,
            Some(bytes) => parse_u64(EPOCH.as_bytes(), &bytes)?,
        };
        let waste = match db.get(WASTE).await.map_err(failed("reading"))? {
            None => Waste::default(),
            Some(bytes) => {
                let stored = StoredWaste::decode(bytes.as_ref()).map_err(|e| broken(WASTE.as_bytes(), e))?;
                Waste { recomputed: stored.recomputed, duplicated: stored.duplicated }
            }
        };
        let (epoch, sequence) = (Epoch(before + 1), AtomicU64::new(0));
        let ledger = Self { db, directory, epoch, sequence, waste: Mutex::new(waste), records: Mutex::default() };
        ledger.hold().await?;
        Ok(ledger)
    }

    /// What went wrong with the database while something was done.
    fn failed(&self, action: &'static str) -> impl Fn(slatedb::Error) -> LedgerError + '_ {
        move |source| failure(action, &self.directory, source)
    }

    /// Takes every entry whose key begins with a prefix.
    async fn each(
        &self,
        prefix: &str,
        mut take: impl FnMut(KeyValue) -> Result<(), LedgerError>,
    ) -> Result<(), LedgerError> {
        let mut entries = self.db.scan_prefix(prefix, ..).await.map_err(self.failed("reading"))?;
        while let Some(entry) = entries.next().await.map_err(self.failed("reading"))? {
            take(entry)?;
        }
        Ok(())
    }

    /// Fails once another coordinator has taken over, for a coordinator that has nothing to write.
    pub fn check(&self) -> Result<(), LedgerError> {
        match self.db.status().close_reason {
            Some(CloseReason::Fenced) => Err(LedgerError::Fenced),
            _ => Ok(()),
        }
    }

    /// Makes sure, by a durable write of what is known, that no other coordinator has taken over.
    pub async fn hold(&self) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        batch.put(EPOCH, self.epoch.0.to_le_bytes());
        self.write(batch).await
    }

    /// This coordinator's incarnation.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What came to nothing before this coordinator, as far as it was noted.
    pub fn waste(&self) -> Waste {
        *self.waste.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what has come to nothing so far along with something else.
    fn note_waste(&self, batch: &mut WriteBatch, waste: Waste) {
        let mut stored = self.waste.lock().unwrap_or_else(PoisonError::into_inner);
        // Of two that come at the same time, the one that knows less may come last.
        let (recomputed, duplicated) =
            (waste.recomputed.max(stored.recomputed), waste.duplicated.max(stored.duplicated));
        if *stored != (Waste { recomputed, duplicated }) {
            *stored = Waste { recomputed, duplicated };
            batch.put(WASTE, StoredWaste { recomputed, duplicated }.encode_to_vec());
        }
    }

    async fn write(&self, batch: WriteBatch) -> Result<(), LedgerError> {
        let handle = self.db.write(batch).await.map_err(self.failed("writing"))?;
        handle.await_durable().await.map_err(self.failed("writing"))
    }

    /// The fingerprint the ledger was begun with.
    pub async fn fingerprint(&self) -> Result<Option<String>, LedgerError> {
        let found = self.db.get(FINGERPRINT).await.map_err(self.failed("reading"))?;
        Ok(found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Binds the ledger to a job, of which some shards are committed already.
    pub async fn begin(&self, fingerprint: &str, committed: BTreeMap<ShardId, Mark>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        batch.put(FINGERPRINT, fingerprint);
        for (shard, mark) in committed {
            batch.put(done_key(shard), mark.encode());
        }
        self.write(batch).await
    }

    /// Forgets a job for one that starts over, in one atomic write. The epoch goes on: whoever worked on the old job stays
    /// fenced. What it left in the output counts for nothing from here on, whenever it arrives.
    pub async fn discard(&self, left: impl IntoIterator<Item = String>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        for prefix in [DONE, RESULT, RETRY] {
            self.each(prefix, |entry| {
                batch.delete(entry.key);
                Ok(())
            })
            .await?;
        }
        for fingerprint in self.fingerprint().await?.into_iter().chain(left) {
            batch.put(format!("{DISCARDED}{fingerprint}"), []);
        }
        batch.delete(FINGERPRINT);
        batch.delete(WASTE);
        self.write(batch).await?;
        *self.waste.lock().unwrap_or_else(PoisonError::into_inner) = Waste::default();
        self.known_records().clear();
        Ok(())
    }

    /// The fingerprints of discarded jobs.
    pub async fn discarded(&self) -> Result<BTreeSet<String>, LedgerError> {
        let mut discarded = BTreeSet::new();
        self.each(DISCARDED, |entry| {
            discarded.insert(String::from_utf8_lossy(&entry.key[DISCARDED.len()..]).into_owned());
            Ok(())
        })
        .await?;
        Ok(discarded)
    }

    fn known_records(&self) -> MutexGuard<'_, HashMap<ShardId, Vec<(Epoch, u64)>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a record durable: when this returns, no crash loses it. A record that speaks of several shards is split, and so is
    /// a large one; all of it is one atomic write. With it goes what has come to nothing so far.
    pub async fn append(&self, record: &Record, shard_size: u32, waste: Waste) -> Result<(), LedgerError> {
        let mut parts: BTreeMap<ShardId, Parts> = BTreeMap::new();
        for result in &record.results {
            let parts = parts.entry(result.id.sample.shard(shard_size)).or_default();
            let result = to_wire(result.clone());
            parts.with_room(bytes_of(&result)).results.push(result);
        }
        for failure in &record.failures {
            let parts = parts.entry(failure.sample.shard(shard_size)).or_default();
            let failure = failure_to_wire(failure.clone());
            parts.with_room(bytes_of(&failure)).failures.push(failure);
        }
        let mut batch = WriteBatch::new();
        for (shard, part) in parts.into_iter().flat_map(|(shard, parts)| parts.0.into_iter().map(move |p| (shard, p))) {
            let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
            batch.put(result_key(shard, self.epoch, sequence), part.record.encode_to_vec());
            self.known_records().entry(shard).or_default().push((self.epoch, sequence));
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.note_waste(&mut batch, waste);
        self.write(batch).await
    }

    /// The records of a shard, in the order they were appended; to be asked for before any is appended. Failures from before
    /// the epoch in which the shard was `retried` are left out.
    pub async fn records(&self, shard: ShardId, retried: Option<Epoch>) -> Result<Vec<Record>, LedgerError> {
        let (mut records, mut known) = (Vec::new(), Vec::new());
        self.each(&result_prefix(shard), |entry| {
            let stored = StoredRecord::decode(entry.value.as_ref()).map_err(|e| broken(&entry.key, e))?;
            let place = parse_result_key(&entry.key).ok_or_else(|| broken(&entry.key, "its key is not a record's"))?;
            known.push(place);
            let failures = if retried.is_some_and(|retried| place.0 < retried) { Vec::new() } else { stored.failures };
            let results = stored.results.into_iter().map(from_wire).collect::<Option<Vec<_>>>();
            records.push(Record {
                results: results.ok_or_else(|| broken(&entry.key, "a result names no unit"))?,
                failures: failures.into_iter().map(failure_from_wire).collect(),
            });
            Ok(())
        })
        .await?;
        self.known_records().insert(shard, known);
        Ok(records)
    }

    /// Marks a shard as committed and drops its records, in one atomic write.
    pub async fn commit(&self, shard: ShardId, mark: Mark, waste: Waste) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        self.note_waste(&mut batch, waste);
        for (epoch, sequence) in self.known_records().remove(&shard).unwrap_or_default() {
            batch.delete(result_key(shard, epoch, sequence));
        }
        batch.put(done_key(shard), mark.encode());
        batch.delete(retry_key(shard));
        self.write(batch).await
    }

    /// Notes that a file of a committed shard is about to be replaced: from here on both are as they should be.
    pub async fn expect(&self, shard: ShardId, file: Checksum) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        match self.mark(shard).await? {
            Some(mut mark) if !mark.files.is_empty() => {
                mark.files.push(file);
                batch.put(done_key(shard), mark.encode());
            }
            _ => batch.put(EPOCH, self.epoch.0.to_le_bytes()),
        }
        self.write(batch).await
    }

    /// Notes that files of committed shards have been replaced.
    pub async fn settle(&self, files: Vec<(ShardId, Checksum)>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        for (shard, file) in files {
            let Some(mut mark) = self.mark(shard).await?.filter(|mark| !mark.files.is_empty()) else { continue };
            mark.files.retain(|other| other.path != file.path);
            mark.files.push(file);
            batch.put(done_key(shard), mark.encode());
        }
        if batch.is_empty() { Ok(()) } else { self.write(batch).await }
    }

    async fn mark(&self, shard: ShardId) -> Result<Option<Mark>, LedgerError> {
        let key = done_key(shard);
        let found = self.db.get(&key).await.map_err(self.failed("reading"))?;
        found.map(|value| Mark::decode(key.as_bytes(), &value)).transpose()
    }

    /// Forgets that shards were committed, so that they are computed again; what they took comes to nothing.
    pub async fn reopen(&self, shards: &BTreeMap<ShardId, ShardTotals>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        let mut waste = self.waste();
        for (shard, totals) in shards {
            batch.delete(done_key(*shard));
            batch.delete(retry_key(*shard));
            waste.recomputed += totals.evaluations;
        }
        self.note_waste(&mut batch, waste);
        self.write(batch).await
    }

    /// Gives the quarantined samples of some shards another try, in one atomic write.
    pub async fn retry(&self, shards: impl IntoIterator<Item = ShardId>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        for shard in shards {
            batch.delete(done_key(shard));
            batch.put(retry_key(shard), self.epoch.0.to_le_bytes());
        }
        if batch.is_empty() { Ok(()) } else { self.write(batch).await }
    }

    /// The shards whose quarantined samples get another try, and since which epoch.
    pub async fn retried(&self) -> Result<BTreeMap<ShardId, Epoch>, LedgerError> {
        let mut retried = BTreeMap::new();
        self.each(RETRY, |entry| {
            let shard = parse_shard(&entry.key, RETRY).ok_or_else(|| broken(&entry.key, "it names no shard"))?;
            retried.insert(shard, Epoch(parse_u64(&entry.key, &entry.value)?));
            Ok(())
        })
        .await?;
        Ok(retried)
    }

    /// The shards that are in work: there are records of them.
    pub async fn begun(&self) -> Result<BTreeSet<ShardId>, LedgerError> {
        let mut begun = BTreeSet::new();
        self.each(RESULT, |entry| {
            begun.insert(parse_shard(&entry.key, RESULT).ok_or_else(|| broken(&entry.key, "it names no shard"))?);
            Ok(())
        })
        .await?;
        Ok(begun)
    }

    /// The committed shards.
    pub async fn done(&self) -> Result<BTreeMap<ShardId, Mark>, LedgerError> {
        let mut done = BTreeMap::new();
        self.each(DONE, |entry| {
            let (shard, mark) = done_entry(&entry)?;
            done.insert(shard, mark);
            Ok(())
        })
        .await?;
        Ok(done)
    }

    /// Closes the ledger; everything appended is durable already.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.db.close().await.map_err(self.failed("closing"))
    }
}

/// A result as it travels and is stored.
pub fn to_wire(result: UnitResult) -> v1::UnitResult {
    let UnitResult { id, prompts, slots, sum, sum_sq, errors } = result;
    v1::UnitResult { id: Some(id.into()), prompts, slots, sum, sum_sq, errors }
}

/// The reverse of [`to_wire`]; `None` where the unit is missing or out of range.
pub fn from_wire(wire: v1::UnitResult) -> Option<UnitResult> {
    let v1::UnitResult { id, prompts, slots, sum, sum_sq, errors } = wire;
    Some(UnitResult { id: id?.try_into().ok()?, prompts, slots, sum, sum_sq, errors })
}

fn failure_to_wire(failure: SampleFailure) -> v1::SampleFailure {
    v1::SampleFailure { sample: failure.sample.0, stage: failure.stage, error: failure.error }
}

/// A failure as it arrives.
pub fn failure_from_wire(wire: v1::SampleFailure) -> SampleFailure {
    SampleFailure { sample: SampleId(wire.sample), stage: wire.stage, error: wire.error }
}

#[cfg(test)]
mod tests;
