//! Which failures of storage pass by themselves, and waiting for them to pass.
//!
//! The clients of [`object_store`] already repeat a request a few times within seconds, and go on with a body that broke
//! off where the object has an etag. What is here outlasts a store that is slow, overloaded or away for longer, for all
//! that may be repeated: reads, lists, deletes, and puts of a content that is a pure function of its path.

use std::error::Error as _;
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use object_store::Error;
use object_store::client::HttpError;

use super::pace::TooSlow;
use super::{StoreError, error};

/// How long an operation is repeated before it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the same operation may succeed later: the store was overloaded, unreachable, or the answer broke off.
///
/// What the store says about the object, the request or the credentials stays as it is.
pub fn is_transient(error: &Error) -> bool {
    match error {
        Error::Generic { store, source } => is_passing(store, source.as_ref()),
        _ => false,
    }
}

fn is_passing(store: &str, error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(inner) = error.downcast_ref::<Error>() {
            return is_transient(inner);
        }
        if error.is::<TooSlow>() {
            return true;
        }
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return !is_unusable(http);
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind;
            let passing = matches!(io.kind(), ErrorKind::Interrupted | ErrorKind::TimedOut | ErrorKind::WouldBlock);
            return passing || store != "LocalFileSystem";
        }
        cause = error.source();
    }
    // The clients keep the type that knows the status to themselves; its text is all there is.
    let text = error.to_string();
    match status(&text) {
        Some(status) => status >= 500 || status == 408 || status == 429,
        None => store != "LocalFileSystem" && !LASTING.iter().any(|sign| text.contains(sign)),
    }
}

/// Whether a request can't even be made, as to a URL that is none, or its answer is refused: nothing mends that.
fn is_unusable(error: &HttpError) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if text.contains("builder error") || text.contains("the server tells no size") {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// What is said without a status and no repetition changes: no kind of URL we know, another region, ranges that the object has
/// not.
const LASTING: [&str; 4] =
    ["Unable to recognise URL", "redirect without LOCATION", "Wanted range starting at", "Range started at"];

/// The HTTP status in the text of an error of [`object_store`]'s clients.
pub(super) fn status(text: &str) -> Option<u16> {
    let (_, after) = text.split_once("non-2xx status code: ")?;
    after.get(..3)?.parse().ok()
}

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
/// let bytes = elbo_common::store::retry::run("reading", "a.png", || async {
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
    use super::*;

    fn generic(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Generic { store: "S3", source: source.into() }
    }

    #[test]
    fn overload_and_broken_connections_pass_and_refusals_do_not() {
        let status = |code: &str| generic(format!("Server returned non-2xx status code: {code}: body"));
        for passing in ["500 Internal Server Error", "503 Slow Down", "429 Too Many Requests", "408 Request Timeout"] {
            assert!(is_transient(&status(passing)), "{passing}");
        }
        assert!(!is_transient(&status("400 Bad Request")));
        assert!(is_transient(&generic(std::io::Error::from(std::io::ErrorKind::ConnectionReset))));
        assert!(is_transient(&generic(generic("connection reset"))));
        assert!(!is_transient(&generic(Error::NotImplemented { operation: "x".into(), implementer: "y".into() })));
        assert!(!is_transient(&generic("Received redirect without LOCATION, this normally indicates a region")));
        let source = || "x".to_owned().into();
        for permanent in [
            Error::NotFound { path: "a".into(), source: source() },
            Error::AlreadyExists { path: "a".into(), source: source() },
            Error::Precondition { path: "a".into(), source: source() },
            Error::NotModified { path: "a".into(), source: source() },
            Error::PermissionDenied { path: "a".into(), source: source() },
            Error::Unauthenticated { path: "a".into(), source: source() },
            Error::NotSupported { source: source() },
        ] {
            assert!(!is_transient(&permanent), "{permanent}");
        }
    }

    #[test]
    fn a_full_local_disk_stays_full() {
        let local = |kind| Error::Generic { store: "LocalFileSystem", source: std::io::Error::from(kind).into() };
        assert!(!is_transient(&local(std::io::ErrorKind::StorageFull)));
        assert!(is_transient(&local(std::io::ErrorKind::TimedOut)));
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
