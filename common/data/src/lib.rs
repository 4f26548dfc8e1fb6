//! Lists the images of a dataset and reads single images.
//!
//! A listing is made once per job, before anything is computed, and becomes the manifest. It is strict: anything that can't
//! be listed is an error now, so that no image is silently missing in the end. The content of an image is not checked; a file
//! that is not an image is listed, and quarantined when it is read.
//!
//! A [`pattern`] names files and directories, and a [`walk`] finds their files. Files are images, or contain images: tar
//! shards ([`webdataset`]), of which only headers, labels and captions are read, and Parquet files ([`rows`]), of which only
//! the columns without images are read. A [`file_list`] names its images itself. All found images go through the
//! [`Collector`], one sample at a time, so that listing a million images needs no more memory than listing a thousand.

mod account;
pub mod budget;
mod collector;
mod file_list;
pub mod given;
mod label;
pub mod manifest;
mod origin;
mod pattern;
mod reader;
mod rows;
mod walk;
mod webdataset;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt};

pub use self::account::{Account, PassedOver, Reason};
use self::collector::Collector;
pub use self::collector::{Found, SampleSink};
pub use self::label::{LabelError, LabelSource, UnknownLabels};
pub use self::origin::Origin;
use self::pattern::Pattern;
pub use self::pattern::canonical;
pub use self::reader::{Image, ReadError, Reader, read_object};
use self::walk::{Intake, Kind, Order, WalkError};
use elbo_core::class::Classes;
use elbo_core::hand_table::HandError;
use elbo_core::text::{excerpt, normal};
use elbo_store::table::TableError;
use elbo_store::{Location, StoreError};

/// Tar and Parquet files listed at a time.
const CONTAINERS: usize = 16;

/// Extensions of image files, in lowercase.
pub const EXTENSIONS: [&str; 12] =
    ["png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"];

/// A dataset that can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The source does not exist.
    #[error(
        "listing the images: {0} does not exist; give an existing directory, a prefix URL like s3://bucket/images, or a .csv, \
         .tsv or .txt list of images"
    )]
    Missing(String),
    /// The source is one file.
    #[error(
        "listing the images: {0} is a file; give the directory that holds the images, or a .csv, .tsv or .txt list of them"
    )]
    IsFile(String),
    /// The source is a pipe, device or similar, which is not read.
    #[error(
        "listing the images: {path} is {what}, which can't be a source: give a directory, a regular file, or a .csv, \
         .tsv or .txt list of images"
    )]
    Irregular {
        /// Where.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The source has no file that is an image or may contain images.
    #[error(
        "listing the images: no image in {source_name}{}; images are files ending in {}, or lie in .tar or .parquet files",
        seen(.passed_over),
        EXTENSIONS.map(|e| format!(".{e}")).join(" ")
    )]
    NoImages {
        /// The source.
        source_name: String,
        /// What was passed over there.
        passed_over: Account,
    },
    /// The files of the source contain no image.
    #[error(
        "listing the images: there is no image in {source_name}{}: nothing would be labelled; name a source with images",
        seen(.passed_over)
    )]
    Empty {
        /// The source.
        source_name: String,
        /// What was passed over there.
        passed_over: Account,
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
    /// A directory contains itself through a symbolic link.
    #[error("listing the images: {0} links to a directory that contains it; remove the link")]
    Cycle(PathBuf),
    /// A list of images can't be read.
    #[error("listing the images: {0}")]
    Given(#[from] HandError),
    /// A list of images can't be used as a whole.
    #[error("listing the images: the list {list} {problem}")]
    List {
        /// The list.
        list: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// A line of a list can't be used.
    #[error("listing the images: {list}, line {line}: {problem}")]
    Line {
        /// The list.
        list: String,
        /// 1-based line.
        line: u64,
        /// The problem and its remedy.
        problem: String,
    },
    /// An invalid pattern.
    #[error("--images {pattern}: {problem}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// The source has files of several kinds.
    #[error(
        "listing the images: {source_name} holds {first} and {other}: select one kind with a pattern, like \
         '{source_name}/**/*.{extension}'"
    )]
    Mixed {
        /// The source.
        source_name: String,
        /// The kind seen first, and a file of it.
        first: String,
        /// The other kind, and a file of it.
        other: String,
        /// The extension of a file of the first kind.
        extension: String,
    },
    /// A tar or Parquet file that can't be used as a whole.
    #[error("listing the images: {file} {problem}")]
    Container {
        /// The file.
        file: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// Two samples with the same key.
    #[error("listing the images: there are two images named {key}, but keys must be unique: {second} is the second")]
    Duplicate {
        /// The key.
        key: String,
        /// Location of the second one.
        second: String,
    },
    /// The server can't list its files.
    #[error(
        "listing the images: {url} can't be listed ({reason}): name the files, as in 'https://host/shard-{{000..099}}.tar', \
         or give a .txt, .csv or .tsv list of images"
    )]
    Unlistable {
        /// The directory.
        url: String,
        /// The server's answer.
        reason: String,
    },
    /// Image files have no captions.
    #[error(
        "listing the images: {source_name} holds image files, which have no '{candidates}': with --candidates give \
         --images a .csv or .tsv list, .parquet files or .tar shards"
    )]
    NoCaptions {
        /// The source.
        source_name: String,
        /// The value of `--candidates`.
        candidates: String,
    },
    /// The manifest can't be made from the listing.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A label that is not one of the sample's captions.
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

/// What was passed over where there was no image, in parentheses.
fn seen(passed_over: &Account) -> String {
    if passed_over.is_empty() { String::new() } else { format!(" (passed over, {passed_over})") }
}

/// The result of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Number of samples.
    pub samples: u64,
    /// What was passed over.
    pub passed_over: Account,
}

/// Options of a listing.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListOptions<'a> {
    /// Where labels come from, if not from the source itself.
    pub label_from: Option<&'a LabelSource>,
    /// Where the samples' captions are: the column of a list or Parquet file, or several with commas between them; the
    /// extension of a tar's members, or a field of its .json members.
    pub candidates: Option<&'a str>,
    /// The column of Parquet files with the images, if it can't be detected.
    pub image_column: Option<&'a str>,
    /// The job's classes. A Parquet file's own class names are used as labels only if they are among these, and its class
    /// numbers otherwise.
    pub classes: Option<&'a Classes>,
    /// The maximum number of samples: the first ones are taken.
    pub limit: Option<u64>,
    /// Origins that a list or Parquet file from the network may name besides its own.
    pub origins: &'a [Origin],
}

impl<'a> ListOptions<'a> {
    /// The column or field with the labels, if one is named.
    fn label_column(&self) -> Option<&'a str> {
        match self.label_from {
            Some(LabelSource::Column(name)) => Some(name),
            _ => None,
        }
    }

    /// Whether the labels in the source are used.
    fn takes_labels(&self) -> bool {
        matches!(self.label_from, None | Some(LabelSource::Column(_)))
    }
}

/// Whether a source is a list of images: a `.csv`, `.tsv` or `.txt` file.
pub fn is_list(source: &str) -> bool {
    let Ok(location) = Location::parse(source) else { return false };
    let name = match &location {
        Location::Local(path) if path.is_dir() => return false,
        Location::Local(path) => path.to_string_lossy().to_ascii_lowercase(),
        Location::Remote(url) => url.path().to_ascii_lowercase(),
    };
    [".csv", ".tsv", ".txt"].iter().any(|extension| name.ends_with(extension))
}

/// Lists the images of `source` into `sink`. Returns how many there are, and what was passed over.
///
/// Images below a directory or a prefix URL are sorted by key. Several files or patterns are listed in the given order.
/// Images in a tar shard, a Parquet file or a list keep its order. Hidden files and directories (whose names start with a
/// dot, or that operating systems leave behind) are passed over. Symbolic links in a directory are followed.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// # let directory = tempfile::tempdir()?;
/// # let photos = directory.path();
/// # std::fs::create_dir(photos.join("cats"))?;
/// std::fs::write(photos.join("cats/tom.png"), b"an image, which is not looked at yet")?;
/// let mut samples = Vec::new();
/// let options = elbo_data::ListOptions::default();
/// elbo_data::list(&photos.to_string_lossy(), &options, &mut samples).await?;
/// assert_eq!(samples[0].key, "cats/tom.png");
/// # Ok::<_, Box<dyn std::error::Error>>(()) })?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub async fn list(source: &str, options: &ListOptions<'_>, sink: &mut dyn SampleSink) -> Result<Listed, DatasetError> {
    let listed = list_all(source, options, sink).await?;
    if listed.samples == 0 && options.limit != Some(0) {
        let source_name = Location::parse(source).map_or_else(|_| source.to_owned(), |location| location.to_string());
        return Err(DatasetError::Empty { source_name, passed_over: listed.passed_over });
    }
    Ok(listed)
}

async fn list_all(source: &str, options: &ListOptions<'_>, sink: &mut dyn SampleSink) -> Result<Listed, DatasetError> {
    let mut collector = Collector::new(options, sink)?;
    let reader = Reader::new();
    if is_list(source) {
        file_list::list(&Location::parse(source)?, options, &reader, &mut collector).await?;
        return collector.finish();
    }
    let pattern = Pattern::parse(source)?;
    let mut intake = Intake::new(pattern.base.to_string(), &mut collector);
    if pattern.targets.len() > 1 {
        intake.expect_duplicates();
    }
    let walked = match walk_all(&pattern, &reader, Order::AsListed, &mut intake).await {
        Err(WalkError::OutOfOrder) => {
            intake.clear();
            walk_all(&pattern, &reader, Order::Sorted, &mut intake).await
        }
        walked => walked,
    };
    walked.map_err(|error| match error {
        WalkError::Dataset(error) => error,
        WalkError::OutOfOrder => {
            DatasetError::Unlistable { url: pattern.base.to_string(), reason: "its objects can't be sorted".into() }
        }
    })?;
    let (kind, files) = intake.finish()?;
    if let (Kind::Image, Some(candidates)) = (kind, options.candidates) {
        return Err(DatasetError::NoCaptions {
            source_name: pattern.base.to_string(),
            candidates: candidates.to_owned(),
        });
    }
    let mut looked_into = futures::stream::iter(files)
        .map(|file| {
            let reader = &reader;
            async move {
                match kind {
                    Kind::Table => rows::list(reader, &file, options).await,
                    Kind::Image | Kind::Shard => webdataset::list(reader, &file, options).await,
                }
            }
        })
        .buffered(CONTAINERS);
    while let Some(Contents { found, passed_over }) = looked_into.try_next().await? {
        collector.pass_over(passed_over);
        for sample in found {
            if !collector.add(sample)? {
                return collector.finish();
            }
        }
    }
    drop(looked_into);
    collector.finish()
}

/// The contents of a tar or Parquet file.
#[derive(Debug, Default, PartialEq, Eq)]
struct Contents {
    found: Vec<Found>,
    passed_over: Account,
}

/// Walks all targets.
async fn walk_all(
    pattern: &Pattern,
    reader: &Reader,
    order: Order,
    intake: &mut Intake<'_, '_>,
) -> Result<(), WalkError> {
    for target in &pattern.targets {
        walk::walk(&pattern.base, target, reader, order, intake).await?;
    }
    Ok(())
}

/// The caption that a label refers to, by its text or its position. Without captions, returns the label itself. If the label
/// is not one of the captions, returns it as an error.
fn caption_of(captions: &[String], label: String) -> Result<String, String> {
    if captions.is_empty() {
        return Ok(label);
    }
    let classes = Classes::of_captions(captions);
    classes.with_label(&label).map(|class| classes.name(class).to_owned()).ok_or(label)
}

/// Refuses captions that are missing, empty or equal.
fn check_captions(captions: &[String]) -> Result<(), String> {
    if captions.is_empty() {
        return Err("there is no caption: give every image at least one, or leave the image out".into());
    }
    let mut first: HashMap<Cow<'_, str>, usize> = HashMap::new();
    for (i, caption) in captions.iter().enumerate() {
        if caption.trim().is_empty() {
            return Err(format!("caption {i} is empty: positions count from 0 without gaps"));
        }
        // Surrounding spaces and the Unicode form make no difference to a text encoder.
        let at = *first.entry(normal(caption.trim())).or_insert(i);
        if at != i {
            return Err(format!(
                "the caption '{}' is there twice, at the positions {at} and {i}: captions of one image must differ",
                excerpt(caption)
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
