//! Where the label of a sample comes from.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;

use crate::class::Classes;
use crate::files;
use crate::manifest::Sample;

/// Where labels come from (`--label-from`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelSource {
    /// The directory an image lies in; images directly in the source have no label.
    Parent,
    /// Nowhere: labels that the source brings are left out.
    None,
    /// A column of a Parquet file or list; the extension of a tar's members, or a field of its .json members.
    Column(String),
    /// A CSV file with the columns `key` and `label`; images it does not name have no label.
    File(PathBuf),
}

impl From<&str> for LabelSource {
    fn from(text: &str) -> Self {
        match text.strip_prefix("column:") {
            Some(name) => Self::Column(name.to_owned()),
            None if text == "parent" => Self::Parent,
            None if text == "none" => Self::None,
            None => Self::File(text.into()),
        }
    }
}

impl fmt::Display for LabelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parent => f.write_str("parent"),
            Self::None => f.write_str("none"),
            Self::Column(name) => write!(f, "column:{name}"),
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

/// Labels by key, in the place of those the source brings.
#[derive(Debug)]
pub(super) enum Labels {
    Parent,
    None,
    File { path: PathBuf, labels: HashMap<String, String>, used: bool },
}

impl LabelSource {
    /// Reads the labels; nothing where the source brings them.
    pub(super) fn open(&self) -> Result<Option<Labels>, LabelError> {
        Ok(match self {
            Self::Parent => Some(Labels::Parent),
            Self::None => Some(Labels::None),
            Self::Column(_) => None,
            Self::File(path) => Some(Labels::File { path: path.clone(), labels: read(path)?, used: false }),
        })
    }
}

impl Labels {
    /// The label of a key.
    pub(super) fn of(&mut self, key: &str) -> Option<String> {
        match self {
            Self::Parent => {
                let directory = key.rsplit_once('/')?.0;
                Some(directory.rsplit_once('/').map_or(directory, |(_, name)| name).to_owned())
            }
            Self::None => None,
            Self::File { labels, used, .. } => {
                let label = labels.get(key).cloned();
                *used |= label.is_some();
                label
            }
        }
    }

    /// Fails where a label file is about other images than these, of which `example` is one.
    pub(super) fn check_used(&self, example: &str) -> Result<(), LabelError> {
        match self {
            Self::File { path, used: false, .. } => {
                Err(LabelError::NoMatch { path: path.clone(), example: example.to_owned() })
            }
            _ => Ok(()),
        }
    }
}

fn read(path: &std::path::Path) -> Result<HashMap<String, String>, LabelError> {
    let failed = |source| LabelError::Read { path: path.to_owned(), source };
    let bytes = files::read_given(path).map_err(|source| failed(source.into()))?;
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(&bytes[..]);
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

/// The labels that are no class, with how many samples have them and the key of one.
///
/// Such samples count in no accuracy, so a job refuses them before it starts.
#[derive(Clone, Debug, Default)]
pub struct UnknownLabels(BTreeMap<String, (u64, String)>);

impl UnknownLabels {
    /// Different labels that are kept; by then the list tells enough.
    const KEPT: usize = 1000;

    /// Looks at a sample's label.
    pub fn note(&mut self, sample: &Sample, classes: &Classes) {
        let Some(label) = sample.label.as_deref().filter(|label| classes.with_label(label).is_none()) else { return };
        if let Some((count, _)) = self.0.get_mut(label) {
            *count += 1;
        } else if self.0.len() < Self::KEPT {
            self.0.insert(label.to_owned(), (1, sample.key.clone()));
        }
    }

    /// Label, number of samples and the key of one, most frequent first.
    pub fn into_sorted(self) -> Vec<(String, u64, String)> {
        let mut unknown: Vec<_> = self.0.into_iter().map(|(label, (count, key))| (label, count, key)).collect();
        unknown.sort_by_key(|(_, count, _)| std::cmp::Reverse(*count));
        unknown
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
