//! The ledger's entries: their keys, and how to read them.

use elbo_core::failure::SampleFailure;
use elbo_core::ids::{Epoch, ShardId};
use elbo_proto::v1;
use prost::Message;
use slatedb::{CloseReason, DbReadOps, ErrorKind, KeyValue};

use super::LedgerError;
use crate::scheduler::{Record, UnitResult};

pub(super) const EPOCH: &str = "epoch";
pub(super) const FINGERPRINT: &str = "fingerprint";
pub(super) const WASTE: &str = "waste";
pub(super) const DONE: &str = "done/";
pub(super) const RESULT: &str = "result/";
pub(super) const RETRY: &str = "retry/";
pub(super) const HARDWARE: &str = "hardware/";
pub(super) const DISCARDED: &str = "discarded/";

pub(super) fn result_prefix(shard: ShardId) -> String {
    format!("{RESULT}{:08x}/", shard.0)
}

pub(super) fn result_key(shard: ShardId, epoch: Epoch, sequence: u64) -> String {
    format!("{}{:016x}/{sequence:016x}", result_prefix(shard), epoch.0)
}

pub(super) fn retry_key(shard: ShardId) -> String {
    format!("{RETRY}{:08x}", shard.0)
}

pub(super) fn done_key(shard: ShardId) -> String {
    format!("{DONE}{:08x}", shard.0)
}

/// Reads and parses the entries whose keys begin with a prefix, from a database in a directory.
pub(super) async fn entries<T, C: Default + Extend<T>>(
    db: &(impl DbReadOps + Sync),
    directory: &str,
    prefix: &str,
    mut parse: impl FnMut(KeyValue) -> Result<T, LedgerError>,
) -> Result<C, LedgerError> {
    let failed = |source| failure("reading", directory, source);
    let (mut found, mut all) = (db.scan_prefix(prefix, ..).await.map_err(failed)?, C::default());
    while let Some(entry) = found.next().await.map_err(failed)? {
        all.extend([parse(entry)?]);
    }
    Ok(all)
}

/// The shard that follows a prefix in an entry's key.
pub(super) fn shard_of(entry: &KeyValue, prefix: &str) -> Result<ShardId, LedgerError> {
    let digits = std::str::from_utf8(&entry.key).ok().and_then(|key| key.strip_prefix(prefix)?.get(..8));
    let shard = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    shard.map(ShardId).ok_or_else(|| broken(&entry.key, "it names no shard"))
}

/// A shard whose quarantined samples are retried, with the epoch of the retry.
pub(super) fn retry_entry(entry: KeyValue) -> Result<(ShardId, Epoch), LedgerError> {
    Ok((shard_of(&entry, RETRY)?, Epoch(parse_u64(&entry.key, &entry.value)?)))
}

pub(super) fn parse_u64(key: &[u8], value: &[u8]) -> Result<u64, LedgerError> {
    Ok(u64::from_le_bytes(value.try_into().map_err(|_| broken(key, "it is not eight bytes"))?))
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StoredRecord {
    #[prost(message, repeated, tag = "1")]
    pub(super) results: Vec<v1::UnitResult>,
    #[prost(message, repeated, tag = "2")]
    pub(super) failures: Vec<v1::SampleFailure>,
}

/// A record of a shard, with the epoch and sequence of its append.
pub(super) struct RecordEntry {
    pub(super) epoch: Epoch,
    pub(super) sequence: u64,
    record: Record,
}

impl RecordEntry {
    pub(super) fn read(entry: &KeyValue) -> Result<Self, LedgerError> {
        let place = || {
            let mut parts = std::str::from_utf8(&entry.key).ok()?.rsplit('/');
            let (sequence, epoch) = (parts.next()?, parts.next()?);
            Some((Epoch(u64::from_str_radix(epoch, 16).ok()?), u64::from_str_radix(sequence, 16).ok()?))
        };
        let (epoch, sequence) = place().ok_or_else(|| broken(&entry.key, "its key is not a record's"))?;
        let stored = StoredRecord::decode(entry.value.as_ref()).map_err(|e| broken(&entry.key, e))?;
        let results = stored.results.into_iter().map(UnitResult::try_from).collect::<Result<_, _>>();
        let failures = stored.failures.into_iter().map(SampleFailure::try_from).collect::<Result<_, _>>();
        let record = Record {
            results: results.map_err(|_| broken(&entry.key, "a result names no unit"))?,
            failures: failures.map_err(|error| broken(&entry.key, error))?,
        };
        Ok(Self { epoch, sequence, record })
    }

    /// The record, without failures from before the epoch in which its shard was `retried`.
    pub(super) fn since(self, retried: Option<Epoch>) -> Record {
        let is_void = retried.is_some_and(|retried| self.epoch < retried);
        let failures = if is_void { Vec::new() } else { self.record.failures };
        Record { failures, ..self.record }
    }
}

/// The ledger error for a database error.
pub(super) fn failure(action: &'static str, directory: &str, source: slatedb::Error) -> LedgerError {
    match source.kind() {
        ErrorKind::Closed(CloseReason::Fenced) => LedgerError::Fenced,
        // The database reports an invalid manifest as an internal error.
        ErrorKind::Data | ErrorKind::Internal if action != "writing" => {
            LedgerError::Damaged { directory: directory.to_owned(), source: Box::new(source) }
        }
        _ => LedgerError::Database { action, source },
    }
}

pub(super) fn broken(key: &[u8], reason: impl ToString) -> LedgerError {
    LedgerError::Entry { key: String::from_utf8_lossy(key).into_owned(), reason: reason.to_string() }
}
