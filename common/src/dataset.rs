//! Listing the images of a dataset and reading one of them.
//!
//! A listing is made once per job, before anything is computed, and becomes the manifest. So it is strict: whatever can't
//! be listed is an error now rather than images silently missing in the end. What an image holds is not looked at; a file
//! that is no image is listed, and quarantined when it is read. A source is a [`directory`] or a [`file_list`].

mod directory;
mod file_list;
mod label;
mod reader;

use std::path::PathBuf;

pub use label::{LabelError, LabelSource, unknown_labels};
pub use reader::{Reader, read_object};

use self::directory::is_image;
use crate::class::Classes;
use crate::ids::SampleId;
use crate::manifest::Sample;
use crate::store::{Location, Store, StoreError};

/// Extensions of the files that are taken for images, in lowercase.
pub const EXTENSIONS: [&str; 10] = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"];

/// A dataset that can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// There is nothing at the source.
    #[error(
        "listing the images: {0} does not exist; give an existing directory, a prefix URL like s3://bucket/images, or a .csv \
         or .txt list of images"
    )]
    Missing(String),
    /// The source is one file.
    #[error(
        "listing the images: {0} is a file; give the directory that holds the images, or a .csv or .txt list of them"
    )]
    IsFile(String),
    /// No file of the source is an image.
    #[error(
        "listing the images: no image in {source_name}, where {others} other files were seen; images are files ending in \
         {}",
        EXTENSIONS.map(|e| format!(".{e}")).join(" ")
    )]
    NoImages {
        /// The source.
        source_name: String,
        /// How many files that are no images were seen.
        others: u64,
    },
    /// A directory or file of the source can't be read.
    #[error("listing the images: reading {path}: {source}; make it readable, or move it out of the dataset")]
    Unreadable {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file name that is not Unicode can't become a key.
    #[error("listing the images: the name of {0} is not UTF-8; rename it")]
    Name(PathBuf),
    /// A directory contains itself by way of a symbolic link.
    #[error("listing the images: {0} links to a directory that contains it; remove the link")]
    Cycle(PathBuf),
    /// A list of images can't be used as a whole.
    #[error("listing the images: the list {list} {problem}")]
    List {
        /// The list.
        list: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A line of a list can't be used.
    #[error("listing the images: {list}, line {line}: {problem}")]
    Line {
        /// The list.
        list: String,
        /// 1-based line.
        line: u64,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A label that is none of the sample's captions.
    #[error(
        "the label of {key} is '{label}', which is none of its captions: give the right caption, or its position counted \
         from 0"
    )]
    NotACaption {
        /// The sample.
        key: String,
        /// Its label.
        label: String,
    },
    /// The object store can't be listed.
    #[error("listing the images: {0}")]
    Store(#[from] StoreError),
    /// The labels can't be used.
    #[error(transparent)]
    Label(#[from] LabelError),
}

/// An image as found, before it is numbered and labelled.
#[derive(Debug, Default)]
struct Found {
    key: String,
    location: String,
    size: u64,
    etag: Option<String>,
    label: Option<String>,
    candidates: Vec<String>,
    pair: Option<String>,
}

/// What a listing takes in beside the images.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListOptions<'a> {
    /// Where labels come from, if not from the list.
    pub label_from: Option<&'a LabelSource>,
    /// The column of a list with every sample's captions, or several columns with commas between them.
    pub candidates: Option<&'a str>,
    /// Only the first so many samples.
    pub limit: Option<u64>,
}

/// Whether a source is a list of images: a `.csv` or `.txt` file.
pub fn is_list(source: &str) -> bool {
    let Ok(location) = Location::parse(source) else { return false };
    let name = match &location {
        Location::Local(path) if path.is_dir() => return false,
        Location::Local(path) => path.to_string_lossy().to_ascii_lowercase(),
        Location::Remote(url) => url.path().to_ascii_lowercase(),
    };
    [".csv", ".txt"].iter().any(|extension| name.ends_with(extension))
}

/// Lists the images of `source`: those below a local directory or a prefix URL, sorted by key, or those a list names, in
/// its order.
///
/// In a directory, hidden files and directories (whose names start with a dot) are skipped and symbolic links are followed.
pub async fn list(source: &str, options: &ListOptions<'_>) -> Result<Vec<Sample>, DatasetError> {
    let location = Location::parse(source)?;
    let mut found = match is_list(source) {
        true => file_list::list(&location, options).await?,
        false => list_below(&location).await?,
    };
    let labels = options.label_from.map(|from| from.labels(found.iter().map(|f| f.key.as_str()))).transpose()?;
    found.truncate(options.limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)));
    let samples = (0..).zip(found).map(|(id, found)| {
        let label = match &labels {
            Some(labels) => labels.of(&found.key),
            None => found.label,
        };
        let Found { key, location, size, etag, candidates, pair, .. } = found;
        let label = label.map(|label| caption_of(&candidates, label)).transpose();
        let label = label.map_err(|label| DatasetError::NotACaption { key: key.clone(), label })?;
        Ok(Sample { id: SampleId(id), key, location, size, etag, label, candidates, pair })
    });
    samples.collect()
}

/// The images below a directory or a URL prefix, sorted by key.
async fn list_below(location: &Location) -> Result<Vec<Found>, DatasetError> {
    let (mut found, others) = match location {
        // Listing comes before everything else in a job: nobody waits for this thread.
        Location::Local(root) => directory::list_local(root)?,
        Location::Remote(url) => directory::list_store(&Store::open(location)?, url).await?,
    };
    if found.is_empty() {
        return Err(match location {
            // A store lists nothing below an object.
            Location::Remote(url) if is_image(url.path()) => DatasetError::IsFile(location.to_string()),
            _ => DatasetError::NoImages { source_name: location.to_string(), others },
        });
    }
    found.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

/// The caption a label means, by its text or its position; the label itself where there are no captions, or as an error
/// where it is none of them.
fn caption_of(captions: &[String], label: String) -> Result<String, String> {
    if captions.is_empty() {
        return Ok(label);
    }
    let classes = Classes::of_captions(captions);
    classes.with_label(&label).map(|class| classes.name(class).to_owned()).ok_or(label)
}

#[cfg(test)]
mod tests;
