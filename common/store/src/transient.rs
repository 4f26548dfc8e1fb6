//! Which failures of storage pass by themselves.

use std::error::Error as _;

use object_store::Error;
use object_store::client::HttpError;

use super::pace::TooSlow;

/// Whether the same operation may succeed later: the store was overloaded, unreachable, or the answer broke off.
///
/// What the store says about the object, the request or the credentials stays as it is.
pub(crate) fn is_transient(error: &Error) -> bool {
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
}
