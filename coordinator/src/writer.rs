//! Writes an output so that only its current coordinator has an effect, however late a write arrives.
//!
//! A put can be delayed and arrive after another coordinator has taken over, finished the job or discarded it. So every put
//! is conditional on the version of the file that it replaces. The coordinator looks at that version *before* it makes
//! sure, by a durable write to the ledger, that no other has taken over:
//!
//! 1. look at the file: version v;
//! 2. write to the ledger, which fails if another coordinator has opened it;
//! 3. put, if the file is still v.
//!
//! Another coordinator writes only after it has opened the ledger, so after step 2. Its write changes the version v, so the
//! put in step 3 fails whenever it arrives later. If the put arrives first, the other coordinator's own put fails, and is
//! repeated.

use bytes::Bytes;
use elbo_store::{ObjectVersion, Store, StoreError};
use futures::future::try_join_all;
use object_store::path::Path;

use crate::ledger::{Ledger, LedgerError};

/// How often a put is repeated. Late puts of earlier coordinators are few; later coordinators are noticed in the ledger.
pub(crate) const ATTEMPTS: usize = 20;

/// A file that can't be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger failed, or another coordinator has taken it over.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Another process keeps writing the same file.
    #[error(
        "another process keeps changing {0}: let only one coordinator write to the output, then run the \
         same command again to resume"
    )]
    Contended(String),
}

/// Writes to an output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writer<'a> {
    /// The output.
    pub(crate) out: &'a Store,
    /// Its ledger, which this coordinator holds.
    pub(crate) ledger: &'a Ledger,
}

impl Writer<'_> {
    /// Writes files one after another.
    pub(crate) async fn write(&self, files: Vec<(Path, Bytes)>) -> Result<(), WriteError> {
        let seen = self.look(files.iter().map(|(path, _)| path)).await?;
        self.ledger.hold().await?;
        for ((path, bytes), seen) in files.into_iter().zip(seen) {
            self.replace(&path, bytes, seen).await?;
        }
        Ok(())
    }

    /// The versions of files before the ledger is written to.
    async fn look(&self, paths: impl Iterator<Item = &Path>) -> Result<Vec<ObjectVersion>, WriteError> {
        Ok(try_join_all(paths.map(|path| self.out.look(path))).await?)
    }

    /// Writes a file that was looked at before the ledger was written to.
    async fn replace(&self, path: &Path, bytes: Bytes, mut seen: ObjectVersion) -> Result<(), WriteError> {
        for _ in 0..ATTEMPTS {
            if self.out.replace(path, bytes.clone(), &seen).await? {
                return Ok(());
            }
            tracing::debug!(%path, "changed meanwhile");
            seen = self.out.look(path).await?;
            self.ledger.hold().await?;
        }
        Err(WriteError::Contended(self.out.location().below(path.as_ref())))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use elbo_store::Location;
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn a_late_put_of_a_replaced_coordinator_changes_nothing() {
        let directory = tempfile::TempDir::new().unwrap();
        let memory = Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap());
        for out in [memory, Store::create(&Location::Local(directory.path().to_owned())).unwrap()] {
            let (first, path) = (Ledger::open(&out).await.unwrap(), Path::from("predictions/shard-00000.parquet"));
            let late = out.look(&path).await.unwrap();
            first.hold().await.unwrap();
            let ledger = Ledger::open(&out).await.unwrap();
            let second = Writer { out: &out, ledger: &ledger };
            second.write(vec![(path.clone(), "second".into())]).await.unwrap();
            assert!(!out.replace(&path, "first".into(), &late).await.unwrap());
            assert_eq!(out.read(&path).await.unwrap().unwrap(), "second");

            // The same if there was a file before.
            let late = out.look(&path).await.unwrap();
            second.write(vec![(path.clone(), "again".into())]).await.unwrap();
            assert!(!out.replace(&path, "first".into(), &late).await.unwrap());
            let refused = Writer { out: &out, ledger: &first }.write(vec![(path.clone(), "first".into())]).await;
            assert!(matches!(refused, Err(WriteError::Ledger(LedgerError::Fenced))), "{refused:?}");
            assert_eq!(out.read(&path).await.unwrap().unwrap(), "again");

            // A late put that arrives first is overwritten.
            let late = out.look(&path).await.unwrap();
            let seen = late.clone();
            assert!(out.replace(&path, "first".into(), &late).await.unwrap());
            second.replace(&path, "last".into(), seen).await.unwrap();
            assert_eq!(out.read(&path).await.unwrap().unwrap(), "last");
        }
    }

    #[tokio::test]
    async fn a_put_that_was_made_but_not_answered_counts() {
        let out = Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap());
        let path = Path::from("job.json");
        let seen = out.look(&path).await.unwrap();
        out.write(&path, "same".into()).await.unwrap();
        assert!(out.replace(&path, "same".into(), &seen).await.unwrap());
    }
}
