//! Exports predictions in formats for other tools: one CSV file, or JSON beside the images in WebDataset's layout.
//!
//! Rows are streamed. A file appears only when it is complete.

mod cell;
mod csv;
mod sidecar;
mod sink;

use elbo_core::class::Classes;
use elbo_core::job::JobSpec;
use elbo_core::prediction::Prediction;
use elbo_data::manifest::ManifestRecord;
use elbo_store::{Location, Store, StoreError};
use futures::TryStreamExt;

use crate::{Output, OutputError};

/// A failed export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The predictions can't be read.
    #[error("reading the predictions: {0}")]
    Output(#[from] OutputError),
    /// The destination can't be opened or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The destination does not suit the format.
    #[error("can't export to {destination}: {problem}")]
    Destination {
        /// The destination as given.
        destination: String,
        /// The problem and its remedy.
        problem: &'static str,
    },
    /// Some of the files exist already.
    #[error(
        "{destination} has {count} of the files to write already, such as {example}: choose another --to, or replace them with \
         --force"
    )]
    Exists {
        /// The destination.
        destination: String,
        /// How many of the files exist.
        count: u64,
        /// One of them.
        example: String,
    },
    /// Two samples would be written to the same file.
    #[error(
        "'{first}' and '{second}' would both be written to {path}: export them with --format csv, or label them as two jobs"
    )]
    Collision {
        /// One key.
        first: String,
        /// The other key.
        second: String,
        /// The file that both would be written to.
        path: String,
    },
    /// The samples of a tar are not consecutive.
    #[error(
        "'{key}' comes after samples of other tar files, though {tar} was begun before: its members could not be written in \
         their order; export with --format csv"
    )]
    Scattered {
        /// The sample that is out of order.
        key: String,
        /// Its tar.
        tar: String,
    },
    /// A row can't be written.
    #[error("writing the row of '{key}': {problem}")]
    Row {
        /// The sample.
        key: String,
        /// The reason.
        problem: String,
    },
}

/// The format of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One file with a line per sample.
    Csv,
    /// A JSON object per sample: a file beside each image, or a member of a tar if the image is one.
    Json,
}

/// ExportOptions of an export.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// The format.
    pub format: Format,
    /// How many of the best scores to write; by default five in CSV and all in JSON.
    pub scores: Option<usize>,
    /// Whether to replace existing files.
    pub force: bool,
}

/// The result of an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Samples.
    pub samples: u64,
    /// Files.
    pub files: u64,
    /// Samples that were left out because the destination can't have a file with their name. Warnings name the first of them.
    pub skipped: u64,
}

impl Exported {
    /// Leaves a sample out.
    fn skip(&mut self, key: &str, problem: &str) {
        /// The most warnings that name a sample.
        const NAMED: u64 = 20;
        self.skipped += 1;
        match self.skipped {
            // The name may come from an untrusted source, so its control characters are escaped.
            ..=NAMED => tracing::warn!(?key, problem, "an image is left out"),
            _ if self.skipped == NAMED + 1 => tracing::warn!("more images are left out, which are only counted"),
            _ => {}
        }
    }
}

/// Exports the predictions in `out` to a file or directory. `spec` is their job and `listed` its dataset.
pub async fn export(
    out: &Store,
    spec: &JobSpec,
    listed: &ManifestRecord,
    to: &Location,
    options: ExportOptions,
) -> Result<Exported, ExportError> {
    let rows = Rows { store: out, spec, listed };
    match options.format {
        Format::Csv => csv::export(&rows, to, options).await,
        Format::Json if to == out.location() => {
            let problem = "the files would lie among the job's own; give --to another directory";
            Err(ExportError::Destination { destination: to.to_string(), problem })
        }
        Format::Json => sidecar::export(&rows, to, options).await,
    }
}

/// The rows of an output, with what is needed to find their classes.
#[derive(Debug)]
struct Rows<'a> {
    store: &'a Store,
    spec: &'a JobSpec,
    listed: &'a ManifestRecord,
}

impl Rows<'_> {
    fn output(&self) -> Output {
        Output::new(self.store)
    }

    /// Calls `take` with every prediction and the classes it chose from.
    async fn each(
        &self,
        mut take: impl AsyncFnMut(&Prediction, &Classes) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let mut rows = self.output().predictions_and_classes(self.spec, self.listed).await?;
        while let Some((row, classes)) = rows.try_next().await? {
            take(&row, &classes).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
