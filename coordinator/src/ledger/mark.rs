//! The ledger's entry for a committed shard.

use elbo_core::ids::ShardId;
use elbo_store::checksum::Checksum;
use object_store::path::Path;
use prost::Message;
use slatedb::KeyValue;

use super::LedgerError;
use super::entries::{DONE, broken, shard_of};
use crate::scheduler::ShardTotals;

#[derive(Clone, PartialEq, Message)]
struct StoredTotals {
    #[prost(uint64, tag = "1")]
    samples: u64,
    #[prost(uint64, tag = "2")]
    quarantined: u64,
    #[prost(uint64, tag = "3")]
    evaluations: u64,
    #[prost(uint64, tag = "5")]
    spared: u64,
    #[prost(message, repeated, tag = "6")]
    files: Vec<StoredChecksum>,
}

#[derive(Clone, PartialEq, Message)]
struct StoredChecksum {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(bytes = "vec", tag = "3")]
    hash: Vec<u8>,
}

/// The ledger's note that a shard is committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The shard's totals.
    pub totals: ShardTotals,
    /// The checksums of its files: two for a file that is being rewritten. Empty if an older version committed the shard.
    pub files: Vec<Checksum>,
}

impl Mark {
    pub(super) fn encode(self) -> Vec<u8> {
        let Self { totals: ShardTotals { samples, quarantined, evaluations, spared }, files } = self;
        let files = files.into_iter().map(|Checksum { path, size, hash }| StoredChecksum {
            path: path.into(),
            size,
            hash: hash.to_vec(),
        });
        StoredTotals { samples, quarantined, evaluations, spared, files: files.collect() }.encode_to_vec()
    }

    pub(super) fn decode(key: &[u8], value: &[u8]) -> Result<Self, LedgerError> {
        let stored = StoredTotals::decode(value).map_err(|e| broken(key, e))?;
        let StoredTotals { samples, quarantined, evaluations, spared, files } = stored;
        let checksum = |StoredChecksum { path, size, hash }| {
            let hash = <[u8; 32]>::try_from(hash).map_err(|_| broken(key, "a hash is not 32 bytes long"))?;
            Ok(Checksum { path: Path::from(path), size, hash })
        };
        let files = files.into_iter().map(checksum).collect::<Result<_, LedgerError>>()?;
        Ok(Self { totals: ShardTotals { samples, quarantined, evaluations, spared }, files })
    }
}

/// Parses the entry of a committed shard.
pub(super) fn done_entry(entry: KeyValue) -> Result<(ShardId, Mark), LedgerError> {
    Ok((shard_of(&entry, DONE)?, Mark::decode(&entry.key, &entry.value)?))
}
