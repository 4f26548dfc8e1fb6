//! Lists of images: a text file with one path or URL per line, or a table with a column of them.

use std::collections::HashMap;
use std::path::{Path as FsPath, PathBuf};

use elbo_core::hand_table::{HandTable, HandText, Header};
use elbo_core::text::normal;
use elbo_store::files;
use elbo_store::{Location, StoreError, is_url};
use futures::{StreamExt, TryStreamExt};
use unicode_normalization::UnicodeNormalization;
use url::Url;

use super::collector::Collector;
use super::walk::{local_etag, url_of};
use super::{DatasetError, Found, ListOptions, Origin, Reader, caption_of, check_captions, origin, read_object};

/// Names of the column with the paths; the first that exists is used.
pub(super) const PATH_COLUMNS: [&str; 6] = ["path", "key", "image", "file_name", "filename", "url"];
/// Names of the column with the pairs.
const PAIR_COLUMNS: [&str; 2] = ["pair", "pair_id"];
/// Files looked up at a time.
pub(super) const ASKED: usize = 128;

/// A line of the list.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    line: u64,
    /// The path or URL as written.
    key: String,
    label: Option<String>,
    candidates: Vec<String>,
    pair: Option<String>,
}

/// The columns of a table by their role.
struct Columns {
    path: usize,
    label: Option<usize>,
    pair: Option<usize>,
    candidates: Vec<(String, usize)>,
}

/// Adds the images of the list at `location`, in its order, up to the limit in `options`. Checks that these exist.
pub(super) async fn list(
    location: &Location,
    options: &ListOptions<'_>,
    reader: &Reader,
    collector: &mut Collector<'_>,
) -> Result<(), DatasetError> {
    let list = List { name: location.to_string(), base: Base::of(location) };
    let text =
        HandText::new("the list", list.name.as_str(), read(location).await.map_err(|problem| list.wrong(problem))?)?;
    let entries = match text.is_called(".txt") {
        true if options.candidates.is_some() => {
            return Err(list.wrong("has no columns, but --candidates names one: give a .csv or .tsv list"));
        }
        true => plain(&text),
        false => list.table(&text, options)?,
    };
    if entries.is_empty() {
        return Err(list.wrong("names no image: write one path or URL per line"));
    }
    let mut located = Vec::with_capacity(entries.len());
    let mut lines: HashMap<String, u64> = HashMap::new();
    for entry in entries {
        let line = entry.line;
        if entry.key.is_empty() {
            return Err(list.line(line, "the path is empty"));
        }
        let image = list.base.locate(&entry.key, options.origins).map_err(|problem| list.line(line, problem))?;
        if let Some(first) = lines.insert(image.to_string(), line) {
            return Err(list.line(line, format!("'{}' is in line {first} already: list each image once", entry.key)));
        }
        located.push((entry, image));
    }
    located.truncate(options.limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)));
    let list = &list;
    collector.expect_duplicates();
    let mut found = futures::stream::iter(located)
        .map(|(entry, image)| async move {
            let Entry { line, key, label, candidates, pair } = entry;
            let found = find(reader, &key, image).await.map_err(|problem| list.line(line, problem))?;
            let (location, size, etag) = found;
            Ok::<_, DatasetError>(Found { key, location, part: None, size, etag, label, candidates, pair })
        })
        .buffered(ASKED);
    while let Some(found) = found.try_next().await? {
        if !collector.add(found)? {
            break;
        }
    }
    Ok(())
}

async fn read(location: &Location) -> Result<Vec<u8>, String> {
    match location {
        Location::Local(path) => files::read_given(path).map_err(|e| format!("can't be read: {e}")),
        // Use the full URL, since a location is displayed without credentials.
        Location::Remote(url) => match read_object(url.as_str()).await {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(error) => Err(format!("can't be read: {error}")),
        },
    }
}

/// One image per non-empty line.
fn plain(text: &HandText) -> Vec<Entry> {
    text.lines().map(|(line, key)| Entry { line, key: key.trim().to_owned(), ..Entry::default() }).collect()
}

/// Checks that an image exists, and returns its location, size and tag.
pub(super) async fn find(reader: &Reader, key: &str, image: Location) -> Result<(String, u64, Option<String>), String> {
    Ok(match image {
        Location::Local(path) => {
            let metadata = std::fs::metadata(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => match other_form(&path) {
                    Some(form) => format!(
                        "there is no {}, but a file whose name is the same in another Unicode form ({form}): write the name \
                         in that form, or rename the file",
                        path.display()
                    ),
                    None => format!("there is no {}", path.display()),
                },
                _ => format!("{} can't be read: {e}", path.display()),
            })?;
            if let Some(what) = files::irregular(&metadata) {
                return Err(format!("{} is {what}: a list names images", path.display()));
            }
            let location = path.to_str().ok_or_else(|| format!("the name of {} is not UTF-8", path.display()))?;
            (location.to_owned(), metadata.len(), local_etag(&metadata))
        }
        Location::Remote(url) => {
            if url.query().is_some() {
                return Err(
                    "a URL with a query can't be read: give one without, and pass credentials in the environment"
                        .into(),
                );
            }
            let location = url.to_string();
            let object = reader.head(&location).await.map_err(|e| match e {
                StoreError::Object { source: object_store::Error::NotFound { .. }, .. } => {
                    format!("there is no {key}")
                }
                other => other.to_string(),
            })?;
            (location, object.size, object.e_tag)
        }
    })
}

/// The other Unicode form of a missing file's name under which the file exists, if any.
fn other_form(path: &FsPath) -> Option<&'static str> {
    let text = path.to_str()?;
    let forms = [("NFC", text.nfc().collect::<String>()), ("NFD", text.nfd().collect())];
    forms.into_iter().find(|(_, other)| *other != text && FsPath::new(other).exists()).map(|(form, _)| form)
}

/// The base of relative paths: the place of the list.
#[derive(Debug)]
pub(super) enum Base {
    Directory(PathBuf),
    Prefix(Url),
}

impl Base {
    pub(super) fn of(list: &Location) -> Self {
        match list {
            Location::Local(path) => Self::Directory(path.parent().unwrap_or(FsPath::new("/")).to_owned()),
            Location::Remote(url) => {
                let mut prefix = url.clone();
                if let Ok(mut segments) = prefix.path_segments_mut() {
                    segments.pop();
                }
                Self::Prefix(prefix)
            }
        }
    }

    /// The location of the image written as `key`. A list from the network may name only its own origin or `origins`: its
    /// author must not choose what is read from this machine and its network.
    pub(super) fn locate(&self, key: &str, origins: &[Origin]) -> Result<Location, String> {
        let parsed = |text: &str| Location::parse(text).map_err(|error| error.to_string());
        let found = match self {
            _ if is_url(key) || FsPath::new(key).is_absolute() => parsed(key)?,
            Self::Directory(directory) => return parsed(&directory.join(key).to_string_lossy()),
            Self::Prefix(prefix) => {
                let (above, key) = upwards(prefix, key);
                parsed(&url_of(&above, &key))?
            }
        };
        match self {
            Self::Directory(_) => Ok(found),
            Self::Prefix(prefix) => origin::check(prefix, &found, origins).map(|()| found),
        }
    }
}

/// Resolves `.` and `..` in a relative path: returns the new base and the rest of the path.
fn upwards(prefix: &Url, key: &str) -> (Url, String) {
    let mut above = prefix.clone();
    let mut names = Vec::new();
    for name in key.split('/') {
        match name {
            "." => {}
            ".." if names.pop().is_some() => {}
            ".." => {
                if let Ok(mut segments) = above.path_segments_mut() {
                    segments.pop_if_empty().pop();
                }
            }
            name => names.push(name),
        }
    }
    (above, names.join("/"))
}

/// A list, with its name for errors.
struct List {
    name: String,
    base: Base,
}

impl List {
    fn wrong(&self, problem: impl Into<String>) -> DatasetError {
        DatasetError::List { list: self.name.clone(), problem: problem.into() }
    }

    fn line(&self, line: u64, problem: impl Into<String>) -> DatasetError {
        DatasetError::Line { list: self.name.clone(), line, problem: problem.into() }
    }

    fn table(&self, text: &HandText, options: &ListOptions<'_>) -> Result<Vec<Entry>, DatasetError> {
        let has_path = |header: &Header| PATH_COLUMNS.iter().any(|name| header.has(name));
        let table = text.table(has_path)?.ok_or_else(|| {
            self.wrong(format!(
                "has no column with the images: its first line must name one of {}; there are {}",
                PATH_COLUMNS.join(", "),
                text.shown_header()
            ))
        })?;
        let columns = self.columns(&table, text, options)?;
        let mut entries = Vec::new();
        for row in table.whole_rows() {
            let row = row?;
            let line = row.line;
            let filled = |column: Option<usize>| row.filled(column).map(str::to_owned);
            let candidates = captions(&columns.candidates, |column| row.cell(column));
            let candidates = candidates.map_err(|problem| self.line(line, problem))?;
            // A label column that is not used may contain anything.
            let label = row.filled(columns.label).filter(|_| options.takes_labels());
            let label = label.map(|label| caption_of(&candidates, normal(label).into_owned())).transpose();
            let label = label.map_err(|label| {
                let problem =
                    format!("the label '{label}' is none of the captions: give the right one, or its position");
                self.line(line, format!("{problem} counted from 0"))
            })?;
            let (key, pair) = (row.cell(columns.path).to_owned(), filled(columns.pair));
            entries.push(Entry { line, key, label, candidates, pair });
        }
        Ok(entries)
    }

    fn columns(
        &self,
        table: &HandTable<'_>,
        text: &HandText,
        options: &ListOptions<'_>,
    ) -> Result<Columns, DatasetError> {
        let named =
            |name: &str, flag: &str| match table.column(name)? {
                Some(column) => Ok(column),
                None => Err(self
                    .wrong(format!("has no column '{name}', which {flag} names; there are {}", text.shown_header()))),
            };
        let first = |names: &[&str]| -> Result<Option<usize>, DatasetError> {
            for name in names {
                if let Some(column) = table.column(name)? {
                    return Ok(Some(column));
                }
            }
            Ok(None)
        };
        let path = first(&PATH_COLUMNS)?.ok_or_else(|| self.wrong("has no column with the images"))?;
        let mut candidates = Vec::new();
        for name in options.candidates.into_iter().flat_map(|names| names.split(',')).map(str::trim) {
            candidates.push((name.to_owned(), named(name, "--candidates")?));
        }
        // Only images with captions have pairs.
        let pair = if candidates.is_empty() { None } else { first(&PAIR_COLUMNS)? };
        let label = match options.label_column() {
            None => table.column("label")?,
            Some(name) => Some(named(name, "--label-from")?),
        };
        Ok(Columns { path, label, pair, candidates })
    }
}

/// A sample's captions: a JSON array in one column, or one in each of several columns, where the last ones may be empty.
fn captions<'a>(columns: &[(String, usize)], cell: impl Fn(usize) -> &'a str) -> Result<Vec<String>, String> {
    let captions: Vec<String> = match columns {
        [] => return Ok(Vec::new()),
        [(name, column)] => serde_json::from_str(cell(*column)).map_err(|e| {
            format!("the column '{name}' must hold the captions as a JSON array like [\"a cat\", \"a dog\"]: {e}")
        })?,
        several => {
            let cells: Vec<_> = several.iter().map(|(_, column)| cell(*column).to_owned()).collect();
            let filled = cells.iter().rposition(|caption| !caption.is_empty()).map_or(0, |last| last + 1);
            cells.into_iter().take(filled).collect()
        }
    };
    check_captions(&captions)?;
    Ok(captions)
}

#[cfg(test)]
mod tests;
