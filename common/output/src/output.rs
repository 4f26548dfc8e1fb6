//! Reads a job's output shard by shard in order, in memory that does not grow with the job.
//!
//! Several files are opened at a time, because an object store takes longer to respond than to send. Only the needed columns of
//! each file are fetched.

use std::collections::BTreeMap;
use std::sync::Arc;

use elbo_core::audit::Audited;
use elbo_core::class::Classes;
use elbo_core::ids::ShardId;
use elbo_core::job::JobSpec;
use elbo_core::prediction::Prediction;
use elbo_core::sample::Sample;
use elbo_data::manifest::{Manifest, ManifestError, ManifestRecord};
use elbo_store::parquet_file::ParquetFile;
use elbo_store::table::{self, ReadError, TableError, View};
use elbo_store::{Store, StoreError};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use object_store::path::Path;

use crate::audit::AuditTable;
use crate::layout;
use crate::predictions::{ErrorRow, Errors, Judgement, Named, Predictions, Quarantine, Quarantined, Tally};

/// Files that are opened concurrently.
const OPENED: usize = 4;

/// An output that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The manifest can't be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file has the wrong content.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: Path,
        /// The error.
        source: TableError,
    },
    /// The store can't be read.
    #[error("{0}; check that the location can be read and try again")]
    Store(#[from] StoreError),
}

/// The files of an output.
#[derive(Clone, Debug)]
pub struct Output {
    store: Store,
}

impl Output {
    /// The output in a store.
    pub fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }

    /// The number of prediction files.
    pub async fn shards(&self) -> Result<u64, OutputError> {
        Ok(self.files(layout::PREDICTIONS).await?.len() as u64)
    }

    /// Every row's status and evaluations.
    pub fn tallies(&self) -> impl Stream<Item = Result<Tally, OutputError>> + Send {
        self.all::<Tally>()
    }

    /// Every row's sample.
    pub fn named(&self) -> impl Stream<Item = Result<Named, OutputError>> + Send {
        self.all::<Named>()
    }

    /// Every row without its scores.
    pub fn judgements(&self) -> impl Stream<Item = Result<Judgement, OutputError>> + Send {
        self.all::<Judgement>()
    }

    /// Every row.
    ///
    /// ```no_run
    /// # async fn read() -> Result<(), Box<dyn std::error::Error>> {
    /// use elbo_output::Output;
    /// use elbo_store::{Location, Store};
    /// use futures::TryStreamExt;
    ///
    /// let output = Output::new(&Store::open(&Location::parse("labels/")?)?);
    /// let mut rows = std::pin::pin!(output.predictions());
    /// while let Some(row) = rows.try_next().await? {
    ///     println!("{}: {:?}", row.key, row.labelled().map(|labelled| &labelled.class_name));
    /// }
    /// # Ok(()) }
    /// ```
    pub fn predictions(&self) -> impl Stream<Item = Result<Prediction, OutputError>> + Send {
        self.all::<Predictions>()
    }

    /// Every audited sample, if the job audits.
    pub fn audited(&self) -> impl Stream<Item = Result<Audited, OutputError>> + Send {
        self.all_in::<AuditTable>(layout::AUDIT)
    }

    /// The error of every evaluation, if the job writes them.
    pub fn errors(&self) -> impl Stream<Item = Result<ErrorRow, OutputError>> + Send {
        self.all_in::<Errors>(layout::ERRORS)
    }

    /// Every sample of the manifest, with its prediction if there is one yet. For jobs whose samples have their own captions.
    pub fn samples_and_predictions(
        &self,
        manifest: Manifest,
    ) -> impl Stream<Item = Result<(Sample, Option<Prediction>), OutputError>> + Send + use<> {
        let manifest = Arc::new(manifest);
        let shards = (0..manifest.shards()).map(ShardId);
        let output = self.clone();
        let of_shard = move |shard| {
            let (output, manifest) = (output.clone(), Arc::clone(&manifest));
            async move {
                let samples = manifest.shard(shard).await?;
                let rows = match output.rows::<Predictions>(layout::predictions(shard)).await? {
                    Some(rows) => rows.try_concat().await?,
                    None => Vec::new(),
                };
                let mut of_sample: BTreeMap<_, _> = rows.into_iter().map(|row| (row.sample, row)).collect();
                let pairs = samples.into_iter().map(move |sample| {
                    let prediction = of_sample.remove(&sample.id);
                    Ok((sample, prediction))
                });
                Ok::<_, OutputError>(futures::stream::iter(pairs))
            }
        };
        futures::stream::iter(shards).map(of_shard).buffered(OPENED).try_flatten()
    }

    /// Every prediction of a job, with the classes it chose from: the job's classes, or the sample's captions.
    pub async fn predictions_and_classes(
        &self,
        spec: &JobSpec,
        listed: &ManifestRecord,
    ) -> Result<BoxStream<'static, Result<(Prediction, Arc<Classes>), OutputError>>, OutputError> {
        let of_job = Arc::new(spec.classes.clone());
        if spec.candidates.is_none() {
            return Ok(self.all::<Predictions>().map_ok(move |row| (row, Arc::clone(&of_job))).boxed());
        }
        let manifest = Manifest::open(&self.store, listed, spec.shard_size).await?;
        let rows = self.samples_and_predictions(manifest).try_filter_map(move |(sample, row)| {
            let classes = Arc::new(sample.classes(&of_job).into_owned());
            std::future::ready(Ok(row.map(|row| (row, classes))))
        });
        Ok(rows.boxed())
    }

    /// The predictions at a path, in batches; `None` if there is no such file.
    pub(crate) async fn predictions_at(
        &self,
        path: Path,
    ) -> Result<Option<impl Stream<Item = Result<Vec<Prediction>, OutputError>> + Send + Unpin>, OutputError> {
        self.rows::<Predictions>(path).await
    }

    /// The quarantined samples at a path; `None` if there is no such file.
    pub(crate) async fn quarantine_at(&self, path: Path) -> Result<Option<Vec<Quarantined>>, OutputError> {
        match self.rows::<Quarantine>(path).await? {
            Some(rows) => rows.try_concat().await.map(Some),
            None => Ok(None),
        }
    }

    /// The rows of all prediction files.
    fn all<V: View<Row: Send> + Send + 'static>(
        &self,
    ) -> impl Stream<Item = Result<V::Row, OutputError>> + Send + use<V> {
        self.all_in::<V>(layout::PREDICTIONS)
    }

    /// The rows of all files in a directory.
    fn all_in<V: View<Row: Send> + Send + 'static>(
        &self,
        directory: &'static str,
    ) -> impl Stream<Item = Result<V::Row, OutputError>> + Send + use<V> {
        let output = self.clone();
        let listed = async move {
            let files = output.files(directory).await?;
            let open = move |file: ObjectMeta| {
                let output = output.clone();
                let table = ParquetFile::new(&output.store, file.location.clone(), file.size);
                async move { output.open::<V>(file.location, table).await }
            };
            Ok::<_, OutputError>(futures::stream::iter(files).map(open).buffered(OPENED).try_flatten())
        };
        let items = |rows: Vec<V::Row>| futures::stream::iter(rows.into_iter().map(Ok));
        futures::stream::once(listed).try_flatten().map_ok(items).try_flatten()
    }

    /// The rows at a path, in batches; `None` if there is no such file.
    pub(crate) async fn rows<V: View<Row: Send> + Send + 'static>(
        &self,
        path: Path,
    ) -> Result<Option<impl Stream<Item = Result<Vec<V::Row>, OutputError>> + Send + Unpin + use<V>>, OutputError> {
        match ParquetFile::find(&self.store, path.clone()).await {
            Ok((file, _)) => self.open::<V>(path, file).await.map(Some),
            Err(StoreError::Object { source: object_store::Error::NotFound { .. }, .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn open<V: View<Row: Send> + Send + 'static>(
        &self,
        path: Path,
        file: ParquetFile,
    ) -> Result<impl Stream<Item = Result<Vec<V::Row>, OutputError>> + Send + Unpin + use<V>, OutputError> {
        let rows = table::rows::<V>(file).await.map_err(|error| unread(&path, error))?;
        Ok(rows.map_err(move |error| unread(&path, error)))
    }

    /// The files of a directory, in the order of their shards.
    async fn files(&self, directory: &str) -> Result<Vec<ObjectMeta>, OutputError> {
        let directory = Path::from(directory);
        let listed = self.store.inner().list(Some(&directory)).try_collect::<Vec<_>>().await;
        let mut files =
            listed.map_err(|source| StoreError::Object { action: "listing", path: directory.to_string(), source })?;
        files.retain(|file| file.location.extension() == Some("parquet"));
        // Beyond shard 99999 the numbers have more digits, so the order of names is not that of the shards.
        files.sort_by_key(|file| (file.location.as_ref().len(), file.location.clone()));
        Ok(files)
    }
}

fn unread(path: &Path, error: ReadError) -> OutputError {
    match error {
        ReadError::Store(error) => OutputError::Store(error),
        ReadError::Table(source) => OutputError::File { path: path.clone(), source },
    }
}

#[cfg(test)]
mod tests;
