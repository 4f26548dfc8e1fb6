//! Reads a ledger that a coordinator may have open. Nothing is written, and no coordinator is fenced.

use std::collections::BTreeMap;

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{Epoch, SampleId, ShardId};
use elbo_output::layout;
use elbo_output::verify::Marks;
use elbo_store::Store;
use slatedb::config::DbReaderOptions;
use slatedb::{DbReader, DbReaderMode, KeyValue};

use super::LedgerError;
use super::entries::{DONE, RESULT, RETRY, RecordEntry, entries, failure, retry_entry, shard_of};
use super::mark::done_entry;

/// How often an operation is repeated on a failing store. This is small because a user waits for the answer.
const STORE_RETRIES: u32 = 5;

/// The quarantined samples of open shards, in order; empty if there is no ledger. This includes samples that failed during
/// their audit, though they keep their class.
pub async fn given_up(out: &Store) -> Result<Vec<SampleFailure>, LedgerError> {
    let Some(glance) = Glance::open(out).await? else { return Ok(Vec::new()) };
    let found = failures(&glance).await;
    glance.close().await?;
    found
}

/// The hashes of the files of an output's committed shards; `None` if there is no ledger.
pub async fn marks(out: &Store) -> Result<Option<Marks>, LedgerError> {
    let Some(glance) = Glance::open(out).await? else { return Ok(None) };
    let mark = |entry| done_entry(entry).map(|(shard, mark)| (shard, mark.files));
    let found = entries(&glance.reader, &glance.directory, DONE, mark).await;
    glance.close().await?;
    found.map(Some)
}

/// A ledger that is only read.
struct Glance {
    reader: DbReader,
    directory: String,
}

impl Glance {
    /// Opens a ledger; `None` if there is none.
    async fn open(out: &Store) -> Result<Option<Self>, LedgerError> {
        let files = out.list(layout::LEDGER).await.map_err(LedgerError::Store)?;
        if files.is_empty() {
            return Ok(None);
        }
        let directory = out.location().below(layout::LEDGER);
        let options = DbReaderOptions { object_store_max_retries: Some(STORE_RETRIES), ..DbReaderOptions::default() };
        let reader = DbReader::builder(layout::LEDGER, out.inner()).with_options(options);
        // Pinning the files would be a write, so reading may fail while a coordinator collects garbage.
        let reader = reader.with_reader_mode(DbReaderMode::FollowLatest).with_db_cache_disabled();
        let reader = reader.build().await.map_err(|source| failure("opening", &directory, source))?;
        Ok(Some(Self { reader, directory }))
    }

    async fn close(&self) -> Result<(), LedgerError> {
        self.reader.close().await.map_err(|source| failure("closing", &self.directory, source))
    }
}

async fn failures(glance: &Glance) -> Result<Vec<SampleFailure>, LedgerError> {
    let Glance { reader, directory } = glance;
    let retried: BTreeMap<ShardId, Epoch> = entries(reader, directory, RETRY, retry_entry).await?;
    let failed = |entry: KeyValue| {
        let shard = shard_of(&entry, RESULT)?;
        Ok(RecordEntry::read(&entry)?.since(retried.get(&shard).copied()).failures)
    };
    let failures: Vec<Vec<SampleFailure>> = entries(reader, directory, RESULT, failed).await?;
    let mut given_up: BTreeMap<SampleId, SampleFailure> = BTreeMap::new();
    for failure in failures.into_iter().flatten() {
        given_up.entry(failure.sample).or_insert(failure);
    }
    Ok(given_up.into_values().collect())
}
