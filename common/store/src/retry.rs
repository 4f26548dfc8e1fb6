//! Waiting for failures of storage to pass.
//!
//! The clients of [`object_store`] already repeat a request a few times within seconds, and go on with a body that broke
//! off where the object has an etag. What is here outlasts a store that is slow, overloaded or away for longer, for all
//! that may be repeated: reads, lists, deletes, and puts of a content that is a pure function of its path.

use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};

use super::transient::is_transient;
use super::{StoreError, error};

/// How long an operation is repeated before it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs an operation that may be repeated until it succeeds, fails for good, or [`PATIENCE`] is used up.
///
/// `action` and `path` say what is done, as in `reading s3://bucket/image.png`. An operation that reads a body must read it
/// to its end, so that one that breaks off is read again.
///
/// ```
/// # use object_store::{ObjectStoreExt, memory::InMemory, path::Path};
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// let store = InMemory::new();
/// store.put(&Path::from("a.png"), "bytes".into()).await?;
/// let bytes = elbo_store::retry::run("reading", "a.png", || async {
///     store.get(&Path::from("a.png")).await?.bytes().await
/// })
/// .await;
/// assert_eq!(bytes.unwrap(), "bytes");
/// # Ok::<_, object_store::Error>(()) }).unwrap();
/// ```
pub async fn run<T, F, A>(action: &'static str, path: &str, attempt: F) -> Result<T, StoreError>
where
    F: FnMut() -> A,
    A: Future<Output = object_store::Result<T>>,
{
    let outcome = repeat(PATIENCE, action, path, attempt).await;
    outcome.map_err(|source| StoreError::Object { action, path: path.to_owned(), source })
}

/// [`run`] with another patience and the bare error.
pub(super) async fn repeat<T, F, A>(
    patience: Duration,
    action: &'static str,
    path: &str,
    attempt: F,
) -> object_store::Result<T>
where
    F: FnMut() -> A,
    A: Future<Output = object_store::Result<T>>,
{
    let (started, mut warned) = (Instant::now(), None::<Instant>);
    let backoff = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times();
    attempt
        .retry(backoff)
        .when(|error| is_transient(error) && started.elapsed() < patience)
        .notify(|error, _| {
            // A store that is away fails many operations: one line every few seconds tells enough.
            if warned.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
                warned = Some(Instant::now());
                let left = patience.saturating_sub(started.elapsed()).as_secs().max(1);
                tracing::warn!(
                    "{action} {} failed: {}; trying again for up to {left} s",
                    super::redact(path),
                    error::describe(error)
                );
            }
        })
        .await
}

#[cfg(test)]
mod tests {
    use object_store::Error;

    use super::*;

    fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Generic { store: "S3", source: source.into() }
    }

    #[tokio::test]
    async fn failures_that_pass_are_outlasted_and_others_are_told_at_once() {
        let mut left = 3;
        let found = run("reading", "a", || {
            left -= 1;
            let answer = if left == 0 { Ok(7) } else { Err(generic("connection reset")) };
            async { answer }
        });
        assert_eq!(found.await.unwrap(), 7);

        let mut tried = 0;
        let refused = run::<(), _, _>("reading", "a", || {
            tried += 1;
            async { Err(Error::PermissionDenied { path: "a".into(), source: "403".into() }) }
        });
        assert!(refused.await.is_err());
        assert_eq!(tried, 1);
    }

    #[tokio::test]
    async fn patience_ends_with_an_error_that_names_the_operation() {
        let failing = || async { Err::<(), _>(generic("connection refused")) };
        let source = repeat(Duration::from_millis(250), "writing", "s3://bucket/a", failing).await.unwrap_err();
        let error = StoreError::Object { action: "writing", path: "s3://bucket/a".into(), source }.to_string();
        assert!(error.starts_with("writing s3://bucket/a: ") && error.contains("connection refused"), "{error}");
        assert!(error.contains("run the same command again"), "{error}");
    }
}
