//! JSON beside the images: for `cat/0001.jpg` the file `cat/0001.json`, for the member `0001.jpg` of `shard-000.tar` the member
//! `0001.json` of another `shard-000.tar`, in the same order, so that WebDataset joins the two.

use std::collections::HashSet;
use std::pin::pin;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use serde::Serialize;

use super::sink::Sink;
use super::{ExportError, Exported, Options, Rows};
use crate::class::Classes;
use crate::predictions::{Prediction, Score};
use crate::store::{Location, Store, StoreError};

/// Files that are written side by side.
const IN_FLIGHT: usize = 32;
/// Bytes of a tar that are sent together.
const CHUNK: usize = 1 << 20;

/// Writes the files, after seeing that all of them can be.
pub(super) async fn export(rows: &Rows<'_>, to: &Location, options: Options) -> Result<Exported, ExportError> {
    let store = Store::create(to)?;
    let plan = Plan::of(rows).await?;
    if !options.force {
        plan.refuse_to_replace(&store).await?;
    }
    let mut writer = Writer { store: &store, tar: None, exported: Exported::default() };
    let mut pending = FuturesUnordered::new();
    let written = rows
        .each(async |row, classes| {
            let json = object(row, classes, options.scores)?;
            writer.exported.samples += 1;
            match Target::of(&row.key) {
                Target::Member { tar, member } => writer.member(&row.key, tar, &member, &json).await,
                Target::File(path) => {
                    writer.exported.files += 1;
                    let store = writer.store;
                    pending.push(async move { store.write(&path, Bytes::from(json)).await });
                    match pending.len() {
                        IN_FLIGHT => pending.next().await.transpose().map(drop).map_err(ExportError::from),
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
    while pending.next().await.transpose()?.is_some() {}
    writer.finish().await
}

/// Where a sample's object belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A file of its own.
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
    /// The target of a key. A member's name ends at the first dot, as WebDataset splits them; a file's at the last.
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

    /// The file it is in.
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

/// A key below the destination. What a path can't have, like `..` or the `//` of a URL, is escaped or left out.
fn path(key: &str) -> Path {
    Path::parse(key).unwrap_or_else(|_| key.split('/').filter(|segment| !segment.is_empty()).collect())
}

/// A place in as many bytes for a million samples as fit any machine.
fn hash(place: &str) -> u128 {
    let mut short = [0; 16];
    blake3::Hasher::new().update(place.as_bytes()).finalize_xof().fill(&mut short);
    u128::from_le_bytes(short)
}

/// The files that will be written.
#[derive(Debug, Default)]
struct Plan {
    files: HashSet<u128>,
}

impl Plan {
    /// Looks at every key, and refuses those that can't have a place of their own.
    async fn of(rows: &Rows<'_>) -> Result<Self, ExportError> {
        let mut plan = Self::default();
        let mut places = HashSet::new();
        let mut open: Option<Path> = None;
        let output = rows.output();
        let mut keys = pin!(output.named());
        while let Some(named) = keys.try_next().await? {
            let target = Target::of(&named.key);
            if !places.insert(hash(&target.to_string())) {
                return Err(collision(rows, &target).await?);
            }
            let is_new = plan.files.insert(hash(target.file().as_ref()));
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

    /// Sees whether any of the files is there.
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

/// Finds the samples that ask for one place.
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
    Ok(ExportError::Row { key, problem: "the output changes; wait until its job is done".into() })
}

/// What is being written.
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
            self.exported.files += 1;
            self.tar = Some(Tar::create(self.store, path).await?);
        }
        match &mut self.tar {
            Some(tar) => tar.append(key, member, json).await,
            None => Ok(()),
        }
    }

    async fn finish(self) -> Result<Exported, ExportError> {
        if let Some(tar) = self.tar {
            tar.finish().await?;
        }
        Ok(self.exported)
    }
}

/// A tar on its way.
struct Tar {
    path: Path,
    /// What was not sent yet is in its buffer.
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

    async fn append(&mut self, key: &str, member: &str, json: &[u8]) -> Result<(), ExportError> {
        let mut header = tar::Header::new_gnu();
        header.set_size(json.len() as u64);
        header.set_mode(0o644);
        let appended = self.builder.append_data(&mut header, member, json);
        appended.map_err(|e| ExportError::Row { key: key.to_owned(), problem: e.to_string() })?;
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

/// A prediction as JSON: the columns of the predictions, and the names of the scored classes.
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
