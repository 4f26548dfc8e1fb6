//! The samples of a tar shard, in WebDataset's layout: members whose names are equal up to the first dot are one sample.
//!
//! Listing reads the headers, and the members with labels or captions, but not the images. A worker reads an image by its
//! offset.
//!
//! | member | means |
//! |---|---|
//! | `NAME.jpg`, `.png`, `.webp`, ... | the image; where there are several, the one whose whole extension is an image's |
//! | `NAME.cls` | the label: a class's name or number |
//! | `NAME.json` | an object, whose `label` is the label if there is no `.cls` |
//! | `NAME.txt` | the label if there is neither |

mod group;
mod ranges;

use std::collections::{HashMap, HashSet};
use std::io::{self, BufReader, Read, Seek};

use elbo_core::text::printable;
use elbo_store::files;
use elbo_store::{Location, StoreError};
use tar::Archive;

use self::group::{Group, Member, Text};
use self::ranges::Ranges;
use super::walk::{File, Kind, extension_of, is_hidden};
use super::{Contents, DatasetError, ListOptions, Reader, Reason};

/// Extensions of members with labels, if none is named.
const TEXTS: [&str; 3] = ["cls", "json", "txt"];

/// The largest member with a label or captions that is read.
const LARGEST_TEXT: u64 = 1 << 20;

/// Lists the contents of a shard.
pub(super) async fn list(reader: &Reader, file: &File, options: &ListOptions<'_>) -> Result<Contents, DatasetError> {
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

/// The texts to read for an image.
#[derive(Debug)]
struct Wanted {
    labels: bool,
    /// The extension or JSON field with the label, if one is named.
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
        let usual = TEXTS.contains(&extension);
        named(&self.captions)
            || (self.captions.is_some() && extension == "json")
            || (self.labels && (usual || named(&self.label)))
    }
}

/// The state while a shard is read.
struct Indexer<'a> {
    shard: &'a File,
    wanted: &'a Wanted,
    contents: Contents,
    group: Group,
    /// Hashes of the names of finished groups: 16 bytes each.
    closed: HashSet<u128>,
    /// Possible targets of hard links, by the hash of their path: images, and short texts.
    images: HashMap<u128, (u64, u64)>,
    texts: HashMap<u128, Vec<u8>>,
}

/// The largest text that a hard link may refer to.
const LARGEST_LINKED: usize = 1 << 10;

/// The first bytes of compressed files that are often named `.tar`, and their compression.
const COMPRESSED: [(&[u8], &str); 4] =
    [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\x00", "xz"), (b"BZh", "bzip2")];

fn hash(text: &str) -> u128 {
    let mut hash = [0; 16];
    blake3::Hasher::new().update(text.as_bytes()).finalize_xof().fill(&mut hash);
    u128::from_le_bytes(hash)
}

/// Reads a shard's headers.
fn index(shard: &File, mut source: impl Read + Seek, size: u64, wanted: &Wanted) -> Result<Contents, DatasetError> {
    let failed = |error: io::Error| unreadable(shard, error);
    let mut magic = Vec::new();
    source.by_ref().take(6).read_to_end(&mut magic).map_err(failed)?;
    source.rewind().map_err(failed)?;
    if let Some((_, program)) = COMPRESSED.iter().find(|(first, _)| magic.starts_with(first)) {
        return Err(shard.wrong(format!(
            "is compressed with {program}: decompress it, since members are read by their position in the archive"
        )));
    }
    let mut archive = Archive::new(source);
    let mut indexer = Indexer::new(shard, wanted);
    let mut end = 0;
    for entry in archive.entries_with_seek().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let (offset, length) = (entry.raw_file_position(), entry.size());
        let path = String::from_utf8(entry.path_bytes().into_owned());
        let path = path.map_err(|e| shard.wrong(format!("has a member whose name is not UTF-8 ({e}): rename it")))?;
        end = offset.saturating_add(length.next_multiple_of(512));
        if offset.saturating_add(length) > size {
            return Err(shard.wrong(format!(
                "ends in the middle of its member {}: it was cut off; fetch it again, or leave it out",
                printable(&path)
            )));
        }
        let path = path.trim_start_matches("./").to_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() || path.is_empty() || path.ends_with('/') {
            continue;
        }
        let Some(role) = indexer.role_of(&path) else { continue };
        if kind.is_hard_link() {
            let target = entry.link_name_bytes().map(|name| String::from_utf8_lossy(&name).into_owned());
            indexer.take_link(path, role, &target.unwrap_or_default())?;
        } else if !kind.is_file() {
            let reason = if kind.is_symlink() { Reason::Link } else { Reason::Irregular("a device or pipe".into()) };
            indexer.contents.passed_over.note(reason, &path);
        } else if let Role::Text(extension) = role {
            let mut content = Ok(Vec::new());
            match &mut content {
                Ok(bytes) if length <= LARGEST_TEXT => _ = entry.read_to_end(bytes).map_err(failed)?,
                content => *content = Err(length),
            }
            indexer.take_text(path, extension, content)?;
        } else {
            indexer.take_image(Member { path, offset, length })?;
        }
    }
    // Two zero blocks end an archive; some programs write only one.
    if end.saturating_add(512) > size {
        return Err(shard.wrong("has no end-of-archive mark: it was cut off; fetch it again, or leave it out"));
    }
    indexer.finish()
}

/// The role of a member in a sample.
enum Role {
    Image,
    /// A text to read, with its extension.
    Text(String),
}

/// Splits a path at the first dot of its last part.
fn stem_of(path: &str) -> (&str, &str) {
    let file = path.rfind('/').map_or(0, |slash| slash + 1);
    match path[file..].find('.') {
        Some(dot) => (&path[..file + dot], &path[file + dot + 1..]),
        None => (path, ""),
    }
}

impl<'a> Indexer<'a> {
    fn new(shard: &'a File, wanted: &'a Wanted) -> Self {
        let (images, texts) = (HashMap::new(), HashMap::new());
        let (contents, group, closed) = (Contents::default(), Group::default(), HashSet::new());
        Self { shard, wanted, contents, group, closed, images, texts }
    }

    /// The role of a member; `None` if it is passed over.
    fn role_of(&mut self, path: &str) -> Option<Role> {
        let passed_over = &mut self.contents.passed_over;
        if is_hidden(path) {
            passed_over.note(Reason::Hidden, path);
            return None;
        }
        if Kind::of(path) == Some(Kind::Image) {
            return Some(Role::Image);
        }
        let extension = stem_of(path).1.to_ascii_lowercase();
        if self.wanted.reads(&extension) {
            return Some(Role::Text(extension));
        }
        // Labels are not reported as passed over if labels are not wanted.
        if !TEXTS.contains(&extension.as_str()) {
            passed_over.note(extension_of(path), path);
        }
        None
    }

    /// Begins a new group if a member does not belong to the current one.
    fn enter(&mut self, path: &str) -> Result<(), DatasetError> {
        let name = stem_of(path).0;
        if name == self.group.name {
            return Ok(());
        }
        self.close()?;
        if self.closed.contains(&hash(name)) {
            return Err(self.shard.wrong(format!(
                "has a member {} separated from others of the sample {}: in WebDataset's layout the members of a \
                 sample are consecutive; write the archive again, sorted by name (tar --sort=name)",
                printable(path),
                printable(name)
            )));
        }
        name.clone_into(&mut self.group.name);
        Ok(())
    }

    fn close(&mut self) -> Result<(), DatasetError> {
        let group = std::mem::take(&mut self.group);
        if !(group.images.is_empty() && group.texts.is_empty()) {
            self.closed.insert(hash(&group.name));
        }
        let found = group.finish(self.shard, self.wanted, &mut self.contents.passed_over)?;
        self.contents.found.extend(found);
        Ok(())
    }

    fn take_image(&mut self, member: Member) -> Result<(), DatasetError> {
        self.enter(&member.path)?;
        self.images.insert(hash(&member.path), (member.offset, member.length));
        self.group.images.push(member);
        Ok(())
    }

    fn take_text(
        &mut self,
        path: String,
        extension: String,
        content: Result<Vec<u8>, u64>,
    ) -> Result<(), DatasetError> {
        self.enter(&path)?;
        if let Ok(text) = content.as_ref()
            && text.len() <= LARGEST_LINKED
        {
            self.texts.insert(hash(&path), text.clone());
        }
        if let Some(first) = self.group.texts.get(&extension) {
            return Err(self.shard.wrong(format!(
                "has two members {} and {} of the sample {}: leave one of them out",
                printable(&first.path),
                printable(&path),
                printable(&self.group.name)
            )));
        }
        self.group.texts.insert(extension, Text { path, content });
        Ok(())
    }

    /// Takes a hard link, which is another name for an earlier member.
    fn take_link(&mut self, path: String, role: Role, target: &str) -> Result<(), DatasetError> {
        let target = hash(target.trim_start_matches("./"));
        match role {
            Role::Image => match self.images.get(&target) {
                Some(&(offset, length)) => return self.take_image(Member { path, offset, length }),
                None => self.contents.passed_over.note(Reason::Link, &path),
            },
            Role::Text(extension) => match self.texts.get(&target).cloned() {
                Some(text) => return self.take_text(path, extension, Ok(text)),
                None => self.contents.passed_over.note(Reason::Link, &path),
            },
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Contents, DatasetError> {
        self.close()?;
        Ok(self.contents)
    }
}

fn unreadable(shard: &File, error: io::Error) -> DatasetError {
    match error.downcast::<StoreError>() {
        Ok(error) => error.into(),
        Err(error) => shard.wrong(format!(
            "is not a tar archive, or is damaged ({}): fetch it again, or leave it out",
            printable(&error.to_string())
        )),
    }
}

#[cfg(test)]
mod tests;
