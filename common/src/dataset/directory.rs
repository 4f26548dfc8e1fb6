//! The images below a directory or a URL prefix.

use std::path::{Path as FsPath, PathBuf};
use std::time::UNIX_EPOCH;

use futures::TryStreamExt;
use object_store::ObjectStore;
use url::Url;

use super::{DatasetError, EXTENSIONS, Found};
use crate::store::{Store, StoreError};

pub(super) fn is_image(name: &str) -> bool {
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

pub(super) fn list_local(root: &FsPath) -> Result<(Vec<Found>, u64), DatasetError> {
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
                let etag = metadata.as_ref().and_then(local_etag);
                found.push(Found { key, location, size, etag, ..Found::default() });
            } else {
                others += 1;
            }
        }
    }
    Ok((found, others))
}

/// Modification time in nanoseconds and size, in hexadecimal: changes with the content, survives a copy that keeps times.
pub(super) fn local_etag(metadata: &std::fs::Metadata) -> Option<String> {
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{:x}-{:x}", modified.as_nanos(), metadata.len()))
}

pub(super) async fn list_store(store: &Store, base: &Url) -> Result<(Vec<Found>, u64), DatasetError> {
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
            let (location, size, etag) = (url_of(base, &key), object.size, object.e_tag);
            found.push(Found { key, location, size, etag, ..Found::default() });
        } else {
            others += 1;
        }
    }
    Ok((found, others))
}

/// The URL of an object below `base`, without credentials: workers bring their own.
pub(super) fn url_of(base: &Url, key: &str) -> String {
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
