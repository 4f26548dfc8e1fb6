//! Predictions in the formats other tools ask for: one CSV file, or JSON beside the images as WebDataset has it.
//!
//! Rows pass through one by one. A file appears complete or not at all.

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

/// An export that can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The predictions can't be read.
    #[error("reading the predictions: {0}")]
    Output(#[from] OutputError),
    /// The destination can't be opened or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The destination is not what the format needs.
    #[error("can't export to {destination}: {problem}")]
    Destination {
        /// As given.
        destination: String,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
    /// Something is there already.
    #[error(
        "{destination} has {count} of the files to write already, such as {example}: choose another --to, or replace them with \
         --force"
    )]
    Exists {
        /// Where.
        destination: String,
        /// How many.
        count: u64,
        /// One of them.
        example: String,
    },
    /// Two samples would share a file.
    #[error(
        "'{first}' and '{second}' would both be written to {path}: export them with --format csv, or label them as two jobs"
    )]
    Collision {
        /// One key.
        first: String,
        /// Another.
        second: String,
        /// The file both ask for.
        path: String,
    },
    /// The samples of a tar do not follow each other.
    #[error(
        "'{key}' comes after samples of other tar files, though {tar} was begun before: its members could not be written in \
         their order; export with --format csv"
    )]
    Scattered {
        /// The sample that comes too late.
        key: String,
        /// Its tar.
        tar: String,
    },
    /// A row can't be written down.
    #[error("writing the row of '{key}': {problem}")]
    Row {
        /// The sample.
        key: String,
        /// Why not.
        problem: String,
    },
}

/// What predictions are exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One file with a line per sample.
    Csv,
    /// An object per sample: a file beside each image, or a member of a tar for images that are members of one.
    Json,
}

/// How predictions are exported.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// As what.
    pub format: Format,
    /// How many of the best scores; the format's default where absent: five in CSV, all in JSON.
    pub scores: Option<usize>,
    /// Replace what is there.
    pub force: bool,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Samples.
    pub samples: u64,
    /// Files.
    pub files: u64,
    /// Samples that were left out, because the destination can't have a file of their name. The first are named in warnings.
    pub skipped: u64,
}

impl Exported {
    /// Leaves a sample out.
    fn skip(&mut self, key: &str, problem: &str) {
        /// So many are named.
        const NAMED: u64 = 20;
        self.skipped += 1;
        match self.skipped {
            // What a stranger put into a name is shown with its control characters escaped.
            ..=NAMED => tracing::warn!(?key, problem, "an image is left out"),
            _ if self.skipped == NAMED + 1 => tracing::warn!("more images are left out, which are only counted"),
            _ => {}
        }
    }
}

/// Writes the predictions in `out`, of the job `spec` whose dataset was `listed`, to a file or directory.
pub async fn export(
    out: &Store,
    spec: &JobSpec,
    listed: &ManifestRecord,
    to: &Location,
    options: Options,
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

/// The rows of an output, with what their scores are about.
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

    /// Hands on every prediction with the classes it chose from.
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
