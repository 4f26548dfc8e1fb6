//! Where the label of a sample comes from.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;

use crate::class::Classes;
use crate::manifest::Sample;

/// Where labels come from (`--label-from`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelSource {
    /// The directory an image lies in; images directly in the source have no label.
    Parent,
    /// A CSV file with the columns `key` and `label`; images it does not name have no label.
    File(PathBuf),
}

impl From<&str> for LabelSource {
    fn from(text: &str) -> Self {
        if text == "parent" { Self::Parent } else { Self::File(text.into()) }
    }
}

impl fmt::Display for LabelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parent => f.write_str("parent"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Labels that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// The file can't be read.
    #[error(
        "reading the label file {path}: {source}; give --label-from a CSV file with the columns key,label, or 'parent'"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: csv::Error,
    },
    /// A column is missing.
    #[error(
        "reading the label file {path}: it has no column '{column}'; its first line must name the columns key,label"
    )]
    Column {
        /// The file.
        path: PathBuf,
        /// The column.
        column: &'static str,
    },
    /// One key with two labels.
    #[error(
        "reading the label file {path}, line {line}: '{key}' is labelled '{second}' here and '{first}' above; give each key \
         one label"
    )]
    Twice {
        /// The file.
        path: PathBuf,
        /// 1-based line.
        line: u64,
        /// The key.
        key: String,
        /// Its label above.
        first: String,
        /// Its label here.
        second: String,
    },
    /// The file names none of the images.
    #[error(
        "reading the label file {path}: it names none of the images; a key is a path relative to --images, like \
         '{example}'"
    )]
    NoMatch {
        /// The file.
        path: PathBuf,
        /// A key of the dataset.
        example: String,
    },
}

/// Labels by key.
#[derive(Debug)]
pub(super) enum Labels {
    Parent,
    File(HashMap<String, String>),
}

impl LabelSource {
    /// Reads the labels and checks that they are about the images with these `keys`.
    pub(super) fn labels<'a>(&self, mut keys: impl Iterator<Item = &'a str>) -> Result<Labels, LabelError> {
        let Self::File(path) = self else { return Ok(Labels::Parent) };
        let labels = read(path)?;
        let first = keys.next().unwrap_or_default();
        if labels.contains_key(first) || keys.any(|key| labels.contains_key(key)) {
            Ok(Labels::File(labels))
        } else {
            Err(LabelError::NoMatch { path: path.clone(), example: first.to_owned() })
        }
    }
}

impl Labels {
    /// The label of a key.
    pub(super) fn of(&self, key: &str) -> Option<String> {
        match self {
            Self::Parent => {
                let directory = key.rsplit_once('/')?.0;
                Some(directory.rsplit_once('/').map_or(directory, |(_, name)| name).to_owned())
            }
            Self::File(labels) => labels.get(key).cloned(),
        }
    }
}

fn read(path: &std::path::Path) -> Result<HashMap<String, String>, LabelError> {
    let failed = |source| LabelError::Read { path: path.to_owned(), source };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_path(path).map_err(failed)?;
    let header = reader.headers().map_err(failed)?.clone();
    let column = |name: &'static str| {
        let position = header.iter().position(|column| column.trim_start_matches('\u{feff}') == name);
        position.ok_or_else(|| LabelError::Column { path: path.to_owned(), column: name })
    };
    let (key_column, label_column) = (column("key")?, column("label")?);
    let mut labels = HashMap::new();
    for row in reader.records() {
        let row = row.map_err(failed)?;
        let key = row.get(key_column).unwrap_or_default().trim_start_matches("./").to_owned();
        let label = row.get(label_column).unwrap_or_default().to_owned();
        if label.is_empty() {
            continue;
        }
        if let Some(first) = labels.get(&key).filter(|first| **first != label).cloned() {
            let line = row.position().map_or(0, csv::Position::line);
            return Err(LabelError::Twice { path: path.to_owned(), line, key, first, second: label });
        }
        labels.insert(key, label);
    }
    Ok(labels)
}

/// The labels that are no class, most frequent first: label, how many samples have it, the key of one.
///
/// Such samples count in no accuracy, so a job warns of them before it starts.
pub fn unknown_labels(samples: &[Sample], classes: &Classes) -> Vec<(String, usize, String)> {
    let mut counts: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for sample in samples {
        if let Some(label) = &sample.label {
            counts.entry(label).or_insert((0, &sample.key)).0 += 1;
        }
    }
    let mut unknown: Vec<_> = counts
        .into_iter()
        .filter(|(label, _)| classes.with_label(label).is_none())
        .map(|(label, (count, key))| (label.to_owned(), count, key.to_owned()))
        .collect();
    unknown.sort_by_key(|(_, count, _)| std::cmp::Reverse(*count));
    unknown
}
