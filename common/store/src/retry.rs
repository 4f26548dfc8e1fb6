//! Waits for transient storage failures to pass.
//!
//! The clients of [`object_store`] already retry a request a few times within seconds, and resume a body that broke off if the
//! object has an etag. This module handles stores that are slow, overloaded or unreachable for longer. It applies to everything
//! that may be repeated: reads, lists, deletes, and puts whose content is a pure function of the path.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder, Retryable};

use super::transient::is_transient;
use super::{StoreError, error};

/// How long an operation is repeated before it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pauses between attempts, which double from `first` to at most five seconds. Up to half of a pause is left out at random, so
/// that clients that fail together don't retry together.
pub fn pauses(first: Duration) -> ExponentialBackoff {
    backoff(first).build()
}

fn backoff(first: Duration) -> ExponentialBuilder {
    // The jitter at most doubles a pause.
    ExponentialBuilder::default()
        .with_min_delay(first / 2)
        .with_max_delay(Duration::from_millis(2500))
        .with_jitter()
        .without_max_times()
}

/// Repeats an operation until it succeeds, fails permanently, or [`PATIENCE`] is used up.
///
/// `action` and `path` describe the operation, as in `reading s3://bucket/image.png`. An operation that reads a body must read
/// all of it, so that a body that breaks off is read again.
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

/// [`run`] with a custom patience, returning the bare error.
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
    attempt
        .retry(backoff(Duration::from_millis(200)))
        .when(|error| is_transient(error) && started.elapsed() < patience)
        .notify(|error, _| {
            // An unreachable store fails many operations; one line every few seconds is enough.
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

    #[test]
    fn pauses_double_up_to_five_seconds() {
        let (first, seconds) = (Duration::from_millis(100), |n: u32| Duration::from_millis(100) * 2u32.pow(n));
        for _ in 0..100 {
            let pauses: Vec<_> = pauses(first).take(10).collect();
            for (n, pause) in (0..).zip(&pauses) {
                let most = seconds(n).min(Duration::from_secs(5));
                assert!((most / 2..=most).contains(pause), "{n}: {pause:?}");
            }
        }
    }

    fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Generic { store: "S3", source: source.into() }
    }

    #[tokio::test]
    async fn transient_failures_are_retried_and_others_are_reported_at_once() {
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
