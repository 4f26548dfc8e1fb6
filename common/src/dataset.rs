//! Listing the images of a dataset and reading one of them.
//!
//! A listing is made once per job, before anything is computed, and becomes the manifest. So it is strict: whatever can't
//! be listed is an error now rather than images silently missing in the end. What an image holds is not looked at; a file
//! that is no image is listed, and quarantined when it is read.

mod label;
mod reader;

use std::path::{Path as FsPath, PathBuf};
use std::time::UNIX_EPOCH;

use futures::TryStreamExt;
use object_store::ObjectStore;
use url::Url;

pub use label::{LabelError, LabelSource, unknown_labels};
pub use reader::{Reader, read_object};

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
        "listing the images: {0} does not exist; give an existing directory or a prefix URL like s3://bucket/images"
    )]
    Missing(String),
    /// The source is one file.
    #[error("listing the images: {0} is a file; give the directory that holds the images")]
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
    /// The object store can't be listed.
    #[error("listing the images: {0}")]
    Store(#[from] StoreError),
    /// The labels can't be used.
    #[error(transparent)]
    Label(#[from] LabelError),
}

/// An image as found, before it is numbered and labelled.
#[derive(Debug)]
struct Found {
    key: String,
    location: String,
    size: u64,
    etag: Option<String>,
}

/// Lists the images below `source`, a local directory or a prefix URL, sorted by key.
///
/// Hidden files and directories (whose names start with a dot) are skipped. Symbolic links are followed. `limit` keeps the
/// first so many samples of the sorted listing.
pub async fn list(
    source: &str,
    label_from: Option<&LabelSource>,
    limit: Option<u64>,
) -> Result<Vec<Sample>, DatasetError> {
    let location = Location::parse(source)?;
    let (mut found, others) = match &location {
        // Listing comes before everything else in a job: nobody waits for this thread.
        Location::Local(root) => list_local(root)?,
        Location::Remote(url) => list_store(&Store::open(&location)?, url).await?,
    };
    if found.is_empty() {
        return Err(match &location {
            // A store lists nothing below an object.
            Location::Remote(url) if is_image(url.path()) => DatasetError::IsFile(location.to_string()),
            _ => DatasetError::NoImages { source_name: location.to_string(), others },
        });
    }
    found.sort_by(|a, b| a.key.cmp(&b.key));
    let labels = label_from.map(|from| from.labels(found.iter().map(|f| f.key.as_str()))).transpose()?;
    found.truncate(limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)));
    let samples = (0..).zip(found).map(|(id, Found { key, location, size, etag })| {
        let label = labels.as_ref().and_then(|labels| labels.of(&key));
        Sample { id: SampleId(id), key, location, size, etag, label }
    });
    Ok(samples.collect())
}

fn is_image(name: &str) -> bool {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

fn is_hidden(name: &str) -> bool {
    name.starts_with('.')
}

/// A directory to list, with the real paths of the directories above it.
struct Directory {
    path: PathBuf,
    key: String,
    above: Vec<PathBuf>,
}

fn list_local(root: &FsPath) -> Result<(Vec<Found>, u64), DatasetError> {
    let unreadable = |source| DatasetError::Unreadable { path: root.to_owned(), source };
    match std::fs::metadata(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DatasetError::Missing(root.display().to_string()));
        }
        Err(e) => return Err(unreadable(e)),
        Ok(metadata) if !metadata.is_dir() => return Err(DatasetError::IsFile(root.display().to_string())),
        Ok(_) => {}
    }
    let (mut found, mut others) = (Vec::new(), 0);
    let mut pending = vec![Directory { path: root.to_owned(), key: String::new(), above: Vec::new() }];
    while let Some(mut directory) = pending.pop() {
        let unreadable = |source| DatasetError::Unreadable { path: directory.path.clone(), source };
        let real = directory.path.canonicalize().map_err(unreadable)?;
        if directory.above.contains(&real) {
            return Err(DatasetError::Cycle(directory.path));
        }
        directory.above.push(real);
        for entry in std::fs::read_dir(&directory.path).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                return Err(DatasetError::Name(path));
            };
            if is_hidden(name) {
                continue;
            }
            let key = if directory.key.is_empty() { name.to_owned() } else { format!("{}/{name}", directory.key) };
            // A link to nowhere is listed like any bad image, to be quarantined when it is read.
            let metadata = std::fs::metadata(&path).ok();
            if metadata.as_ref().is_some_and(std::fs::Metadata::is_dir) {
                pending.push(Directory { path, key, above: directory.above.clone() });
            } else if is_image(name) {
                let Some(location) = path.to_str().map(str::to_owned) else { return Err(DatasetError::Name(path)) };
                let size = metadata.as_ref().map_or(0, std::fs::Metadata::len);
                found.push(Found { key, location, size, etag: metadata.as_ref().and_then(local_etag) });
            } else {
                others += 1;
            }
        }
    }
    Ok((found, others))
}

/// Modification time in nanoseconds and size, in hexadecimal: changes with the content, survives a copy that keeps times.
fn local_etag(metadata: &std::fs::Metadata) -> Option<String> {
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{:x}-{:x}", modified.as_nanos(), metadata.len()))
}

async fn list_store(store: &Store, base: &Url) -> Result<(Vec<Found>, u64), DatasetError> {
    let failed = |source| StoreError::Object { action: "listing", path: store.location().to_string(), source };
    let (mut found, mut others) = (Vec::new(), 0);
    let inner = store.inner();
    let mut objects = inner.list(None);
    while let Some(object) = objects.try_next().await.map_err(failed)? {
        let key = object.location.to_string();
        if key.split('/').any(is_hidden) {
            continue;
        }
        if is_image(&key) {
            found.push(Found { location: url_of(base, &key), key, size: object.size, etag: object.e_tag });
        } else {
            others += 1;
        }
    }
    Ok((found, others))
}

/// The URL of an object below `base`, without credentials: workers bring their own.
fn url_of(base: &Url, key: &str) -> String {
    let mut url = base.clone();
    let _ = url.set_password(None);
    if !url.scheme().starts_with("abfs") {
        // In abfs://container@account the user is the container.
        let _ = url.set_username("");
    }
    url.set_query(None);
    url.set_fragment(None);
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(key.split('/'));
    }
    url.to_string()
}

#[cfg(test)]
mod tests;
