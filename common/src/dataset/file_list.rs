//! The images a list names: a text file with one path or URL per line, or CSV with a column of them.

use std::collections::HashMap;
use std::path::{Path as FsPath, PathBuf};

use futures::{StreamExt, TryStreamExt};
use url::Url;

use super::collector::Collector;
use super::walk::{local_etag, url_of};
use super::{DatasetError, Found, ListOptions, Origin, Reader, caption_of, check_captions, origin, read_object};
use crate::files;
use crate::store::{Location, StoreError};

/// Names of the column with the paths, the first that is there counts.
pub(super) const PATH_COLUMNS: [&str; 6] = ["path", "key", "image", "file_name", "filename", "url"];
/// Names of the column that says which samples are a pair.
const PAIR_COLUMNS: [&str; 2] = ["pair", "pair_id"];
/// Files asked for at a time.
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

/// Which columns of a CSV list are what.
struct Columns {
    path: usize,
    label: Option<usize>,
    pair: Option<usize>,
    candidates: Vec<(String, usize)>,
}

/// Takes in the images of the list at `location`, in its order; of as many as `options` allow it is checked that they are
/// there.
pub(super) async fn list(
    location: &Location,
    options: &ListOptions<'_>,
    reader: &Reader,
    collector: &mut Collector<'_>,
) -> Result<(), DatasetError> {
    let list = List { name: location.to_string(), base: Base::of(location) };
    let text = read(location).await.map_err(|problem| list.wrong(problem))?;
    let text = text.trim_start_matches('\u{feff}');
    let entries = match list.name.to_ascii_lowercase().ends_with(".txt") {
        true if options.candidates.is_some() => {
            return Err(list.wrong("has no columns, and --candidates names one: give a .csv list"));
        }
        true => plain(text),
        false => list.csv(text, options)?,
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

async fn read(location: &Location) -> Result<String, String> {
    let bytes = match location {
        Location::Local(path) => files::read_given(path).map_err(|e| format!("can't be read: {e}"))?,
        // By its full URL: what is shown of a location leaves credentials out.
        Location::Remote(url) => read_object(url.as_str()).await.map_err(|e| format!("can't be read: {e}"))?.to_vec(),
    };
    String::from_utf8(bytes).map_err(|_| "is not UTF-8: save it as UTF-8".to_owned())
}

/// One image per line that is not empty.
fn plain(text: &str) -> Vec<Entry> {
    let lines = (1..).zip(text.lines().map(str::trim));
    lines
        .filter(|(_, l)| !l.is_empty())
        .map(|(line, l)| Entry { line, key: l.to_owned(), ..Entry::default() })
        .collect()
}

/// Sees whether an image is there: where, of what size, and with which tag.
pub(super) async fn find(reader: &Reader, key: &str, image: Location) -> Result<(String, u64, Option<String>), String> {
    Ok(match image {
        Location::Local(path) => {
            let metadata = std::fs::metadata(&path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => format!("there is no {}", path.display()),
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
                    "a URL with a query can't be read: give one without, and credentials by the environment".into()
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

/// What relative paths are relative to: where the list lies.
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

    /// Where the image written as `key` lies. What comes from the network names what is at its own origin, or at `origins`:
    /// who wrote it should not choose what is read of this machine and of its network.
    pub(super) fn locate(&self, key: &str, origins: &[Origin]) -> Result<Location, String> {
        let parsed = |text: &str| Location::parse(text).map_err(|error| error.to_string());
        // A one-letter scheme is a drive letter, not a URL.
        let is_url = Url::parse(key).is_ok_and(|url| url.scheme().len() > 1);
        let found = match self {
            _ if is_url || FsPath::new(key).is_absolute() => parsed(key)?,
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

/// What a relative path with `.` or `..` in it is relative to, and the rest of it.
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

/// A list as errors name it.
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

    fn csv(&self, text: &str, options: &ListOptions<'_>) -> Result<Vec<Entry>, DatasetError> {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
        let unreadable = |e: csv::Error| self.wrong(format!("is not CSV: {e}"));
        let header: Vec<_> = reader.headers().map_err(unreadable)?.iter().map(str::to_owned).collect();
        let columns = self.columns(&header, options)?;
        let mut entries = Vec::new();
        for row in reader.records() {
            let row = row.map_err(unreadable)?;
            let line = row.position().map_or(0, csv::Position::line);
            let cell = |column: usize| row.get(column).unwrap_or_default();
            let filled = |column: Option<usize>| column.map(cell).filter(|text| !text.is_empty()).map(str::to_owned);
            let candidates = captions(&columns.candidates, cell).map_err(|problem| self.line(line, problem))?;
            // A label that something else decides may be anything.
            let label = filled(columns.label).filter(|_| options.takes_labels());
            let label = label.map(|label| caption_of(&candidates, label)).transpose().map_err(|label| {
                let problem =
                    format!("the label '{label}' is none of the captions: give the right one, or its position");
                self.line(line, format!("{problem} counted from 0"))
            })?;
            let (key, pair) = (cell(columns.path).to_owned(), filled(columns.pair));
            entries.push(Entry { line, key, label, candidates, pair });
        }
        Ok(entries)
    }

    fn columns(&self, header: &[String], options: &ListOptions<'_>) -> Result<Columns, DatasetError> {
        let position = |name: &str| header.iter().position(|column| column == name);
        let path = PATH_COLUMNS.iter().find_map(|name| position(name)).ok_or_else(|| {
            self.wrong(format!(
                "has no column with the images: its first line must name one of {}; there are {}",
                PATH_COLUMNS.join(", "),
                header.join(", ")
            ))
        })?;
        let names = options.candidates.map(|names| names.split(',').map(str::trim).collect::<Vec<_>>());
        let candidates = names.iter().flatten().map(|name| {
            let missing =
                || format!("has no column '{name}', which --candidates names; there are {}", header.join(", "));
            position(name).map(|column| ((*name).to_owned(), column)).ok_or_else(|| self.wrong(missing()))
        });
        let candidates = candidates.collect::<Result<Vec<_>, _>>()?;
        // Pairs are of images with the same captions.
        let pair = PAIR_COLUMNS.iter().find_map(|name| position(name)).filter(|_| !candidates.is_empty());
        let label = match options.label_column() {
            None => position("label"),
            Some(name) => Some(position(name).ok_or_else(|| {
                self.wrong(format!("has no column '{name}', which --label-from names; there are {}", header.join(", ")))
            })?),
        };
        Ok(Columns { path, label, pair, candidates })
    }
}

/// A sample's captions: a JSON array in one column, or one in each of several columns, of which the last may be empty.
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
