use std::sync::atomic::{AtomicU64, Ordering};

use elbo_core::ids::{ClassIndex, Round, SampleId};
use elbo_core::prediction::{Labelled, Outcome, Score};
use elbo_store::Location;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectStore, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result as StoreResult,
};

use super::*;
use crate::predictions::{BEST, encode_predictions};

/// A store that counts the bytes read from it.
#[derive(Debug, Default)]
struct Counting {
    inner: InMemory,
    read: AtomicU64,
}

impl std::fmt::Display for Counting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Counting {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> StoreResult<PutResult> {
        self.inner.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> StoreResult<GetResult> {
        let head = options.head;
        let result = self.inner.get_opts(path, options).await?;
        if !head {
            self.read.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
        }
        Ok(result)
    }

    fn delete_stream(&self, paths: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn row(id: u64, classes: i32) -> Prediction {
    let score = |class| Score {
        class: ClassIndex(class),
        mean_error: (id * 7919 + class as u64 * 104_729) as f32 / 1e6,
        std_error: Some(class as f32 / 3.0),
        n: 10,
        round: Round(0),
    };
    let outcome = if id % 10 == 9 {
        Outcome::Quarantined { error: "decode: cut off".into() }
    } else {
        Outcome::Labelled(Labelled {
            class: ClassIndex(0),
            class_name: "zero".into(),
            confidence: None,
            margin: Some(0.5),
            scores: (0..classes).map(score).collect(),
        })
    };
    Prediction { sample: SampleId(id), key: format!("{id}.png"), label: None, evaluations: 5, outcome }
}

async fn write(store: &Store, shard: u32, rows: &[Prediction]) -> u64 {
    let bytes = encode_predictions(rows, &[]).unwrap();
    let size = bytes.len() as u64;
    store.write(&layout::predictions(ShardId(shard)), bytes).await.unwrap();
    size
}

fn store(inner: Arc<dyn ObjectStore>) -> Store {
    Store::from_parts(inner, Location::Local("/out".into()))
}

#[tokio::test]
async fn rows_come_in_order_whatever_the_names_of_their_files() {
    let store = store(Arc::new(InMemory::new()));
    // As text, 100000 comes before 99999.
    for (at, shard) in [(2u64, 99_999), (0, 3), (3, 100_000), (1, 20)] {
        let rows: Vec<_> = (at * 300..(at + 1) * 300).map(|id| row(id, 3)).collect();
        write(&store, shard, &rows).await;
    }
    store.write(&Path::from("predictions/notes.txt"), "not a table".into()).await.unwrap();
    let output = Output::new(&store);
    let expected: Vec<_> = (0..1200).map(|id| row(id, 3)).collect();
    assert_eq!(output.predictions().try_collect::<Vec<_>>().await.unwrap(), expected);
    assert_eq!(output.shards().await.unwrap(), 4);
    let judged: Vec<_> = output.judgements().try_collect().await.unwrap();
    assert_eq!(judged, expected.iter().map(Judgement::from).collect::<Vec<_>>());
    let tallies: Vec<_> = output.tallies().try_collect().await.unwrap();
    assert_eq!(tallies.iter().filter(|tally| tally.quarantined).count(), 120);
    assert_eq!(tallies.iter().map(|tally| tally.evaluations).sum::<u32>(), 6000);
    let named: Vec<_> = output.named().try_collect().await.unwrap();
    assert_eq!((named[1199].sample, named[1199].key.as_str()), (SampleId(1199), "1199.png"));
}

#[tokio::test]
async fn of_rows_with_a_thousand_scores_only_the_needed_columns_are_fetched() {
    let counting = Arc::new(Counting::default());
    let store = store(Arc::clone(&counting) as Arc<dyn ObjectStore>);
    let rows: Vec<_> = (0..500).map(|id| row(id, 1000)).collect();
    let size = write(&store, 0, &rows).await;
    assert!(size > 1_000_000, "{size}");
    let output = Output::new(&store);
    let fetched = || counting.read.swap(0, Ordering::Relaxed);
    assert_eq!(output.tallies().try_collect::<Vec<_>>().await.unwrap().len(), 500);
    let bytes = fetched();
    assert!(bytes < 100_000, "{bytes} of {size} bytes for a status");
    let judged: Vec<_> = output.judgements().try_collect().await.unwrap();
    assert!(matches!(&judged[0].best_class, Ok(found) if found.best.len() == BEST));
    let bytes = fetched();
    assert!(bytes < size / 3, "{bytes} of {size} bytes for a report");
}

#[tokio::test]
async fn a_file_that_is_not_a_table_is_named_with_a_remedy() {
    let store = store(Arc::new(InMemory::new()));
    write(&store, 0, &[row(0, 3)]).await;
    store.write(&layout::predictions(ShardId(1)), "cut off".into()).await.unwrap();
    let error = Output::new(&store).tallies().try_collect::<Vec<_>>().await.unwrap_err().to_string();
    assert!(error.contains("predictions/shard-00001.parquet") && error.contains("delete it"), "{error}");
}
