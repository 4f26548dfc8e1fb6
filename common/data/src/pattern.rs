//! Patterns of `--images`: one place, or several with braces and wildcards.
//!
//! Braces are expanded first, as in shells: `{train,val}`, `{000..099}`. Then `*`, `?`, `[a-z]` match within a name and `**`
//! across directories. Keys are relative to the directory before the first of these characters.

use elbo_store::Location;
use globset::{GlobBuilder, GlobMatcher};

use super::DatasetError;

/// Maximum number of names that braces may expand to.
const MOST_TARGETS: usize = 1_000_000;

/// A base and its targets.
#[derive(Debug)]
pub(super) struct Pattern {
    /// The base of keys.
    pub(super) base: Location,
    /// The targets, relative to the base.
    pub(super) targets: Vec<Target>,
}

/// The canonical form of a source: local paths are absolute, and URLs have no credentials.
pub fn canonical(source: &str) -> Result<String, DatasetError> {
    let location = Location::parse(source)?;
    match source.find(['{', '*', '[']) {
        // Wildcards would be escaped in a URL.
        Some(first) if location.local().is_none() => {
            let cut = source[..first].rfind('/').map_or(0, |slash| slash + 1);
            Ok(format!("{}{}", Location::parse(&source[..cut])?, &source[cut..]))
        }
        _ => Ok(location.to_string()),
    }
}

/// Something below a base.
#[derive(Debug)]
pub(super) enum Target {
    /// The base itself.
    Base,
    /// The file or directory of this name.
    Name(String),
    /// Everything that matches.
    Glob(Box<Glob>),
}

/// A pattern of names.
#[derive(Debug)]
pub(super) struct Glob {
    /// The directory that contains all matches, relative to the base; empty for the base itself.
    pub(super) directory: String,
    matcher: GlobMatcher,
}

impl Glob {
    /// Whether a file or one of its directories matches.
    pub(super) fn matches(&self, key: &str) -> bool {
        let ends = key.match_indices('/').map(|(i, _)| i).chain([key.len()]);
        ends.into_iter().any(|end| self.matcher.is_match(&key[..end]))
    }
}

impl Pattern {
    /// Parses a user's pattern.
    pub(super) fn parse(text: &str) -> Result<Self, DatasetError> {
        let location = Location::parse(text)?;
        let wrong = |problem: String| DatasetError::Pattern { pattern: text.to_owned(), problem };
        let is_url = location.local().is_none();
        if let Location::Remote(url) = &location
            && url.query().is_some()
        {
            // Shown without its query, which may be a signature.
            let problem = "a URL with a query can't be read: give one without, and pass credentials in the environment";
            return Err(DatasetError::Pattern { pattern: location.to_string(), problem: problem.into() });
        }
        // An existing directory may be called photos[1].
        let literal = location.local().is_some_and(std::path::Path::exists);
        let special = |c: char| matches!(c, '{' | '*' | '[') || (c == '?' && !is_url);
        let Some(first) = text.find(special).filter(|_| !literal) else {
            return Ok(Self::literal(location));
        };
        let cut = text[..first].rfind('/').map_or(0, |slash| slash + 1);
        let base = Location::parse(if cut == 0 { "." } else { &text[..cut] })?;
        let mut targets = Vec::new();
        for name in spelled_out(&text[cut..]).map_err(wrong)? {
            targets.push(match name.find(|c| special(c) && c != '{') {
                None => Target::Name(name),
                Some(wildcard) => {
                    let directory = name[..wildcard].rfind('/').map_or("", |slash| &name[..slash]).to_owned();
                    let glob = GlobBuilder::new(&name).literal_separator(true).build();
                    let glob = glob.map_err(|e| wrong(format!("{e}; write it as in 'photos/**/*.jpg'")))?;
                    Target::Glob(Box::new(Glob { directory, matcher: glob.compile_matcher() }))
                }
            });
        }
        Ok(Self { base, targets })
    }

    /// A directory is the base of its files; a file's base is its directory.
    fn literal(location: Location) -> Self {
        match &location {
            Location::Local(path) if !path.is_dir() => {
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
                match (path.parent(), name) {
                    (Some(parent), Some(name)) => {
                        Self { base: Location::Local(parent.to_owned()), targets: vec![Target::Name(name)] }
                    }
                    _ => Self { base: location, targets: vec![Target::Base] },
                }
            }
            Location::Remote(url) if super::Kind::of(url.path()).is_some() => {
                let mut base = url.clone();
                let name = decoded_segments(url).pop();
                if let Ok(mut segments) = base.path_segments_mut() {
                    segments.pop();
                }
                Self { base: Location::Remote(base), targets: vec![Target::Name(name.unwrap_or_default())] }
            }
            _ => Self { base: location, targets: vec![Target::Base] },
        }
    }
}

/// The names that braces expand to.
fn spelled_out(text: &str) -> Result<Vec<String>, String> {
    if !text.contains('{') {
        return Ok(vec![text.to_owned()]);
    }
    let count = ranges(text);
    if count > MOST_TARGETS {
        return Err(format!("its braces stand for {count} names: use fewer, or a wildcard"));
    }
    let names = bracoxide::bracoxidize(text).map_err(|e| {
        format!("its braces can't be understood ({e:?}): write them as in {{train,val}} or {{000..099}}")
    })?;
    if names.is_empty() { Err("its braces stand for nothing".into()) } else { Ok(names) }
}

/// A lower bound on the number of names that the numeric ranges of a pattern expand to.
fn ranges(text: &str) -> usize {
    let inside = text.split('{').skip(1).filter_map(|part| part.split(['}', ',']).next());
    let sizes = inside.filter_map(|part| {
        let (from, to) = part.split_once("..")?;
        let (from, to): (i64, i64) = (from.parse().ok()?, to.parse().ok()?);
        usize::try_from(from.abs_diff(to)).ok()?.checked_add(1)
    });
    sizes.fold(1, usize::saturating_mul)
}

/// The decoded segments of a URL's path.
fn decoded_segments(url: &url::Url) -> Vec<String> {
    object_store::path::Path::from_url_path(url.path())
        .map_or_else(|_| Vec::new(), |path| path.parts().map(|p| p.as_ref().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(text: &str) -> (String, Vec<String>) {
        let pattern = Pattern::parse(text).unwrap();
        let names = pattern.targets.iter().map(|target| match target {
            Target::Base => String::new(),
            Target::Name(name) => name.clone(),
            Target::Glob(glob) => format!("{} in '{}'", glob.matcher.glob().glob(), glob.directory),
        });
        (pattern.base.to_string(), names.collect())
    }

    #[test]
    fn braces_and_wildcards_are_relative_to_the_directory_before_them() {
        for (text, base, expected) in [
            ("s3://b/photos", "s3://b/photos", vec![""]),
            ("s3://b/d/shard-{08..10}.tar", "s3://b/d/", vec!["shard-08.tar", "shard-09.tar", "shard-10.tar"]),
            ("s3://b/{train,val}/x", "s3://b/", vec!["train/x", "val/x"]),
            ("/nowhere/{a,b}/*.jpg", "/nowhere/", vec!["a/*.jpg in 'a'", "b/*.jpg in 'b'"]),
            ("/nowhere/x/**/*.png", "/nowhere/x/", vec!["**/*.png in ''"]),
            ("https://host/a/b%20c.tar", "https://host/a", vec!["b c.tar"]),
            ("/nowhere/a.parquet", "/nowhere", vec!["a.parquet"]),
            ("/nowhere/a:b/frame:*.png", "/nowhere/a:b/", vec!["frame:*.png in ''"]),
        ] {
            assert_eq!(targets(text), (base.to_owned(), expected.into_iter().map(str::to_owned).collect()), "{text}");
        }
    }

    #[test]
    fn a_wildcard_matches_within_a_name_and_matches_directories_too() {
        let glob = |pattern: &str| match Pattern::parse(pattern).unwrap().targets.pop() {
            Some(Target::Glob(glob)) => glob,
            other => panic!("{other:?}"),
        };
        let jpg = glob("/nowhere/*.jpg");
        assert!(jpg.matches("a.jpg") && !jpg.matches("b/a.jpg") && !jpg.matches("a.png"));
        let deep = glob("/nowhere/**/*.jpg");
        assert!(deep.matches("a.jpg") && deep.matches("b/c/a.jpg"));
        let directories = glob("/nowhere/c*");
        assert!(directories.matches("cats/deep/1.png") && !directories.matches("dogs/c.png"));
    }

    #[test]
    fn a_canonical_source_has_no_credentials_and_keeps_its_pattern() {
        for (source, written) in [
            ("s3://me:secret@b/{a,b}/*.tar", "s3://b/{a,b}/*.tar"),
            ("s3://me:secret@b/photos?sig=secret", "s3://b/photos"),
            ("/data/{a,b}", "/data/{a,b}"),
            ("/data/a:b/*.png", "/data/a:b/*.png"),
        ] {
            assert_eq!(canonical(source).unwrap(), written);
        }
    }

    #[test]
    fn an_existing_path_is_not_treated_as_a_pattern() {
        let root = tempfile::TempDir::new().unwrap();
        let path = root.path().join("photos [1] {a}");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(targets(path.to_str().unwrap()), (path.display().to_string(), vec![String::new()]));
    }

    #[test]
    fn errors_about_invalid_patterns_show_valid_ones() {
        for (text, message) in [
            ("/nowhere/{0..9999999}.tar", "stand for 10000000 names"),
            ("/nowhere/{0..9999}{0..9999}.tar", "stand for 100000000 names"),
            ("/nowhere/{a,b", "{train,val}"),
            ("/nowhere/[z-a].jpg", "photos/**/*.jpg"),
            ("https://host/x.tar?sig=secret", "a URL with a query"),
        ] {
            let error = Pattern::parse(text).unwrap_err().to_string();
            assert!(error.contains(message) && !error.contains("secret"), "{text}: {error}");
        }
    }
}
