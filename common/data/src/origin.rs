//! The origins that a list of images from the network may name.

use std::str::FromStr;

use url::{Host, Url};

use elbo_store::Location;

/// An origin that such a list may name besides its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Anywhere except local files.
    Any,
    /// Local files.
    Files,
    /// A web server by scheme, host and port, or a bucket.
    Of(String),
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "*" => Ok(Self::Any),
            "file://" | "file:///" => Ok(Self::Files),
            text => {
                let url = Url::parse(text).ok().filter(|url| url.scheme().len() > 1 && url.has_host());
                url.map(|url| Self::Of(of(&url))).ok_or_else(|| {
                    format!("'{text}' is not an origin: give https://host[:port], s3://bucket, file:// or *")
                })
            }
        }
    }
}

/// Scheme, host and port of a URL; for object storage the bucket, and for Azure the container in its account.
fn of(url: &Url) -> String {
    let host = url.host().map(|host| Host::to_string(&host)).unwrap_or_default();
    let container = if url.scheme().starts_with("abfs") { format!("{}@", url.username()) } else { String::new() };
    let port = url.port_or_known_default().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{container}{host}{port}", url.scheme()).to_ascii_lowercase()
}

/// Checks that a list or file from `list` may name the location `named`.
pub(super) fn check(list: &Url, named: &Location, allowed: &[Origin]) -> Result<(), String> {
    let is_allowed = match named {
        Location::Local(_) => allowed.contains(&Origin::Files),
        Location::Remote(url) => {
            let origin = of(url);
            origin == of(list) || allowed.iter().any(|a| *a == Origin::Any || *a == Origin::Of(origin.clone()))
        }
    };
    if is_allowed {
        return Ok(());
    }
    let (what, origin) = match named {
        Location::Local(_) => ("a file on this machine", "file://".to_owned()),
        Location::Remote(url) => ("at another origin", shown(url)),
    };
    Err(format!(
        "{named} is {what}, and what is read from {} may name only files there: leave it out, or allow it with \
         --list-origins {origin}",
        shown(list)
    ))
}

/// The origin of a URL, as written in flags.
fn shown(url: &Url) -> String {
    let origin = of(url);
    let default = match url.scheme() {
        "https" => ":443",
        "http" => ":80",
        _ => "",
    };
    origin.strip_suffix(default).map(str::to_owned).unwrap_or(origin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(list: &str, named: &str, allowed: &[&str]) -> Result<(), String> {
        let allowed: Vec<Origin> = allowed.iter().map(|text| text.parse().unwrap()).collect();
        check(&Url::parse(list).unwrap(), &Location::parse(named).unwrap(), &allowed)
    }

    #[test]
    fn lists_from_the_network_may_name_only_their_own_origin() {
        for (list, named) in [
            ("https://host/a/list.txt", "https://host/b.png"),
            ("https://host/a/list.txt", "https://host:443/b.png"),
            ("https://me:secret@HOST/list.txt", "https://host/b.png"),
            ("s3://bucket/list.csv", "s3://bucket/other/b.png"),
            ("abfss://c@a.dfs.core.windows.net/l.txt", "abfss://c@a.dfs.core.windows.net/b.png"),
        ] {
            assert_eq!(may(list, named, &[]), Ok(()), "{named}");
        }
        for (list, named, origin) in [
            ("https://host/list.txt", "/etc/passwd", "file://"),
            ("https://host/list.txt", "file:///etc/passwd", "file://"),
            ("https://host/list.txt", "http://host/b.png", "http://host"),
            ("https://host/list.txt", "https://host:8443/b.png", "https://host:8443"),
            ("https://host/list.txt", "http://169.254.169.254/latest", "http://169.254.169.254"),
            ("https://host/list.txt", "s3://bucket/b.png", "s3://bucket"),
            ("s3://bucket/list.csv", "s3://another/b.png", "s3://another"),
            ("s3://bucket/list.csv", "/b.png", "file://"),
            ("abfss://c@a.net/l.txt", "abfss://d@a.net/b.png", "abfss://d@a.net"),
        ] {
            let error = may(list, named, &[]).unwrap_err();
            assert!(error.ends_with(&format!("--list-origins {origin}")), "{error}");
            assert_eq!(may(list, named, &[origin]), Ok(()), "{named}");
            assert!(may(list, named, &["https://third"]).is_err());
        }
    }

    #[test]
    fn allowing_every_origin_does_not_allow_local_files() {
        assert_eq!(may("https://host/l.txt", "gs://b/c.png", &["*"]), Ok(()));
        assert!(may("https://host/l.txt", "/etc/passwd", &["*"]).is_err());
        assert_eq!(may("https://host/l.txt", "/etc/passwd", &["*", "file://"]), Ok(()));
        for text in ["host", "", "/etc", "C:\\x"] {
            assert!(text.parse::<Origin>().unwrap_err().contains("https://host"), "{text}");
        }
    }
}
