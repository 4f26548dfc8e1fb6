//! The location of data: a local path, or a URL of object storage or a web server.

use std::path::{Component, Path as FsPath, PathBuf};

use url::Url;

use super::StoreError;

/// A directory or file, or a URL prefix or object. Displayed without the parts of a URL that may hold credentials.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// An absolute local directory or file, without `..`.
    Local(PathBuf),
    /// Anything [`object_store`] can parse.
    Remote(Url),
}

/// Whether a text is meant as a URL. A path may contain a colon, like `frame:0001.png`.
pub fn is_url(text: &str) -> bool {
    // Java writes `file:/` instead of `file:///`.
    text.starts_with("file:/") || text.split_once("://").is_some_and(|(scheme, _)| scheme.len() > 1)
}

impl Location {
    /// Reads a path or URL as a user types it.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::Location { location: text.to_owned(), reason };
        if text.is_empty() {
            return Err(wrong("it is empty".into()));
        }
        if !is_url(text) {
            return absolute(FsPath::new(text)).map(Self::Local).map_err(|e| wrong(e.to_string()));
        }
        match Url::parse(text) {
            Ok(url) if url.scheme() == "file" => {
                url.to_file_path().map(Self::Local).map_err(|()| wrong("it is not a local path".into()))
            }
            Ok(url) => Ok(Self::Remote(url)),
            // If taken for a path, it would be created as a directory, password included.
            Err(error) => Err(StoreError::Location {
                location: text.split_once("://").map_or_else(String::new, |(scheme, _)| format!("{scheme}://…")),
                reason: format!("it is not a valid URL: {error}"),
            }),
        }
    }

    /// The local path, if it is one.
    pub fn local(&self) -> Option<&FsPath> {
        match self {
            Self::Local(path) => Some(path),
            Self::Remote(_) => None,
        }
    }

    /// The name of an object below this location, for messages.
    pub fn below(&self, path: &str) -> String {
        let root = self.to_string();
        let root = root.trim_end_matches('/');
        if path.is_empty() { root.to_owned() } else { format!("{root}/{path}") }
    }
}

/// Makes a path absolute and resolves `..`, which stores refuse. After a symbolic link, `..` means the parent of the link's
/// target, as for the operating system.
pub fn absolute(path: &FsPath) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    if !path.components().any(|part| part == Component::ParentDir) {
        return Ok(path);
    }
    let mut resolved = PathBuf::new();
    for part in path.components() {
        if part != Component::ParentDir {
            resolved.push(part);
            continue;
        }
        if resolved.is_symlink() {
            resolved = resolved.canonicalize()?;
        }
        resolved.pop();
    }
    Ok(resolved)
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(f),
            Self::Remote(url) => {
                // Credentials in a URL must not reach logs or files.
                let mut url = url.clone();
                let _ = url.set_password(None);
                let _ = url.set_username("");
                url.set_query(None);
                url.set_fragment(None);
                url.fmt(f)
            }
        }
    }
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_in_a_url_are_never_shown() {
        for text in [
            "https://user:hush@host:8080/a/b.png?X-Amz-Signature=hush&x=1#hush",
            "az://container/a?sv=2024&sig=hush",
            "s3://AKIA:hush@bucket/prefix",
        ] {
            let location = Location::parse(text).unwrap();
            for shown in [format!("{location}"), format!("{location:?}"), location.below("x")] {
                assert!(!shown.contains("hush") && !shown.contains("AKIA"), "{shown}");
            }
        }
    }

    #[test]
    fn a_path_with_parent_components_is_resolved() {
        let here = std::env::current_dir().unwrap();
        let above = here.parent().unwrap();
        for (text, expected) in [
            ("../x.parquet", above.join("x.parquet")),
            ("..", above.to_owned()),
            ("./x", here.join("x")),
            ("a/../b.tar", here.join("b.tar")),
            ("/a/./b/../../c/", "/c".into()),
            ("/../../c", "/c".into()),
        ] {
            assert_eq!(Location::parse(text).unwrap().local(), Some(expected.as_path()), "{text}");
        }
        let root = tempfile::TempDir::new().unwrap();
        let real = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(real.join("far/deep")).unwrap();
        std::os::unix::fs::symlink(real.join("far/deep"), real.join("link")).unwrap();
        let through = real.join("link/../x.png");
        assert_eq!(absolute(&through).unwrap(), real.join("far/x.png"));
    }

    #[test]
    fn a_colon_alone_does_not_make_a_url() {
        let here = std::env::current_dir().unwrap();
        for text in ["frame:0001.png", "im/frame:0001.png", "C:/x", "C://x", "out:v2", "s3:bucket", "2024:a/b"] {
            let expected = std::path::absolute(here.join(text)).unwrap();
            assert_eq!(Location::parse(text).unwrap().local(), Some(expected.as_path()), "{text}");
        }
        assert_eq!(Location::parse("/im/a:b.png").unwrap(), Location::Local("/im/a:b.png".into()));
        for text in ["file:///im/a%3Ab.png", "file:/im/a:b.png", "file://localhost/im/a:b.png"] {
            assert_eq!(Location::parse(text).unwrap(), Location::Local("/im/a:b.png".into()), "{text}");
        }
        for text in ["s3://bucket/a:b.png", "https://host:8080/x", "memory:///", "abfss://c@a.net/x"] {
            assert_eq!(Location::parse(text).unwrap(), Location::Remote(Url::parse(text).unwrap()), "{text}");
        }
    }

    #[test]
    fn an_invalid_url_is_not_taken_for_a_path() {
        let error = Location::parse("https://user:hu/sh@host:port/x").unwrap_err().to_string();
        assert!(error.contains("not a valid URL") && !error.contains("sh@host"), "{error}");
        assert!(Location::parse("photos/a.png").unwrap().local().is_some());
        assert!(Location::parse("").is_err());
    }
}
