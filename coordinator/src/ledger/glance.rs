//! What a ledger knows, read beside whoever has it open: nothing is written, nobody is fenced.

use std::collections::BTreeMap;

use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_output::layout;
use elbo_output::verify::Marks;
use elbo_store::Store;
use prost::Message;
use slatedb::config::DbReaderOptions;
use slatedb::{DbReader, DbReaderMode, KeyValue};

use super::mark::done_entry;
use super::{
    DONE, LedgerError, RESULT, RETRY, StoredRecord, broken, failure, failure_from_wire, parse_result_key, parse_shard,
    parse_u64,
};
use crate::scheduler::SampleFailure;

/// How often an operation is repeated on a failing store: somebody waits for the answer.
const STORE_RETRIES: u32 = 5;

/// The samples of open shards that are given up, in order; none where there is no ledger. A sample that failed while it was
/// audited is among them, though it keeps its class.
pub async fn given_up(out: &Store) -> Result<Vec<SampleFailure>, LedgerError> {
    let Some(glance) = Glance::open(out).await? else { return Ok(Vec::new()) };
    let found = failures(&glance).await;
    glance.close().await?;
    found
}

/// What the files of an output's committed shards hash to; none where there is no ledger.
pub async fn marks(out: &Store) -> Result<Option<Marks>, LedgerError> {
    let Some(glance) = Glance::open(out).await? else { return Ok(None) };
    let entries = glance.entries(DONE).await;
    glance.close().await?;
    let mark = |entry| done_entry(&entry).map(|(shard, mark)| (shard, mark.files));
    entries?.into_iter().map(mark).collect::<Result<_, _>>().map(Some)
}

/// A ledger that is only read.
struct Glance {
    reader: DbReader,
    directory: String,
}

impl Glance {
    /// `None` where there is no ledger.
    async fn open(out: &Store) -> Result<Option<Self>, LedgerError> {
        let files = out.list(layout::LEDGER).await.map_err(LedgerError::Store)?;
        if files.is_empty() {
            return Ok(None);
        }
        let directory = out.location().below(layout::LEDGER);
        let options = DbReaderOptions { object_store_max_retries: Some(STORE_RETRIES), ..DbReaderOptions::default() };
        let reader = DbReader::builder(layout::LEDGER, out.inner()).with_options(options);
        // Its files are not held fast, which would be a write: while a coordinator collects its garbage, reading may fail.
        let reader = reader.with_reader_mode(DbReaderMode::FollowLatest).with_db_cache_disabled();
        let reader = reader.build().await.map_err(|source| failure("opening", &directory, source))?;
        Ok(Some(Self { reader, directory }))
    }

    /// All entries whose keys begin with a prefix.
    async fn entries(&self, prefix: &str) -> Result<Vec<KeyValue>, LedgerError> {
        let failed = |source| failure("reading", &self.directory, source);
        let mut found = self.reader.scan_prefix(prefix, ..).await.map_err(failed)?;
        let mut entries = Vec::new();
        while let Some(entry) = found.next().await.map_err(failed)? {
            entries.push(entry);
        }
        Ok(entries)
    }

    async fn close(&self) -> Result<(), LedgerError> {
        self.reader.close().await.map_err(|source| failure("closing", &self.directory, source))
    }
}

async fn failures(glance: &Glance) -> Result<Vec<SampleFailure>, LedgerError> {
    let mut retried: BTreeMap<ShardId, Epoch> = BTreeMap::new();
    for entry in glance.entries(RETRY).await? {
        let shard = parse_shard(&entry.key, RETRY).ok_or_else(|| broken(&entry.key, "it names no shard"))?;
        retried.insert(shard, Epoch(parse_u64(&entry.key, &entry.value)?));
    }
    let mut given_up: BTreeMap<SampleId, SampleFailure> = BTreeMap::new();
    for entry in glance.entries(RESULT).await? {
        let shard = parse_shard(&entry.key, RESULT).ok_or_else(|| broken(&entry.key, "it names no shard"))?;
        let (epoch, _) = parse_result_key(&entry.key).ok_or_else(|| broken(&entry.key, "its key is not a record's"))?;
        if retried.get(&shard).is_some_and(|since| epoch < *since) {
            continue;
        }
        let stored = StoredRecord::decode(entry.value.as_ref()).map_err(|e| broken(&entry.key, e))?;
        for failure in stored.failures.into_iter().map(failure_from_wire) {
            given_up.entry(failure.sample).or_insert(failure);
        }
    }
    Ok(given_up.into_values().collect())
}
