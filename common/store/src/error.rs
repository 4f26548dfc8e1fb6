//! Storage errors, with a remedy and without secrets.

use std::path::PathBuf;

use elbo_core::causes::{causes, find_cause, with_causes};
use elbo_core::text::{printable, shown};

use super::pace::TooSlow;
use super::profile_keys::KeysError;
use super::redact::redact;
use super::transient::{is_transient, status};

/// A location that can't be opened, read or written.
///
/// The message includes the text of the causes, cleaned of credentials. There is no [`source`](std::error::Error::source),
/// which could reveal them.
#[derive(Debug)]
pub enum StoreError {
    /// The location is not a path or a supported kind of URL.
    Location {
        /// The location as given.
        location: String,
        /// The reason.
        reason: String,
    },
    /// A local directory can't be created or opened.
    Directory {
        /// The operation.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The configuration of a store (credentials, endpoint) is invalid.
    Settings {
        /// The store.
        location: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// An object can't be read, written or listed.
    Object {
        /// The operation.
        action: &'static str,
        /// The object.
        path: String,
        /// The reason.
        source: object_store::Error,
    },
}

impl StoreError {
    /// Whether the same operation may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Object { source, .. } => is_transient(source),
            Self::Location { .. } | Self::Directory { .. } | Self::Settings { .. } => false,
        }
    }

    /// Whether a read was given up several times because almost no data arrived. Other workers may have better luck.
    pub fn is_too_slow(&self) -> bool {
        self.too_slow().is_some()
    }

    /// How slow the read was, if slowness is the problem.
    pub fn too_slow(&self) -> Option<TooSlow> {
        match self {
            Self::Object { source, .. } => TooSlow::find(source),
            Self::Location { .. } | Self::Directory { .. } | Self::Settings { .. } => None,
        }
    }
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Location { location, reason } => write!(
                f,
                "'{}' is not a usable location: {}; give a directory or a URL like s3://bucket/prefix",
                printable(&redact(location)),
                printable(&redact(reason))
            ),
            Self::Directory { action, path, source } => {
                write!(f, "{action} the directory {}: {source}", printable(&path.to_string_lossy()))
            }
            Self::Settings { location, reason } => write!(f, "{location} can't be opened: {}", redact(reason)),
            Self::Object { action, path, source } => {
                write!(f, "{action} {}: {}", printable(&redact(path)), describe(source))?;
                match remedy(source) {
                    Some(remedy) => write!(f, "; {remedy}"),
                    None => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for StoreError {}

/// A store's error and its causes on one line, without credentials.
pub fn describe(error: &object_store::Error) -> String {
    let text = redact(&summarize_page(&summarize_xml(&with_causes(error))));
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // A server's response may be long and contain anything.
    match text.split_once(STATUS) {
        Some((before, told)) => format!("{}{STATUS}{}", printable(before), shown(told)),
        None => printable(&text),
    }
}

/// The text that clients write before a status and its body.
const STATUS: &str = "non-2xx status code: ";

/// Replaces a web page with its title.
fn summarize_page(text: &str) -> String {
    // `lower` has the same length in bytes.
    let lower = text.to_ascii_lowercase();
    let Some(start) = lower.find("<!doctype html").or_else(|| lower.find("<html")) else { return text.to_owned() };
    let title = lower[start..].find("<title>").map(|at| &text[start + at + "<title>".len()..]);
    let title = title.and_then(|rest| rest.split('<').next()).map(str::trim).filter(|title| !title.is_empty());
    format!("{}a web page{}", &text[..start], title.map_or_else(String::new, |title| format!(" '{title}'")))
}

/// Replaces an error document with its code and message. The rest is request ids and the signed text.
fn summarize_xml(text: &str) -> String {
    let Some(start) = text.find("<?xml").or_else(|| text.find("<Error")) else { return text.to_owned() };
    let element = |name: &str| {
        let (_, after) = text[start..].split_once(&format!("<{name}>"))?;
        Some(after.split_once(&format!("</{name}>"))?.0)
    };
    let (code, message) = (element("Code"), element("Message"));
    // Azure appends the request id and time to the message, on separate lines.
    let message = message.and_then(|m| m.lines().next());
    let summary: Vec<&str> = [code, message].into_iter().flatten().collect();
    format!("{}{}", &text[..start], summary.join(": "))
}

/// Whether the error means that the bucket or container does not exist, rather than an object in it.
pub(super) fn is_bucket_missing(error: &object_store::Error) -> bool {
    let text = error.to_string();
    ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"].iter().any(|sign| text.contains(sign))
}

/// Error codes for expired credentials.
const EXPIRED: [&str; 5] =
    ["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "ExpiredAuthenticationToken"];
/// Error codes for invalid credentials.
const INVALID: [&str; 15] = [
    "InvalidToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
    // Codes about the account, whichever object is requested.
    "AccountProblem",
    "AccountIsDisabled",
    "AllAccessDisabled",
    "NotSignedUp",
    "InvalidSecurity",
    "AuthenticationRequired",
    "KeyBasedAuthenticationNotPermitted",
];
/// Error codes for a wrong clock.
const SKEWED: [&str; 2] = ["RequestTimeTooSkewed", "RequestInTheFuture"];

/// The remedy if the store refuses the client (its credentials or clock) rather than the object. Being denied one object does
/// not count, nor does a web server that asks for a password.
pub fn refusal(error: &object_store::Error) -> Option<&'static str> {
    use object_store::Error;
    if !matches!(error, Error::Generic { .. } | Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) {
        return None;
    }
    let said: String = causes(error).map(ToString::to_string).collect();
    let has = |codes: &[&str]| codes.iter().any(|code| said.contains(&format!("<Code>{code}</Code>")));
    if has(&EXPIRED) {
        Some("the credentials have expired: renew them")
    } else if has(&SKEWED) {
        Some("this machine's clock is wrong: set it, for example by NTP")
    } else if has(&INVALID) {
        Some("the store refuses these credentials: check the key, the secret and the token")
    } else if status(&said) == Some(407) {
        Some("the proxy refuses this machine: give user and password in HTTPS_PROXY or HTTP_PROXY")
    } else if ["performing token request", "performing CreateSession request"].iter().any(|sign| said.contains(sign))
        && !is_transient(error)
    {
        Some("the credentials get no access token: renew or correct them")
    } else {
        None
    }
}

/// The remedy for an error, if one is known.
fn remedy(error: &object_store::Error) -> Option<&'static str> {
    use object_store::Error;
    if find_cause::<KeysError>(error).is_some() {
        // It has its own.
        return None;
    }
    let text = describe(error);
    let says = |sign: &str| text.contains(sign);
    if is_bucket_missing(error) {
        return Some("there is no such bucket or container: make it, or correct the URL, the endpoint or the account");
    }
    if ["/latest/api/token", "/latest/meta-data", "169.254.169.254", "metadata.google.internal"]
        .iter()
        .any(|sign| says(sign))
    {
        return Some(
            "no credentials were found, and this machine has no role of its own: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY), or AWS_SKIP_SIGNATURE=true for a public bucket",
        );
    }
    if says("redirect without LOCATION") || says("AuthorizationHeaderMalformed") || says("PermanentRedirect") {
        return Some("the bucket is in another region: set AWS_REGION to its region");
    }
    if says("non-2xx status code: 30") {
        return Some(
            "the server redirects this request, and the redirect was not followed: it leads from outside into this machine or its network, or there were too many in a row; give the final URL",
        );
    }
    if let Some(remedy) = refusal(error) {
        return Some(remedy);
    }
    match error {
        Error::NotSupported { .. } if says("Range request not supported") => Some(
            "the server sends whole files, but tar shards and Parquet files are read in parts: put them on a server or store that supports byte ranges, or give the images as files of their own",
        ),
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Some(
            "the store refuses these credentials: check the key, its expiry, and that it may read, write, list and delete there",
        ),
        _ if TooSlow::find(error).is_some() => Some(
            "the storage answers too slowly: check it and the network, then run the same command again (--retry-quarantined \
             gives images that were quarantined for it another try)",
        ),
        _ if is_transient(error) && says("certificate") => Some(
            "the server can't be trusted: its certificate may have expired or come from an authority that this machine does not know, or this machine's clock may be wrong",
        ),
        _ if is_transient(error) => Some(
            "the store could not be reached or kept failing: check the endpoint and the network, then run the same command again, which resumes a job",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: text.to_owned().into() }
    }

    fn shown(source: object_store::Error) -> String {
        StoreError::Object { action: "reading", path: "s3://bucket/a".into(), source }.to_string()
    }

    #[test]
    fn an_error_document_is_reduced_to_code_and_message() {
        let text = shown(generic(
            "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>No match.\nRequestId:1</Message><StringToSign>hush</StringToSign></Error>",
        ));
        assert!(text.contains("403 Forbidden: SignatureDoesNotMatch: No match."), "{text}");
        assert!(!text.contains("hush") && !text.contains("RequestId"), "{text}");
    }

    #[test]
    fn server_responses_are_cut_and_never_shown_raw() {
        let body =
            |body: &str| shown(generic(&format!("Server returned non-2xx status code: 502 Bad Gateway: {body}")));
        let page = body(
            "<!DOCTYPE html>\n<html><head><TITLE>Bad \u{1b}[31mgateway</TITLE></head><body>Ä long story</body></html>",
        );
        assert!(
            page.contains("502 Bad Gateway: a web page 'Bad \\u{1b}[31mgateway'; ") && !page.contains("story"),
            "{page}"
        );
        let long = body(&"\u{9b}x".repeat(10_000));
        assert!(long.len() < 2_000 && long.contains("…; ") && !long.contains('\u{9b}'), "{}", long.len());
        let path = "/data/\u{1b}[2J.png".to_owned();
        let named = StoreError::Object { action: "reading", path, source: generic("no") }.to_string();
        assert!(named.contains("/data/\u{fffd}[2J.png: "), "{named}");
        // The remedy is found from the whole text.
        let far = format!("{}<Error><Code>ExpiredToken</Code></Error>", "x".repeat(1_000));
        assert!(body(&far).contains("have expired"));
    }

    #[test]
    fn the_causes_reveal_no_more_than_the_message() {
        let error = StoreError::Object {
            action: "reading",
            path: "https://me:hush@host/a?sig=hush".into(),
            source: generic("error sending request for url (https://me:hush@host/a?sig=hush)"),
        };
        assert!(!error.to_string().contains("hush"), "{error}");
        assert!(std::error::Error::source(&error).is_none());
    }

    #[test]
    fn known_mistakes_come_with_a_remedy() {
        assert!(shown(generic("<Error><Code>NoSuchBucket</Code></Error>")).contains("make it"));
        assert!(shown(generic("Received redirect without LOCATION, this")).contains("AWS_REGION"));
        assert!(shown(generic("GET http://169.254.169.254/latest/api/token")).contains("AWS_PROFILE"));
        let denied = object_store::Error::PermissionDenied { path: "a".into(), source: "403".into() };
        assert!(shown(denied).contains("check the key"));
    }

    #[test]
    fn errors_about_credentials_and_clocks_are_distinguished_from_errors_about_objects() {
        let said = |code: &str| {
            format!("Server returned non-2xx status code: 400 Bad Request: <Error><Code>{code}</Code></Error>")
        };
        let denied = |code: &str| object_store::Error::PermissionDenied { path: "a".into(), source: said(code).into() };
        assert!(shown(generic(&said("ExpiredToken"))).contains("have expired: renew them"));
        assert!(refusal(&denied("RequestTimeTooSkewed")).unwrap().contains("clock"));
        assert!(refusal(&denied("InvalidAccessKeyId")).unwrap().contains("check the key"));
        // A web server may require a password for only some of its files.
        let nobody = object_store::Error::Unauthenticated { path: "a".into(), source: "401".into() };
        assert_eq!(refusal(&nobody), None);
        assert!(shown(nobody).contains("check the key"));
        let proxy = "Server returned non-2xx status code: 407 Proxy Authentication Required: ";
        assert!(refusal(&generic(proxy)).unwrap().contains("HTTPS_PROXY"));
        let token = "Error performing token request: Server returned non-2xx status code: 400 Bad Request: {\"error\": \"invalid_grant\"}";
        assert!(refusal(&generic(token)).unwrap().contains("no access token"));
        assert_eq!(refusal(&generic(&token.replace("400 Bad Request", "503 Service Unavailable"))), None);
        assert_eq!(refusal(&denied("AccessDenied")), None);
        assert_eq!(refusal(&generic(&said("InvalidRange"))), None);
        // An object name may contain any text.
        let missing = object_store::Error::NotFound { path: "<Code>ExpiredToken</Code>".into(), source: "404".into() };
        assert_eq!(refusal(&missing), None);
    }
}
