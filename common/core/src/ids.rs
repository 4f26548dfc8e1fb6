//! Identifiers as types, so that a class index can't be used as a prompt index.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// The index of a class as the user numbers it (`classidx`); class-conditional models take it as their label.
    ClassIndex(i32)
);
id!(
    /// The position of a prompt in the job's prompt list.
    PromptIndex(u32)
);
id!(
    /// The position of a sample in the manifest.
    SampleId(u64)
);
id!(
    /// The position of a shard: samples `shard * shard_size ..`.
    ShardId(u32)
);
id!(
    /// The position of a round in the policy's list of rounds.
    Round(u16)
);
id!(
    /// The incarnation of a coordinator: grows by one each time a coordinator takes over the ledger.
    Epoch(u64)
);
id!(
    /// A lease, unique within an epoch.
    LeaseId(u64)
);

/// A lease, unique among all coordinators of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// The coordinator that granted it.
    pub epoch: Epoch,
    /// Its number within that epoch.
    pub lease: LeaseId,
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.lease)
    }
}

impl PromptIndex {
    /// The index as a position in a slice.
    pub fn at(self) -> usize {
        self.0 as usize
    }
}

impl Round {
    /// The round as a position in a slice.
    pub fn at(self) -> usize {
        usize::from(self.0)
    }
}

impl SampleId {
    /// The shard that holds this sample when shards hold `shard_size` samples.
    pub fn shard(self, shard_size: u32) -> ShardId {
        ShardId((self.0 / u64::from(shard_size.max(1))) as u32)
    }
}

impl ShardId {
    /// The id of the shard's first sample.
    pub fn first_sample(self, shard_size: u32) -> SampleId {
        SampleId(u64::from(self.0) * u64::from(shard_size))
    }
}
