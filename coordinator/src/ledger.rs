//! The coordinator's durable memory: a SlateDB database beside the output.
//!
//! ```text
//! epoch                              u64, grows by one with every coordinator
//! fingerprint                        the job the ledger belongs to
//! waste                              evaluations wasted so far
//! hardware/<name>                    an instruction set or a GPU whose results the ledger has
//! result/<shard>/<epoch>/<sequence>  a Record: results and failures of an open shard
//! done/<shard>                       totals of a committed shard, whose results are gone, and the hashes of its files
//! discarded/<fingerprint>            a job that --fresh has discarded: its files may still arrive, and are ignored
//! retry/<shard>                      u64, the epoch in which its quarantined samples were retried: failures of
//!                                    earlier epochs are void, predictions written before are kept
//! ```
//! Writes are acknowledged when they are durable. Opening the ledger fences any coordinator that has it open.

mod entries;
mod glance;
mod mark;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elbo_core::ids::{Epoch, ShardId};
use elbo_output::layout;
use elbo_proto::{bytes_of, v1};
use elbo_store::checksum::Checksum;
use elbo_store::{Location, Store, StoreError};
use prost::Message;
use slatedb::config::{CompactorOptions, GarbageCollectorDirectoryOptions, GarbageCollectorOptions, Settings};
use slatedb::{CloseReason, Db, KeyValue, WriteBatch};

pub use glance::{given_up, marks};
pub use mark::Mark;

use self::entries::{
    DISCARDED, DONE, EPOCH, FINGERPRINT, HARDWARE, RESULT, RETRY, RecordEntry, StoredRecord, WASTE, broken, done_key,
    entries, failure, parse_u64, result_key, result_prefix, retry_entry, retry_key, shard_of,
};
use self::mark::done_entry;
use crate::scheduler::{Record, ShardTotals, Waste};

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
         run the same command again: committed shards whose files are sound are kept, and all others are computed \
         again"
    )]
    Damaged {
        /// Its location.
        directory: String,
        /// What is wrong, and in which file.
        source: Box<slatedb::Error>,
    },
    /// The storage or the database failed.
    #[error("{action} the ledger: {source}; check the output's storage, then run the same command again to resume")]
    Database {
        /// The failed operation.
        action: &'static str,
        /// The cause.
        source: slatedb::Error,
    },
    /// The output can't be read.
    #[error(transparent)]
    Store(StoreError),
    /// An entry can't be understood.
    #[error(
        "the ledger entry {key} can't be understood: {reason}; it was written by another version of elbo or damaged. Make sure that \
         no coordinator works on this output, delete the directory ledger in it by hand, and run the same command again: committed \
         shards whose files are sound are kept, and all others are computed again"
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
    /// Its location, for messages.
    directory: String,
    epoch: Epoch,
    sequence: AtomicU64,
    /// The stored waste.
    waste: Mutex<Waste>,
    /// The stored hardware.
    hardware: Mutex<BTreeSet<String>>,
    /// The epoch and sequence of every record of the shards in progress, so that a commit can delete the records without a
    /// scan.
    records: Mutex<HashMap<ShardId, Vec<(Epoch, u64)>>>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("epoch", &self.epoch).finish_non_exhaustive()
    }
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
    /// The entry for a part of this many bytes: the last entry, or a new one if that is full.
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

/// The most bytes in an entry of a record. Larger records are stored in several entries.
const RECORD_BYTES: usize = 1 << 20;

/// The most kinds of hardware that are noted, whatever workers claim.
const MOST_HARDWARE: usize = 100;

/// How often the ledger repeats an operation on a failing store before it gives up: for a minute or two.
const STORE_RETRIES: u32 = 40;

/// Settings that bound the size of the database. The entries of done shards are compacted and deleted within a minute or
/// two; the defaults would leave them for half an hour. Files that are not in a manifest yet are safe at any age: the
/// collector deletes nothing newer than the newest file of the manifest, or than a compaction in progress.
fn settings(location: &Location) -> Settings {
    let is_local = matches!(location, Location::Local(_));
    let (minute, half) = (Duration::from_secs(60), Duration::from_secs(30));
    let collect = |interval, min_age| {
        Some(GarbageCollectorDirectoryOptions { interval: Some(interval), min_age, dry_run: false })
    };
    Settings {
        // A write waits up to this long to become durable. On a disk that adds latency to every round; on an object store
        // each put costs money.
        flush_interval: Some(Duration::from_millis(if is_local { 10 } else { 100 })),
        l0_sst_size_bytes: 16 << 20,
        // If the store takes no more, writers wait, so that memory does not fill up.
        max_unflushed_bytes: 64 << 20,
        object_store_max_retries: Some(STORE_RETRIES),
        compactor_options: Some(CompactorOptions {
            // Our scans are shorter than this.
            checkpoint_lifetime: minute,
            max_concurrent_compactions: 2,
            ..CompactorOptions::default()
        }),
        garbage_collector_options: Some(GarbageCollectorOptions {
            wal_options: collect(half, half),
            compacted_options: collect(half, half),
            manifest_options: collect(5 * minute, 60 * minute),
            compactions_options: collect(5 * minute, 60 * minute),
            // Local files have no conditional overwrite. With boundary files, nothing would ever be deleted there.
            boundary_files_enabled: !is_local,
            ..GarbageCollectorOptions::default()
        }),
        ..Settings::default()
    }
}

impl Ledger {
    /// Opens an output's ledger, creates it if there is none, and begins a new epoch.
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
        let (hardware, records) = (Mutex::default(), Mutex::default());
        let ledger = Self { db, directory, epoch, sequence, waste: Mutex::new(waste), hardware, records };
        let name = |entry: KeyValue| Ok(String::from_utf8_lossy(&entry.key[HARDWARE.len()..]).into_owned());
        *ledger.known_hardware() = ledger.entries(HARDWARE, name).await?;
        ledger.hold().await?;
        Ok(ledger)
    }

    /// The error for a database operation that failed.
    fn failed(&self, action: &'static str) -> impl Fn(slatedb::Error) -> LedgerError + '_ {
        move |source| failure(action, &self.directory, source)
    }

    /// Reads and parses the entries whose keys begin with a prefix.
    async fn entries<T, C: Default + Extend<T>>(
        &self,
        prefix: &str,
        parse: impl FnMut(KeyValue) -> Result<T, LedgerError>,
    ) -> Result<C, LedgerError> {
        entries(&self.db, &self.directory, prefix, parse).await
    }

    /// Fails once another coordinator has taken over. For a coordinator that has nothing to write.
    pub fn check(&self) -> Result<(), LedgerError> {
        match self.db.status().close_reason {
            Some(CloseReason::Fenced) => Err(LedgerError::Fenced),
            _ => Ok(()),
        }
    }

    /// Ensures, by a durable write of known data, that no other coordinator has taken over.
    pub async fn hold(&self) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        batch.put(EPOCH, self.epoch.0.to_le_bytes());
        self.write(batch).await
    }

    /// This coordinator's epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The stored waste.
    pub fn waste(&self) -> Waste {
        *self.waste.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_hardware(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.hardware.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What computed the job's results: instruction sets of CPUs, and GPUs.
    pub fn hardware(&self) -> BTreeSet<String> {
        self.known_hardware().clone()
    }

    /// Notes, before its first result is stored, what computed it.
    pub async fn note_hardware(&self, name: &str) -> Result<(), LedgerError> {
        {
            let known = self.known_hardware();
            if known.contains(name) || known.len() >= MOST_HARDWARE {
                return Ok(());
            }
        }
        let mut batch = WriteBatch::new();
        batch.put(format!("{HARDWARE}{name}"), []);
        self.write(batch).await?;
        let mut known = self.known_hardware();
        known.insert(name.to_owned());
        if known.len() > 1 {
            tracing::info!(hardware = ?known, "the job's results come from several kinds of hardware");
        }
        Ok(())
    }

    /// Adds the waste so far to a batch.
    fn note_waste(&self, batch: &mut WriteBatch, waste: Waste) {
        let mut stored = self.waste.lock().unwrap_or_else(PoisonError::into_inner);
        // Two calls at the same time may arrive in the wrong order: keep the larger counts.
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

    /// The fingerprint of the job that began the ledger.
    pub async fn fingerprint(&self) -> Result<Option<String>, LedgerError> {
        let found = self.db.get(FINGERPRINT).await.map_err(self.failed("reading"))?;
        Ok(found.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Binds the ledger to a job, some of whose shards may be committed already.
    pub async fn begin(&self, fingerprint: &str, committed: BTreeMap<ShardId, Mark>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        batch.put(FINGERPRINT, fingerprint);
        for (shard, mark) in committed {
            batch.put(done_key(shard), mark.encode());
        }
        self.write(batch).await
    }

    /// Forgets a job in one atomic write, so that another can start over. The epoch continues, so any coordinator of the
    /// old job stays fenced. Files that the old job left in the output are ignored from here on, whenever they arrive.
    pub async fn discard(&self, left: impl IntoIterator<Item = String>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        for prefix in [DONE, RESULT, RETRY, HARDWARE] {
            let keys: Vec<_> = self.entries(prefix, |entry| Ok(entry.key)).await?;
            keys.into_iter().for_each(|key| batch.delete(key));
        }
        for fingerprint in self.fingerprint().await?.into_iter().chain(left) {
            batch.put(format!("{DISCARDED}{fingerprint}"), []);
        }
        batch.delete(FINGERPRINT);
        batch.delete(WASTE);
        self.write(batch).await?;
        *self.waste.lock().unwrap_or_else(PoisonError::into_inner) = Waste::default();
        self.known_records().clear();
        self.known_hardware().clear();
        Ok(())
    }

    /// The fingerprints of discarded jobs.
    pub async fn discarded(&self) -> Result<BTreeSet<String>, LedgerError> {
        let name = |entry: KeyValue| Ok(String::from_utf8_lossy(&entry.key[DISCARDED.len()..]).into_owned());
        self.entries(DISCARDED, name).await
    }

    fn known_records(&self) -> MutexGuard<'_, HashMap<ShardId, Vec<(Epoch, u64)>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a record durable: when this returns, no crash loses it. Records of several shards and large records are split,
    /// but written atomically, together with the waste so far.
    pub async fn append(&self, record: &Record, shard_size: u32, waste: Waste) -> Result<(), LedgerError> {
        let mut parts: BTreeMap<ShardId, Parts> = BTreeMap::new();
        for result in &record.results {
            let parts = parts.entry(result.id.sample.shard(shard_size)).or_default();
            parts.with_room(bytes_of(&result.reported)).results.push(result.reported.clone());
        }
        for failure in &record.failures {
            let parts = parts.entry(failure.sample.shard(shard_size)).or_default();
            let failure = v1::SampleFailure::from(failure.clone());
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

    /// The records of a shard, in the order they were appended. Call this before appending any. Failures from before the
    /// epoch in which the shard was `retried` are left out.
    pub async fn records(&self, shard: ShardId, retried: Option<Epoch>) -> Result<Vec<Record>, LedgerError> {
        let entries: Vec<_> = self.entries(&result_prefix(shard), |entry| RecordEntry::read(&entry)).await?;
        let known = entries.iter().map(|entry| (entry.epoch, entry.sequence)).collect();
        self.known_records().insert(shard, known);
        Ok(entries.into_iter().map(|entry| entry.since(retried)).collect())
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

    /// Notes that a file of a committed shard is about to be replaced: from here on, the old and the new content are both
    /// valid.
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

    /// Forgets that shards were committed, so that they are computed again. Their evaluations count as waste.
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

    /// Marks the quarantined samples of some shards for a retry, in one atomic write.
    pub async fn retry(&self, shards: impl IntoIterator<Item = ShardId>) -> Result<(), LedgerError> {
        let mut batch = WriteBatch::new();
        for shard in shards {
            batch.delete(done_key(shard));
            batch.put(retry_key(shard), self.epoch.0.to_le_bytes());
        }
        if batch.is_empty() { Ok(()) } else { self.write(batch).await }
    }

    /// The shards whose quarantined samples are retried, with the epoch of the retry.
    pub async fn retried(&self) -> Result<BTreeMap<ShardId, Epoch>, LedgerError> {
        self.entries(RETRY, retry_entry).await
    }

    /// The shards in progress, which have records.
    pub async fn begun(&self) -> Result<BTreeSet<ShardId>, LedgerError> {
        self.entries(RESULT, |entry| shard_of(&entry, RESULT)).await
    }

    /// The committed shards.
    pub async fn done(&self) -> Result<BTreeMap<ShardId, Mark>, LedgerError> {
        self.entries(DONE, done_entry).await
    }

    /// Closes the ledger. Everything appended is already durable.
    pub async fn close(&self) -> Result<(), LedgerError> {
        self.db.close().await.map_err(self.failed("closing"))
    }
}

#[cfg(test)]
mod tests;
