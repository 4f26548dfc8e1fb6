//! Checks whether a store can hold a job, by trying it before anything is computed.
//!
//! The ledger's database keeps coordinators apart with conditional puts. The write-ahead log and manifests are created by puts
//! that must fail if the object exists. The garbage collector's boundaries are replaced by puts that must fail if the object
//! has changed. On a store that ignores these conditions, two coordinators of one job would each believe to be the only one and
//! overwrite each other's results. Some S3-compatible servers do ignore them, or check them without atomicity.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::join_all;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutResult, UpdateVersion};

use super::{Store, StoreError, describe, retry};

/// A store that can't hold a job.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// It lacks something the ledger relies on.
    #[error(
        "{location} can't hold a job: {finding}. The ledger relies on this to keep two coordinators from overwriting each other's results. Give --out on a store with atomic conditional writes: a local directory, Amazon S3, Google Cloud Storage by gs:// rather than its S3 interface, Azure, or a server that honours If-None-Match and If-Match; and leave AWS_CONDITIONAL_PUT unset"
    )]
    Unfit {
        /// The store.
        location: String,
        /// The flaw that was found.
        finding: String,
    },
    /// It does not work at all.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Directory of the objects that the preflight writes. It is empty afterwards.
pub const DIRECTORY: &str = "preflight";

/// The operation, for messages.
const ACTION: &str = "trying out";
/// How long a store may fail before the job is given up. The job has not begun yet.
const PATIENCE: Duration = Duration::from_secs(15);
/// Number of concurrent puts of one object. A check without atomicity shows only if they overlap.
const RIVALS: usize = 8;
/// How often that is repeated: in the first race, connections are still being opened.
const RACES: usize = 3;
/// Bytes of each put, large enough that the store takes some time between check and completion.
const BURDEN: usize = 32 << 10;
/// Rounds without a verdict after which a store is refused. A lost reply explains one such round, but hardly several.
const ROUNDS: usize = 5;
/// Age in seconds, relative to this preflight's objects, at which another preflight's object is left over from a killed
/// process.
const LEFT_BEHIND: i64 = 600;

/// The result of a round.
enum TrialResult {
    Fit,
    Unfit(String),
    /// A reply seems to have been lost and the request repeated, so the round says nothing about the store.
    Unclear(String),
}

/// Checks that puts on the store are conditional, and that written objects can be read, listed and deleted. It leaves nothing
/// behind and takes about fifteen round trips.
pub async fn check(store: &Store) -> Result<(), PreflightError> {
    let trial = Trial { store, inner: store.inner(), used: Mutex::new(Vec::new()) };
    let verdict = trial.verdict().await;
    let cleared = trial.clear(verdict.is_ok()).await;
    match verdict? {
        TrialResult::Fit => Ok(cleared?),
        TrialResult::Unfit(finding) | TrialResult::Unclear(finding) => {
            Err(PreflightError::Unfit { location: store.location().to_string(), finding })
        }
    }
}

struct Trial<'a> {
    store: &'a Store,
    inner: std::sync::Arc<dyn ObjectStore>,
    used: Mutex<Vec<Path>>,
}

impl Trial<'_> {
    async fn verdict(&self) -> Result<TrialResult, StoreError> {
        let mut last = TrialResult::Unclear(String::new());
        for _ in 0..ROUNDS {
            last = self.round().await.map_err(|source| StoreError::Object {
                action: ACTION,
                path: self.store.location().to_string(),
                source,
            })?;
            if !matches!(last, TrialResult::Unclear(_)) {
                break;
            }
        }
        Ok(last)
    }

    /// Repeats an operation while it fails for a transient reason.
    async fn steady<T, A>(&self, operation: impl FnMut() -> A) -> object_store::Result<T>
    where
        A: Future<Output = object_store::Result<T>>,
    {
        let location = self.store.location().to_string();
        retry::repeat(PATIENCE, ACTION, &location, operation).await
    }

    /// A path that has not been used before.
    fn fresh(&self) -> Path {
        let path = Path::from(format!("{}/{}", DIRECTORY, uuid::Uuid::new_v4()));
        self.used.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        path
    }

    /// One test of everything. It uses new objects, so that it can be repeated if the result is unclear.
    async fn round(&self) -> object_store::Result<TrialResult> {
        let single = self.fresh();
        let made = match self.put(&single, "first", PutMode::Create).await {
            Ok(made) => made,
            Err(Error::AlreadyExists { .. }) => {
                return Ok(TrialResult::Unclear(
                    "a put that must not replace an object failed where there was none".into(),
                ));
            }
            Err(e @ (Error::NotImplemented { .. } | Error::NotSupported { .. })) => {
                return Ok(TrialResult::Unfit(format!("it has no conditional puts ({})", describe(&e))));
            }
            Err(e) => return Err(e),
        };
        match self.put(&single, "second", PutMode::Create).await {
            Ok(_) => {
                return Ok(TrialResult::Unfit(
                    "a put that must not replace an object replaced it (the condition If-None-Match was ignored)"
                        .into(),
                ));
            }
            Err(Error::AlreadyExists { .. }) => {}
            Err(e) => return Err(e),
        }
        if self.get(&single).await? != "first" {
            return Ok(TrialResult::Unfit("a written object reads back with different content".into()));
        }
        // File systems create and rename files atomically, and every put is flushed, which takes time.
        let races = if self.store.location().local().is_some() { 1 } else { RACES };
        for _ in 0..races {
            let race = self.race().await?;
            if !matches!(race, TrialResult::Fit) {
                return Ok(race);
            }
        }
        match self.replace(&single, made).await? {
            TrialResult::Fit => self.list_and_delete(&single).await,
            other => Ok(other),
        }
    }

    /// Several concurrent puts that must not replace an object: exactly one must succeed, and its content must be stored.
    async fn race(&self) -> object_store::Result<TrialResult> {
        let path = self.fresh();
        let contents: Vec<String> = (0..RIVALS).map(|i| format!("{i}").repeat(BURDEN)).collect();
        let results = join_all(contents.iter().map(|content| self.put(&path, content, PutMode::Create))).await;
        let mut winners = Vec::new();
        for (content, result) in contents.iter().zip(results) {
            match result {
                Ok(_) => winners.push(content),
                Err(Error::AlreadyExists { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        let found = self.get(&path).await?;
        Ok(match winners[..] {
            [winner] if found == winner.as_bytes() => TrialResult::Fit,
            [_] => TrialResult::Unfit(
                "of several puts at once that must not replace an object, one that failed was stored".into(),
            ),
            [] => {
                TrialResult::Unclear("of several puts at once that must not replace an object, none succeeded".into())
            }
            _ => TrialResult::Unfit(format!(
                "of {RIVALS} puts at once that must not replace an object, {} succeeded (the condition If-None-Match is not checked atomically)",
                winners.len()
            )),
        })
    }

    /// Replaces an object if it is unchanged. A store that reports that it can't do this is accepted: the ledger can work
    /// without it.
    async fn replace(&self, path: &Path, made: PutResult) -> object_store::Result<TrialResult> {
        let old = UpdateVersion { e_tag: made.e_tag, version: made.version };
        match self.put(path, "replaced", PutMode::Update(old.clone())).await {
            Ok(_) => {}
            Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => return Ok(TrialResult::Fit),
            Err(Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. }) => {
                return Ok(TrialResult::Unclear("a put that may replace an unchanged object failed".into()));
            }
            Err(e) => return Err(e),
        }
        match self.put(path, "replaced again", PutMode::Update(old)).await {
            Ok(_) => Ok(TrialResult::Unfit(
                "a put that must not replace a changed object replaced it (the condition If-Match was ignored)".into(),
            )),
            Err(Error::Precondition { .. } | Error::AlreadyExists { .. }) => Ok(TrialResult::Fit),
            Err(e) => Err(e),
        }
    }

    /// Checks that a written object is listed and a deleted one is gone.
    async fn list_and_delete(&self, path: &Path) -> object_store::Result<TrialResult> {
        let prefix = Path::from(DIRECTORY);
        let listed: Vec<_> = self.steady(|| self.inner.list(Some(&prefix)).try_collect()).await?;
        let Some(own) = listed.iter().find(|meta| meta.location == *path) else {
            return Ok(TrialResult::Unfit("an object that was written is not listed afterwards".into()));
        };
        let left =
            |other: &&object_store::ObjectMeta| (own.last_modified - other.last_modified).num_seconds() > LEFT_BEHIND;
        let old: Vec<Path> = listed.iter().filter(left).map(|meta| meta.location.clone()).collect();
        self.used.lock().unwrap_or_else(PoisonError::into_inner).extend(old);
        match self.steady(|| self.inner.delete(path)).await {
            // It was deleted, but the reply was lost.
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(e) => return Err(e),
        }
        match self.steady(|| self.inner.head(path)).await {
            Ok(_) => Ok(TrialResult::Unfit("an object that was deleted is still there".into())),
            Err(Error::NotFound { .. }) => Ok(TrialResult::Fit),
            Err(e) => Err(e),
        }
    }

    async fn put(&self, path: &Path, content: &str, mode: PutMode) -> object_store::Result<PutResult> {
        let bytes = Bytes::copy_from_slice(content.as_bytes());
        self.steady(|| self.inner.put_opts(path, bytes.clone().into(), mode.clone().into())).await
    }

    async fn get(&self, path: &Path) -> object_store::Result<Bytes> {
        self.steady(|| async { self.inner.get(path).await?.bytes().await }).await
    }

    /// Deletes what the test wrote. If the store did not respond at all, this does not wait for it again.
    async fn clear(&self, patiently: bool) -> Result<(), StoreError> {
        let used = std::mem::take(&mut *self.used.lock().unwrap_or_else(PoisonError::into_inner));
        if patiently {
            join_all(used.iter().map(|path| self.store.delete(path))).await.into_iter().collect::<Result<(), _>>()?;
        } else {
            join_all(used.iter().map(|path| self.inner.delete(path))).await;
        }
        if let Some(directory) = self.store.location().local() {
            // Object stores have no directories, so only a local one is removed. Another preflight may still have files in it.
            let _ = std::fs::remove_dir(directory.join(DIRECTORY));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
