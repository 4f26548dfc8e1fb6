//! Which storage failures are transient.

use elbo_core::causes::causes;
use object_store::Error;
use object_store::client::HttpError;

use super::pace::TooSlow;
use super::profile_keys::KeysError;

/// Whether the same operation may succeed later: the store was overloaded or unreachable, or the response broke off.
///
/// Errors about the object, the request or the credentials are permanent.
pub(crate) fn is_transient(error: &Error) -> bool {
    match error {
        Error::Generic { store, source } => is_passing(store, source.as_ref()),
        _ => false,
    }
}

fn is_passing(store: &str, error: &(dyn std::error::Error + 'static)) -> bool {
    for error in causes(error) {
        if let Some(inner) = error.downcast_ref::<Error>() {
            return is_transient(inner);
        }
        if error.is::<TooSlow>() {
            return true;
        }
        if let Some(keys) = error.downcast_ref::<KeysError>() {
            return keys.is_transient();
        }
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return !is_unusable(http);
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind;
            let passing = matches!(io.kind(), ErrorKind::Interrupted | ErrorKind::TimedOut | ErrorKind::WouldBlock);
            return passing || store != "LocalFileSystem";
        }
    }
    // The clients don't expose the error type that holds the status, so it is parsed from the text.
    let text = error.to_string();
    match status(&text) {
        Some(status) => status >= 500 || status == 408 || status == 429,
        None => store != "LocalFileSystem" && !LASTING.iter().any(|sign| text.contains(sign)),
    }
}

/// Whether a request can't be made at all, as with an invalid URL, or its response is refused. Repeating it does not help.
fn is_unusable(error: &HttpError) -> bool {
    let signs = ["builder error", "the server tells no size"];
    let said: Vec<_> = causes(error).skip(1).map(ToString::to_string).collect();
    said.iter().any(|text| signs.iter().any(|sign| text.contains(sign)))
}

/// Permanent errors without a status: an unsupported kind of URL, the wrong region, or a range that the object does not have.
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
    fn overload_and_broken_connections_are_transient_and_refusals_are_not() {
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
