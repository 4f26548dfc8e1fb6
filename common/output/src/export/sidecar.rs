//! Exports JSON beside the images. For `cat/0001.jpg` it writes the file `cat/0001.json`. For the member `0001.jpg` of
//! `shard-000.tar` it writes the member `0001.json` of another `shard-000.tar`, in the same order, so that WebDataset can join
//! the two.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path as FsPath;
use std::pin::pin;

use bytes::Bytes;
use elbo_core::causes::find_cause;
use elbo_core::class::Classes;
use elbo_core::prediction::{Prediction, Score};
use elbo_store::{Location, Store, StoreError};
use futures::stream::FuturesUnordered;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use serde::Serialize;

use super::sink::Sink;
use super::{ExportError, ExportOptions, Exported, Rows};

/// Files that are written concurrently.
const IN_FLIGHT: usize = 32;
/// Bytes of a tar that are sent at once.
const CHUNK: usize = 1 << 20;
/// The longest object name of S3 and Google Cloud Storage; Azure has the same limit.
const LONGEST_NAME: usize = 1024;

/// Writes the files, after checking that each has its own place. A sample whose name can't be a file name there is left out;
/// such names may come from an untrusted tar.
pub(super) async fn export(rows: &Rows<'_>, to: &Location, options: ExportOptions) -> Result<Exported, ExportError> {
    let store = Store::create(to)?;
    let plan = Plan::of(rows, to).await?;
    if !options.force {
        plan.refuse_to_replace(&store).await?;
    }
    let mut writer = Writer { store: &store, tar: None, exported: Exported::default() };
    let mut pending = FuturesUnordered::new();
    let written = rows
        .each(async |row, classes| {
            let target = match plan.place(&row.key) {
                Ok(target) => target,
                Err(problem) => {
                    writer.exported.skip(&row.key, problem);
                    return Ok(());
                }
            };
            let json = object(row, classes, options.scores)?;
            match target {
                Target::Member { tar, member } => writer.member(&row.key, tar, &member, &json).await,
                Target::File(path) => {
                    let (store, key) = (writer.store, row.key.clone());
                    pending.push(async move { (key, store.write(&path, Bytes::from(json)).await) });
                    match pending.len() {
                        IN_FLIGHT => pending.next().await.map_or(Ok(()), |(key, ended)| writer.wrote(&key, ended)),
                        _ => Ok(()),
                    }
                }
            }
        })
        .await;
    if let Err(error) = written {
        if let Some(tar) = writer.tar {
            tar.sink.abort().await;
        }
        return Err(error);
    }
    while let Some((key, ended)) = pending.next().await {
        writer.wrote(&key, ended)?;
    }
    writer.finish().await
}

/// Where a sample's JSON is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A separate file.
    File(Path),
    /// A member of a tar.
    Member {
        /// The tar.
        tar: Path,
        /// The member's name.
        member: String,
    },
}

impl Target {
    /// The target of a key. As in WebDataset, a member's name ends at its first dot; a file's name ends at its last dot.
    pub(super) fn of(key: &str) -> Self {
        if let Some((tar, member)) = key.split_once(".tar/") {
            let at = member.rfind('/').map_or(0, |slash| slash + 1);
            let stem = member[at..].split('.').next().unwrap_or_default();
            return Self::Member { tar: path(&format!("{tar}.tar")), member: format!("{}{stem}.json", &member[..at]) };
        }
        let at = key.rfind('/').map_or(0, |slash| slash + 1);
        let stem = key[at..].rsplit_once('.').map_or(&key[at..], |(stem, _)| stem);
        Self::File(path(&format!("{}{stem}.json", &key[..at])))
    }

    /// Refuses names that would leave the directory when the tar is unpacked, and names that a tar can't hold.
    fn check(&self) -> Result<(), &'static str> {
        let Self::Member { member, .. } = self else { return Ok(()) };
        if member.starts_with('/') {
            return Err("its name in the tar is absolute");
        }
        if member.split('/').any(|part| part == "..") {
            return Err("its name in the tar goes up with '..'");
        }
        if member.contains('\0') {
            return Err("its name in the tar has a zero byte");
        }
        Ok(())
    }

    /// The file that holds the target.
    fn file(&self) -> &Path {
        match self {
            Self::File(path) | Self::Member { tar: path, .. } => path,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.fmt(f),
            Self::Member { tar, member } => write!(f, "{tar}/{member}"),
        }
    }
}

/// A key below the destination. Parts that a path can't have, like `..` or the `//` of a URL, are escaped or left out.
fn path(key: &str) -> Path {
    Path::parse(key).unwrap_or_else(|_| key.split('/').filter(|segment| !segment.is_empty()).collect())
}

/// A hash of a place, short enough to keep a million of them in memory.
fn hash(place: &str) -> u128 {
    let mut short = [0; 16];
    blake3::Hasher::new().update(place.as_bytes()).finalize_xof().fill(&mut short);
    u128::from_le_bytes(short)
}

/// The files to write.
#[derive(Debug, Default)]
pub(super) struct Plan {
    files: HashSet<u128>,
    /// The most bytes of a path.
    longest: usize,
    /// Places that collide with another on a file system that ignores case.
    shadowed: HashSet<u128>,
}

impl Plan {
    /// Checks every key, and refuses keys that share a place.
    async fn of(rows: &Rows<'_>, to: &Location) -> Result<Self, ExportError> {
        let (longest, folds_case) = match to {
            Location::Local(directory) => (usize::MAX, folds_case(directory)),
            Location::Remote(url) => (LONGEST_NAME.saturating_sub(url.path().len()), false),
        };
        Self::within(rows, longest, folds_case).await
    }

    pub(super) async fn within(rows: &Rows<'_>, longest: usize, folds_case: bool) -> Result<Self, ExportError> {
        let mut plan = Self { longest, ..Self::default() };
        let mut places = HashSet::new();
        let mut folded = HashMap::new();
        let mut open: Option<Path> = None;
        let output = rows.output();
        let mut keys = pin!(output.named());
        while let Some(named) = keys.try_next().await? {
            let Ok(target) = plan.place(&named.key) else { continue };
            let place = hash(&target.to_string());
            if !places.insert(place) {
                return Err(collision(rows, &target).await?);
            }
            let file = hash(target.file().as_ref());
            if folds_case && *folded.entry(hash(&target.file().as_ref().to_lowercase())).or_insert(file) != file {
                plan.shadowed.insert(place);
                continue;
            }
            let is_new = plan.files.insert(file);
            if let Target::Member { tar, .. } = target
                && open.as_ref() != Some(&tar)
            {
                if !is_new {
                    return Err(ExportError::Scattered { key: named.key, tar: tar.to_string() });
                }
                open = Some(tar);
            }
        }
        Ok(plan)
    }

    /// Where a sample's JSON goes, or why it has no place.
    pub(super) fn place(&self, key: &str) -> Result<Target, &'static str> {
        let target = Target::of(key);
        target.check()?;
        if target.file().as_ref().len() > self.longest {
            return Err("its name is too long for an object store");
        }
        if self.shadowed.contains(&hash(&target.to_string())) {
            return Err("its name differs from another's only in upper and lower case, which are the same there");
        }
        Ok(target)
    }

    /// Checks that none of the files exists.
    async fn refuse_to_replace(&self, store: &Store) -> Result<(), ExportError> {
        let inner = store.inner();
        let mut there = inner.list(None);
        let (mut count, mut example) = (0, String::new());
        loop {
            let object = there.try_next().await.map_err(|source| StoreError::Object {
                action: "listing",
                path: store.location().to_string(),
                source,
            })?;
            let Some(object) = object else { break };
            if self.files.contains(&hash(object.location.as_ref())) {
                count += 1;
                if count == 1 {
                    example = object.location.to_string();
                }
            }
        }
        let destination = store.location().to_string();
        if count == 0 { Ok(()) } else { Err(ExportError::Exists { destination, count, example }) }
    }
}

/// Whether a directory ignores case in file names.
fn folds_case(directory: &FsPath) -> bool {
    // If nothing can be written there, the next write reports it.
    let Ok(probe) = tempfile::Builder::new().prefix("elbo-case-").tempfile_in(directory) else { return false };
    probe.path().file_name().is_some_and(|name| directory.join(name.to_string_lossy().to_uppercase()).exists())
}

/// Whether a local file could not be written because of its name: too long, invalid, or inside another file.
fn is_about_name(error: &ExportError) -> bool {
    use io::ErrorKind::{AlreadyExists, InvalidFilename, InvalidInput, IsADirectory, NotADirectory};
    let ExportError::Store(StoreError::Object { source, .. }) = error else { return false };
    find_cause::<io::Error>(source).is_some_and(|error| {
        matches!(error.kind(), AlreadyExists | InvalidFilename | InvalidInput | IsADirectory | NotADirectory)
    })
}

/// Finds the two samples that share a place.
async fn collision(rows: &Rows<'_>, place: &Target) -> Result<ExportError, ExportError> {
    let output = rows.output();
    let mut keys = pin!(output.named());
    let mut found = Vec::new();
    while let Some(named) = keys.try_next().await? {
        if Target::of(&named.key) == *place {
            found.push(named.key);
        }
        if let [first, second] = &found[..] {
            let (first, second) = (first.clone(), second.clone());
            return Ok(ExportError::Collision { first, second, path: place.to_string() });
        }
    }
    let key = found.pop().unwrap_or_default();
    Ok(ExportError::Row { key, problem: "the output is still changing; wait until its job is done".into() })
}

/// The state of an export.
#[derive(Debug)]
struct Writer<'a> {
    store: &'a Store,
    tar: Option<Tar>,
    exported: Exported,
}

impl Writer<'_> {
    async fn member(&mut self, key: &str, path: Path, member: &str, json: &[u8]) -> Result<(), ExportError> {
        if self.tar.as_ref().is_none_or(|tar| tar.path != path) {
            if let Some(tar) = self.tar.take() {
                tar.finish().await?;
            }
            match Tar::create(self.store, path).await {
                Ok(tar) => self.tar = Some(tar),
                Err(error) => return self.go_on_without(key, error),
            }
            self.exported.files += 1;
        }
        let Some(tar) = &mut self.tar else { return Ok(()) };
        if let Err(problem) = tar.append(member, json) {
            self.exported.skip(key, &problem.to_string());
            return Ok(());
        }
        self.exported.samples += 1;
        tar.send().await
    }

    /// Records the result of writing a sample's file.
    fn wrote(&mut self, key: &str, ended: Result<(), StoreError>) -> Result<(), ExportError> {
        match ended {
            Ok(()) => {
                self.exported.samples += 1;
                self.exported.files += 1;
                Ok(())
            }
            Err(error) => self.go_on_without(key, error.into()),
        }
    }

    /// Leaves out a sample whose name can't be a file name. Other errors would affect all samples, and are returned.
    fn go_on_without(&mut self, key: &str, error: ExportError) -> Result<(), ExportError> {
        if is_about_name(&error) {
            self.exported.skip(key, &error.to_string());
            Ok(())
        } else {
            Err(error)
        }
    }

    async fn finish(self) -> Result<Exported, ExportError> {
        if let Some(tar) = self.tar {
            tar.finish().await?;
        }
        Ok(self.exported)
    }
}

/// A tar that is being written.
struct Tar {
    path: Path,
    /// Its buffer holds what has not been sent yet.
    builder: tar::Builder<Vec<u8>>,
    sink: Sink,
}

impl std::fmt::Debug for Tar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tar").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Tar {
    async fn create(store: &Store, path: Path) -> Result<Self, ExportError> {
        let sink = Sink::create(store, path.clone()).await?;
        Ok(Self { path, builder: tar::Builder::new(Vec::new()), sink })
    }

    /// Appends a member. An invalid name is refused before anything is written.
    fn append(&mut self, member: &str, json: &[u8]) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(json.len() as u64);
        header.set_mode(0o644);
        self.builder.append_data(&mut header, member, json)
    }

    /// Sends the buffer once it is large enough.
    async fn send(&mut self) -> Result<(), ExportError> {
        let buffer = self.builder.get_mut();
        if buffer.len() >= CHUNK { self.sink.write(std::mem::take(buffer).into()).await } else { Ok(()) }
    }

    async fn finish(self) -> Result<(), ExportError> {
        let Self { path, builder, mut sink } = self;
        let end =
            builder.into_inner().map_err(|e| ExportError::Row { key: path.to_string(), problem: e.to_string() })?;
        match sink.write(end.into()).await {
            Ok(()) => sink.finish().await,
            Err(error) => {
                sink.abort().await;
                Err(error)
            }
        }
    }
}

/// A prediction as JSON: the columns of the predictions, plus the names of the scored classes.
#[derive(Debug, Serialize)]
struct Object<'a> {
    sample_id: u64,
    key: &'a str,
    label: Option<&'a str>,
    predicted_class: Option<&'a str>,
    predicted_index: Option<i32>,
    confidence: Option<f32>,
    margin: Option<f32>,
    evaluations: u32,
    status: &'static str,
    error: Option<&'a str>,
    scores: Vec<NamedScore<'a>>,
}

#[derive(Debug, Serialize)]
struct NamedScore<'a> {
    class: &'a str,
    class_index: i32,
    mean_error: f32,
    std_error: Option<f32>,
    n: u32,
    round: u16,
}

fn object(row: &Prediction, classes: &Classes, scores: Option<usize>) -> Result<Vec<u8>, ExportError> {
    let labelled = row.labelled();
    let named = |score: &Score| {
        let &Score { class, mean_error, std_error, n, round } = score;
        NamedScore { class: classes.name(class), class_index: class.0, mean_error, std_error, n, round: round.0 }
    };
    let object = Object {
        sample_id: row.sample.0,
        key: &row.key,
        label: row.label.as_deref(),
        predicted_class: labelled.map(|l| l.class_name.as_str()),
        predicted_index: labelled.map(|l| l.class.0),
        confidence: row.confidence(),
        margin: row.margin(),
        evaluations: row.evaluations,
        status: row.status(),
        error: row.error(),
        scores: row.scores().iter().take(scores.unwrap_or(usize::MAX)).map(named).collect(),
    };
    serde_json::to_vec(&object).map_err(|e| ExportError::Row { key: row.key.clone(), problem: e.to_string() })
}
