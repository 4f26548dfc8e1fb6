//! What a ledger knows of shards that are not committed, read beside whoever has it open: nothing is written, nobody is fenced.

use std::collections::BTreeMap;

use elbo_common::ids::{Epoch, SampleId, ShardId};
use elbo_common::layout;
use elbo_common::store::Store;
use prost::Message;
use slatedb::config::DbReaderOptions;
use slatedb::{DbReader, DbReaderMode};

use super::{
    LedgerError, RESULT, RETRY, StoredRecord, broken, failed, failure_from_wire, parse_result_key, parse_shard,
    parse_u64,
};
use crate::brain::SampleFailure;

/// How often an operation is repeated on a failing store: somebody waits for the answer.
const STORE_RETRIES: u32 = 5;

/// The samples of open shards that are given up, in order; none where there is no ledger. A sample that failed while it was
/// audited is among them, though it keeps its class.
pub async fn given_up(out: &Store) -> Result<Vec<SampleFailure>, LedgerError> {
    let files = out.list(layout::LEDGER).await.map_err(LedgerError::Store)?;
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let options = DbReaderOptions { object_store_max_retries: Some(STORE_RETRIES), ..DbReaderOptions::default() };
    let reader = DbReader::builder(layout::LEDGER, out.inner()).with_options(options);
    // Its files are not held fast, which would be a write: while a coordinator collects its garbage, reading may fail.
    let reader = reader.with_reader_mode(DbReaderMode::FollowLatest).with_db_cache_disabled();
    let reader = reader.build().await.map_err(failed("opening"))?;
    let found = read(&reader).await;
    reader.close().await.map_err(failed("closing"))?;
    found
}

async fn read(reader: &DbReader) -> Result<Vec<SampleFailure>, LedgerError> {
    let mut retried: BTreeMap<ShardId, Epoch> = BTreeMap::new();
    let mut entries = reader.scan_prefix(RETRY, ..).await.map_err(failed("reading"))?;
    while let Some(entry) = entries.next().await.map_err(failed("reading"))? {
        let shard = parse_shard(&entry.key, RETRY).ok_or_else(|| broken(&entry.key, "it names no shard"))?;
        retried.insert(shard, Epoch(parse_u64(&entry.key, &entry.value)?));
    }
    let mut given_up: BTreeMap<SampleId, SampleFailure> = BTreeMap::new();
    let mut entries = reader.scan_prefix(RESULT, ..).await.map_err(failed("reading"))?;
    while let Some(entry) = entries.next().await.map_err(failed("reading"))? {
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
