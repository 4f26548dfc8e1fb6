//! The samples of a tar shard, as WebDataset lays them out: members whose names agree up to the first dot are one sample.
//!
//! Headers are read, and members with labels or captions; images are passed over. A worker reads an image by its offset.
//!
//! | member | means |
//! |---|---|
//! | `NAME.jpg`, `.png`, `.webp`, ... | the image; where there are several, one whose whole extension is an image's |
//! | `NAME.cls` | the label: a class's name or number |
//! | `NAME.json` | an object, whose `label` is the label where there is no `.cls` |
//! | `NAME.txt` | the label where there is neither |

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde_json::Value;
use tar::Archive;
use tokio::runtime::Handle;

use super::walk::{File, Kind};
use super::{DatasetError, Found, ListOptions, Reader, caption_of, check_captions};
use crate::files;
use crate::manifest::Part;
use crate::store::{Location, Store, StoreError, retry};

/// The largest member with a label or captions that is read.
const LARGEST_TEXT: u64 = 1 << 20;

/// What is read of a remote shard at once: a header, and with it the small members that follow.
const FIRST_WINDOW: u64 = 16 << 10;
/// Where one window follows the other, members are small, and fewer larger requests are better.
const LARGEST_WINDOW: u64 = 1 << 20;

/// The samples of a shard.
pub(super) async fn list(reader: &Reader, file: &File, options: &ListOptions<'_>) -> Result<Vec<Found>, DatasetError> {
    let wanted = Wanted::new(options);
    let (shard, size) = (file.clone(), file.size);
    let indexing = match Location::parse(&file.location)? {
        Location::Local(path) => tokio::task::spawn_blocking(move || {
            let unreadable = |source| DatasetError::Unreadable { path: path.clone(), source };
            index(&shard, BufReader::new(files::open(&path).map_err(unreadable)?), size, &wanted)
        }),
        Location::Remote(url) => {
            let (store, path) = reader.locate(&url)?;
            let ranges = Ranges::new(&store, path, size);
            tokio::task::spawn_blocking(move || index(&shard, ranges, size, &wanted))
        }
    };
    let crashed = |_| file.wrong("made the tar reader crash: leave it out, and report this");
    indexing.await.map_err(crashed)?
}

/// The texts beside an image that are of interest.
#[derive(Debug)]
struct Wanted {
    labels: bool,
    /// The extension or JSON field with the label, where one is named.
    label: Option<String>,
    /// The extension or JSON field with captions.
    captions: Option<String>,
}

impl Wanted {
    fn new(options: &ListOptions<'_>) -> Self {
        Self {
            labels: options.takes_labels(),
            label: options.label_column().map(str::to_owned),
            captions: options.candidates.map(str::to_owned),
        }
    }

    fn reads(&self, extension: &str) -> bool {
        let named = |name: &Option<String>| name.as_deref() == Some(extension);
        let usual = ["cls", "json", "txt"].contains(&extension);
        named(&self.captions)
            || (self.captions.is_some() && extension == "json")
            || (self.labels && (usual || named(&self.label)))
    }
}

/// The members of one sample.
#[derive(Debug, Default)]
struct Group {
    name: String,
    image: Option<(String, u64, u64)>,
    /// By extension.
    texts: BTreeMap<String, String>,
}

/// Reads a shard's headers.
fn index(shard: &File, source: impl Read + Seek, size: u64, wanted: &Wanted) -> Result<Vec<Found>, DatasetError> {
    let mut archive = Archive::new(source);
    let failed = |error: io::Error| unreadable(shard, error);
    let (mut found, mut group, mut end) = (Vec::new(), Group::default(), 0);
    for entry in archive.entries_with_seek().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let (offset, length) = (entry.raw_file_position(), entry.size());
        let path = String::from_utf8(entry.path_bytes().into_owned());
        let path = path.map_err(|e| shard.wrong(format!("has a member whose name is not UTF-8 ({e}): rename it")))?;
        end = offset.saturating_add(length.next_multiple_of(512));
        if offset.saturating_add(length) > size {
            return Err(shard.wrong(format!(
                "ends in the middle of its member {path}: it was cut off; fetch it again, or leave it out"
            )));
        }
        let path = path.trim_start_matches("./").to_owned();
        let (directory, file) =
            path.rsplit_once('/').map_or(("", path.as_str()), |(directory, file)| (directory, file));
        if !entry.header().entry_type().is_file() || file.starts_with('.') || file.is_empty() {
            continue;
        }
        let (stem, extension) = file.split_once('.').unwrap_or((file, ""));
        let name = if directory.is_empty() { stem.to_owned() } else { format!("{directory}/{stem}") };
        if name != group.name {
            found.extend(std::mem::take(&mut group).finish(shard, wanted)?);
            group.name = name;
        }
        let extension = extension.to_ascii_lowercase();
        if Kind::of(file) == Some(Kind::Image) {
            let better = group.image.as_ref().is_none_or(|(other, ..)| is_double(other) && !is_double(file));
            if better {
                group.image = Some((path, offset, length));
            }
        } else if wanted.reads(&extension) {
            if length > LARGEST_TEXT {
                return Err(
                    shard.wrong(format!("has a member {path} of {length} bytes, too large for a label or captions"))
                );
            }
            let mut text = String::new();
            entry.read_to_string(&mut text).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => {
                    shard.wrong(format!("has a member {path} that is not UTF-8: save it as UTF-8"))
                }
                _ => failed(error),
            })?;
            group.texts.insert(extension, text);
        }
    }
    found.extend(group.finish(shard, wanted)?);
    // Two blocks of zeros end an archive; some programs write only one.
    if end.saturating_add(512) > size {
        return Err(shard.wrong("has no end-of-archive mark: it was cut off; fetch it again, or leave it out"));
    }
    Ok(found)
}

/// Whether a file has an extension before its last one, like a mask's `.seg.png`.
fn is_double(file: &str) -> bool {
    file.rsplit('/').next().unwrap_or_default().matches('.').count() > 1
}

fn unreadable(shard: &File, error: io::Error) -> DatasetError {
    match error.downcast::<StoreError>() {
        Ok(error) => error.into(),
        Err(error) => shard.wrong(format!("is no tar archive, or damaged ({error}): fetch it again, or leave it out")),
    }
}

impl Group {
    /// The sample, if there is an image among the members.
    fn finish(self, shard: &File, wanted: &Wanted) -> Result<Option<Found>, DatasetError> {
        let Some((path, offset, length)) = &self.image else { return Ok(None) };
        let wrong = |problem: String| shard.wrong(format!("has a sample {} that can't be used: {problem}", self.name));
        let json = self.texts.get("json").map(|text| serde_json::from_str::<Value>(text));
        let json = json.transpose().map_err(|e| wrong(format!("its .json is not JSON ({e})")))?.unwrap_or_default();
        let candidates = match &wanted.captions {
            None => Vec::new(),
            Some(name) => {
                let captions = match self.texts.get(name) {
                    Some(text) if name != "json" => {
                        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
                    }
                    _ => json_captions(&json[name]).ok_or_else(|| {
                        wrong(format!("it has neither a .{name} nor a list of captions in its .json's field '{name}'"))
                    })?,
                };
                check_captions(&captions).map_err(wrong)?;
                captions
            }
        };
        let label = if wanted.labels { self.label(wanted, &json) } else { None };
        let label = label.map(|label| caption_of(&candidates, label)).transpose();
        let label = label.map_err(|label| wrong(format!("its label '{label}' is none of its captions")))?;
        Ok(Some(Found {
            key: format!("{}/{path}", shard.key),
            location: shard.location.clone(),
            part: Some(Part::Member { offset: *offset }),
            size: *length,
            etag: shard.etag.clone(),
            label,
            candidates,
            pair: None,
        }))
    }

    fn label(&self, wanted: &Wanted, json: &Value) -> Option<String> {
        let text = |extension: &str| {
            let text = self.texts.get(extension).filter(|_| extension != "json")?.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        match &wanted.label {
            Some(name) => text(name).or_else(|| json_text(&json[name])),
            None => text("cls").or_else(|| json_text(&json["label"])).or_else(|| text("txt")),
        }
    }
}

fn json_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn json_captions(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|caption| caption.as_str().map(str::to_owned)).collect()
}

/// A remote file to read and seek in, for a thread that may block.
struct Ranges {
    handle: Handle,
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// What it is called in messages.
    name: String,
    size: u64,
    position: u64,
    /// Bytes at hand, and the position of the first.
    window: (u64, Bytes),
    window_size: u64,
}

impl Ranges {
    fn new(store: &Store, path: Path, size: u64) -> Self {
        let (handle, window) = (Handle::current(), (0, Bytes::new()));
        let (store, name) = (store.inner(), store.location().below(path.as_ref()));
        Self { handle, store, path, name, size, position: 0, window, window_size: FIRST_WINDOW }
    }

    /// The bytes at hand from the current position on; none at the end.
    fn ahead(&mut self) -> io::Result<Bytes> {
        let (start, bytes) = &self.window;
        let end = start + bytes.len() as u64;
        if (*start..end).contains(&self.position) {
            return Ok(bytes.slice((self.position - start) as usize..));
        }
        if self.position >= self.size {
            return Ok(Bytes::new());
        }
        let follows = self.position == end && end > 0;
        self.window_size = if follows { (2 * self.window_size).min(LARGEST_WINDOW) } else { FIRST_WINDOW };
        let range = self.position..self.position.saturating_add(self.window_size).min(self.size);
        let get = || self.store.get_range(&self.path, range.clone());
        let bytes = self.handle.block_on(retry::run("reading", &self.name, get)).map_err(io::Error::other)?;
        self.window = (self.position, bytes.clone());
        Ok(bytes)
    }
}

impl Read for Ranges {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let ahead = self.ahead()?;
        let count = ahead.len().min(target.len());
        target[..count].copy_from_slice(&ahead[..count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Ranges {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| io::Error::other("the archive speaks of a place outside of it"))?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests;
