//! Exports one CSV file: a line per sample, with the names and mean errors of its best classes. No cell is a formula
//! ([`cell`]).

use elbo_core::class::Classes;
use elbo_core::job::JobSpec;
use elbo_core::prediction::Prediction;
use elbo_store::{Location, Store, StoreError};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::cell::cell;
use super::sink::Sink;
use super::{ExportError, ExportOptions, Exported, Rows};
use crate::predictions::BEST;

/// Bytes of lines that are sent at once.
const CHUNK: usize = 1 << 16;

/// Columns before those of the best classes.
const COLUMNS: [&str; 9] =
    ["key", "label", "predicted_class", "predicted_index", "confidence", "margin", "evaluations", "status", "error"];

/// Writes the file.
pub(super) async fn export(rows: &Rows<'_>, to: &Location, options: ExportOptions) -> Result<Exported, ExportError> {
    let (store, path) = file(to)?;
    if !options.force && is_there(&*store.inner(), &path).await? {
        let (destination, example) = (to.to_string(), path.to_string());
        return Err(ExportError::Exists { destination, count: 1, example });
    }
    let mut sink = Sink::create(&store, path).await?;
    match write(rows, &mut sink, columns(rows.spec, options.scores)).await {
        Ok(samples) => {
            sink.finish().await?;
            Ok(Exported { samples, files: 1, skipped: 0 })
        }
        Err(error) => {
            sink.abort().await;
            Err(error)
        }
    }
}

async fn write(rows: &Rows<'_>, sink: &mut Sink, scores: usize) -> Result<u64, ExportError> {
    let mut lines = Lines::default();
    lines.push("", &header(scores))?;
    let mut samples = 0;
    rows.each(async |row, classes| {
        lines.push(&row.key, &fields(row, classes, scores))?;
        samples += 1;
        if lines.0.len() >= CHUNK { sink.write(std::mem::take(&mut lines.0).into()).await } else { Ok(()) }
    })
    .await?;
    sink.write(lines.0.into()).await?;
    Ok(samples)
}

/// How many classes get columns.
fn columns(spec: &JobSpec, scores: Option<usize>) -> usize {
    let asked = scores.unwrap_or(BEST).min(spec.top_k.map_or(usize::MAX, |k| k as usize));
    // If samples have their own captions, the length of the longest list is not known in advance.
    if spec.candidates.is_some() { asked } else { asked.min(spec.classes.names.len()) }
}

fn header(scores: usize) -> Vec<String> {
    let best = (1..=scores).flat_map(|k| [format!("class_{k}"), format!("error_{k}")]);
    COLUMNS.map(str::to_owned).into_iter().chain(best).collect()
}

fn fields(row: &Prediction, classes: &Classes, scores: usize) -> Vec<String> {
    fn text(value: Option<impl ToString>) -> String {
        value.map_or(String::new(), |value| value.to_string())
    }
    let labelled = row.labelled();
    let mut fields = vec![
        cell(&row.key),
        row.label.as_deref().map(cell).unwrap_or_default(),
        labelled.map_or(String::new(), |l| cell(&l.class_name)),
        text(labelled.map(|l| l.class)),
        text(row.confidence()),
        text(row.margin()),
        row.evaluations.to_string(),
        row.status().to_owned(),
        row.error().map(cell).unwrap_or_default(),
    ];
    for k in 0..scores {
        let score = row.scores().get(k);
        fields.push(score.map_or(String::new(), |s| cell(classes.name(s.class))));
        fields.push(text(score.map(|s| s.mean_error)));
    }
    fields
}

/// Lines that have not been sent yet.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, key: &str, fields: &[String]) -> Result<(), ExportError> {
        let mut writer = ::csv::Writer::from_writer(&mut self.0);
        let written = writer.write_record(fields).and_then(|()| Ok(writer.flush()?));
        written.map_err(|e| ExportError::Row { key: key.to_owned(), problem: e.to_string() })
    }
}

/// The store and name of the file.
fn file(to: &Location) -> Result<(Store, Path), ExportError> {
    let wrong = |problem| ExportError::Destination { destination: to.to_string(), problem };
    let no_name = "--format csv writes one file: give its name, like labels.csv or s3://bucket/labels.csv";
    let (directory, name) = match to {
        Location::Local(path) if path.is_dir() => return Err(wrong("it is a directory; give a file, like labels.csv")),
        Location::Local(path) => {
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else { return Err(wrong(no_name)) };
            (Location::Local(directory.to_owned()), name.to_string_lossy().into_owned())
        }
        Location::Remote(url) => {
            let last = url.path_segments().and_then(|mut segments| segments.next_back());
            let Some(name) = last.filter(|name| !name.is_empty()) else { return Err(wrong(no_name)) };
            // In a URL the name is percent-encoded.
            let name = Path::from_url_path(name).map_err(|_| wrong(no_name))?.to_string();
            let mut directory = url.clone();
            if let Ok(mut segments) = directory.path_segments_mut() {
                segments.pop();
            }
            (Location::Remote(directory), name)
        }
    };
    let path = Path::parse(&name).map_err(|_| wrong("a file can't have this name; give another"))?;
    Ok((Store::create(&directory)?, path))
}

async fn is_there(store: &dyn ObjectStore, path: &Path) -> Result<bool, ExportError> {
    match store.head(path).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(source) => Err(StoreError::Object { action: "looking for", path: path.to_string(), source }.into()),
    }
}
