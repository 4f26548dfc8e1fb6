//! The source of samples' labels.

mod file;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use self::file::LabelFile;
pub(super) use self::file::Unmatched;
use elbo_core::class::Classes;
use elbo_core::hand_table::HandError;
use elbo_core::sample::Sample;
use elbo_core::text::normal;

/// Where labels come from (`--label-from`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelSource {
    /// The directory of an image; images directly in the source have no label.
    Parent,
    /// No labels: labels in the source are ignored.
    None,
    /// A column of a Parquet file or list; the extension of a tar's members, or a field of its .json members.
    Column(String),
    /// A table with the columns `key` and `label`; images that it does not name have no label.
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
    /// The file can't be read, or a row is wrong.
    #[error("{0}; --label-from takes a table with the columns key,label, or 'parent'")]
    File(#[from] HandError),
    /// The file names none of the images.
    #[error(
        "the label file {path}: it names none of the images; a key is a path relative to --images, like '{example}'"
    )]
    NoMatch {
        /// The file.
        path: PathBuf,
        /// A key of the dataset.
        example: String,
    },
    /// A row matches two images.
    #[error(
        "the label file {path}, line {line}: its key matches two images, '{first}' and '{second}', whose names differ only \
         in their Unicode forms: rename one of them"
    )]
    TwoImages {
        /// The file.
        path: PathBuf,
        /// 1-based line.
        line: u64,
        /// The image found first.
        first: String,
        /// The other one.
        second: String,
    },
}

/// Labels by key, which replace those of the source.
#[derive(Debug)]
pub(super) enum Labels {
    Parent,
    None,
    File(Box<LabelFile>),
}

impl LabelSource {
    /// Reads the labels; `None` if they come from the source itself.
    pub(super) fn open(&self) -> Result<Option<Labels>, LabelError> {
        Ok(match self {
            Self::Parent => Some(Labels::Parent),
            Self::None => Some(Labels::None),
            Self::Column(_) => None,
            Self::File(path) => Some(Labels::File(Box::new(LabelFile::read(path)?))),
        })
    }
}

impl Labels {
    /// The label of a key.
    pub(super) fn of(&mut self, key: &str) -> Option<String> {
        match self {
            Self::Parent => {
                let directory = key.rsplit_once('/')?.0;
                let name = directory.rsplit_once('/').map_or(directory, |(_, name)| name);
                Some(normal(name).into_owned())
            }
            Self::None => None,
            Self::File(file) => file.of(key),
        }
    }

    /// Rows of the label file that match none of the images so far.
    pub(super) fn unmatched_rows(&self) -> Unmatched {
        match self {
            Self::File(file) => file.unmatched_rows(),
            _ => Unmatched::default(),
        }
    }

    /// Images that have no row in the label file.
    pub(super) fn unnamed_images(&self) -> Unmatched {
        match self {
            Self::File(file) => file.unnamed_images().clone(),
            _ => Unmatched::default(),
        }
    }

    /// Forgets the images, because the listing starts again.
    pub(super) fn clear(&mut self) {
        if let Self::File(file) = self {
            file.clear();
        }
    }

    /// Fails if a row of a label file matches two images.
    pub(super) fn check_rows(&self) -> Result<(), LabelError> {
        match self {
            Self::File(file) => file.check_rows(),
            _ => Ok(()),
        }
    }

    /// Fails if a label file matches none of the images, of which `example` is one. Warns about images without a row.
    pub(super) fn check_used(&self, example: &str) -> Result<(), LabelError> {
        let Self::File(file) = self else { return Ok(()) };
        file.check_match(example)?;
        let images = self.unnamed_images();
        if images.count > 0 {
            tracing::warn!(
                "the label file {}: {} images have no row in it and therefore no label, like {}",
                file.path().display(),
                images.count,
                images
            );
        }
        Ok(())
    }
}

/// The labels that are not a class, with the number of samples that have them and the key of one.
///
/// Such samples would not count in the accuracy, so a job refuses them before it starts.
#[derive(Clone, Debug, Default)]
pub struct UnknownLabels(BTreeMap<String, (u64, String)>);

impl UnknownLabels {
    /// Maximum number of distinct labels kept; that is enough for an error.
    const KEPT: usize = 1000;

    /// Checks a sample's label.
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

    /// Removes all labels.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
