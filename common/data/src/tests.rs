use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use elbo_core::sample::{Part, Sample};
use elbo_store::Store;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as Outcome,
};
use tempfile::TempDir;
use url::Url;

use super::*;

fn dataset(files: &[&str]) -> TempDir {
    let root = TempDir::new().unwrap();
    for file in files {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
    root
}

async fn list_dir(
    root: &TempDir,
    labels: Option<&LabelSource>,
    limit: Option<u64>,
) -> Result<Vec<Sample>, DatasetError> {
    let options = ListOptions { label_from: labels, limit, ..ListOptions::default() };
    list_all(root.path().to_str().unwrap(), &options).await
}

async fn list_all(source: &str, options: &ListOptions<'_>) -> Result<Vec<Sample>, DatasetError> {
    let mut samples = Vec::new();
    let listed = list(source, options, &mut samples).await?;
    assert_eq!(listed.samples, samples.len() as u64);
    Ok(samples)
}

fn keys(samples: &[Sample]) -> Vec<&str> {
    samples.iter().map(|s| s.key.as_str()).collect()
}

#[tokio::test]
async fn images_are_listed_recursively_and_sorted_by_key() {
    let root =
        dataset(&["dog/b.JPG", "cat/0.png", "cat/deep/1.webp", "a.tiff", "notes.txt", ".git/x.png", "cat/.x.png"]);
    let samples = list_dir(&root, None, None).await.unwrap();
    assert_eq!(keys(&samples), ["a.tiff", "cat/0.png", "cat/deep/1.webp", "dog/b.JPG"]);
    assert_eq!(samples.iter().map(|s| s.id.0).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(samples[1].size, 9);
    assert!(samples.iter().all(|s| s.etag.is_some() && s.label.is_none()));
    assert_eq!(&read_object(&samples[1].location).await.unwrap()[..], b"cat/0.png");
}

#[tokio::test]
async fn files_in_a_directory_that_are_not_images_are_counted() {
    let root = dataset(&[
        "cat/0.png",
        "cat/1.jfif",
        "notes.txt",
        ".git/x.png",
        "cat/.x.png",
        "cat/@eaDir/0.png",
        "__MACOSX/0.png",
        "0.avif",
        "cat/1.AVIF",
        "README",
    ]);
    let mut samples = Vec::new();
    let listed = list(root.path().to_str().unwrap(), &ListOptions::default(), &mut samples).await.unwrap();
    assert_eq!((listed.samples, keys(&samples)), (2, vec!["cat/0.png", "cat/1.jfif"]));
    let expected = "hidden, or left by an operating system: 4 (.git, __MACOSX, cat/.x.png, ...); no extension: 1 (README); \
                    extension .avif: 2 (0.avif, cat/1.AVIF); extension .txt: 1 (notes.txt)";
    assert_eq!(listed.passed_over.to_string(), expected);
    // Files that a pattern does not match are not reported.
    let pattern = root.path().join("cat/*.png");
    let listed = list(pattern.to_str().unwrap(), &ListOptions::default(), &mut samples).await.unwrap();
    assert_eq!(listed.passed_over.to_string(), "hidden, or left by an operating system: 1 (.x.png)");
}

#[tokio::test]
async fn the_limit_takes_the_first_of_the_sorted_listing() {
    let root = dataset(&["c.png", "a.png", "b.png"]);
    assert_eq!(keys(&list_dir(&root, None, Some(2)).await.unwrap()), ["a.png", "b.png"]);
}

#[tokio::test]
async fn the_parent_directory_is_the_label() {
    let root = dataset(&["cat/0.png", "train/dog/1.png", "top.png"]);
    let samples = list_dir(&root, Some(&LabelSource::Parent), None).await.unwrap();
    let labels: Vec<_> = samples.iter().map(|s| s.label.as_deref()).collect();
    assert_eq!(labels, [Some("cat"), None, Some("dog")]);
    let classes = Classes::parse("cat", &[]).unwrap();
    let mut unknown = UnknownLabels::default();
    samples.iter().for_each(|sample| unknown.note(sample, &classes));
    assert_eq!(unknown.into_sorted(), [("dog".to_owned(), 1, "train/dog/1.png".to_owned())]);
}

#[tokio::test]
async fn a_label_file_labels_the_keys_it_names() {
    let root = dataset(&["0.png", "1.png"]);
    let from = |text: &str| {
        let path = root.path().join("labels.csv");
        fs::write(&path, text).unwrap();
        LabelSource::File(path)
    };
    let samples = list_dir(&root, Some(&from("label,key\ncat,./1.png\ndog,9.png\n")), None).await.unwrap();
    assert_eq!(samples.iter().map(|s| s.label.as_deref()).collect::<Vec<_>>(), [None, Some("cat")]);

    for (text, message) in [
        ("name,label\n0.png,cat\n", "must name the columns key,label, and names name, label"),
        ("key,label\n0.png,cat\n0.png,dog\n", "line 3: '0.png' is labelled 'dog' here and 'cat' in line 2"),
        ("key,label\nimages/0.png,cat\n", "like '0.png'"),
    ] {
        let error = list_dir(&root, Some(&from(text)), None).await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let missing = LabelSource::File("/no/such.csv".into());
    assert!(list_dir(&root, Some(&missing), None).await.unwrap_err().to_string().contains("/no/such.csv"));
}

#[tokio::test]
async fn rows_of_a_label_file_that_name_no_image_are_counted() {
    let root = dataset(&["cat/0.png", "cat/1.png"]);
    let labels = TempDir::new().unwrap();
    let path = labels.path().join("labels.csv");
    fs::write(&path, "key,label\ncat/1.png,cat\ngone.png,dog\ncat/0.PNG,owl\n").unwrap();
    let from = LabelSource::File(path);
    let of = async |limit| {
        let options = ListOptions { label_from: Some(&from), limit, ..ListOptions::default() };
        let mut samples = Vec::new();
        list(root.path().to_str().unwrap(), &options, &mut samples).await.unwrap().passed_over.to_string()
    };
    assert_eq!(of(None).await, "row of the label file that names no image: 2 (gone.png, cat/0.PNG)");
    // With a limit, unmatched rows are expected.
    assert_eq!(of(Some(1)).await, "");
}

#[tokio::test]
async fn an_error_about_a_source_without_images_says_what_was_expected() {
    let error = list_all("/no/such/images", &ListOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/images does not exist"), "{error}");
    let root = dataset(&["a.txt", "b.csv", "train.tar.gz"]);
    let error = list_dir(&root, None, None).await.unwrap_err().to_string();
    let says = [
        "extension .csv: 1 (b.csv)",
        "extension .gz, which must be unpacked to be read: 1 (train.tar.gz)",
        ".png .jpg",
    ];
    assert!(says.iter().all(|text| error.contains(text)), "{error}");
    let file = root.path().join("a.png.gz");
    fs::write(&file, "x").unwrap();
    let error = list_all(file.to_str().unwrap(), &ListOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("is a file"), "{error}");
}

#[tokio::test]
async fn empty_files_are_listed() {
    let root = dataset(&["a.png"]);
    fs::write(root.path().join("empty.png"), "").unwrap();
    let samples = list_dir(&root, None, None).await.unwrap();
    assert_eq!((samples[1].key.as_str(), samples[1].size), ("empty.png", 0));
}

#[cfg(unix)]
#[tokio::test]
async fn links_are_followed_unless_they_form_a_cycle() {
    use std::os::unix::fs::symlink;
    let elsewhere = dataset(&["x.png", "more/y.png"]);
    let root = dataset(&["a.png"]);
    symlink(elsewhere.path().join("x.png"), root.path().join("b.png")).unwrap();
    symlink(elsewhere.path().join("more"), root.path().join("cat")).unwrap();
    symlink("/no/such/image", root.path().join("gone.png")).unwrap();
    let samples = list_dir(&root, None, None).await.unwrap();
    assert_eq!(keys(&samples), ["a.png", "b.png", "cat/y.png", "gone.png"]);
    assert_eq!(samples[3].etag, None);

    symlink(root.path(), root.path().join("loop")).unwrap();
    assert!(matches!(list_dir(&root, None, None).await, Err(DatasetError::Cycle(_))));
}

#[tokio::test]
async fn keys_are_sorted_as_a_whole_across_directories() {
    let root = dataset(&["a/x.png", "a-b/x.png", "a.png", "a0/x.png", "a/b/x.png", "a/b.png", "é.png"]);
    let samples = list_dir(&root, None, None).await.unwrap();
    let mut sorted = keys(&samples);
    sorted.sort_unstable();
    assert_eq!(keys(&samples), sorted);
    assert_eq!(sorted.len(), 7);
}

#[tokio::test]
async fn patterns_name_files_and_directories() {
    let root = dataset(&["train/cat/0.png", "train/dog/1.jpg", "val/cat/2.png", "test/cat/3.png"]);
    let at = |pattern: &str| format!("{}/{pattern}", root.path().display());
    for (pattern, expected) in [
        ("{val,train}", vec!["val/cat/2.png", "train/cat/0.png", "train/dog/1.jpg"]),
        ("t*", vec!["test/cat/3.png", "train/cat/0.png", "train/dog/1.jpg"]),
        ("**/*.jpg", vec!["train/dog/1.jpg"]),
        ("*/cat/[02].png", vec!["train/cat/0.png", "val/cat/2.png"]),
        ("train/cat/0.png", vec!["0.png"]),
    ] {
        let samples = list_all(&at(pattern), &ListOptions::default()).await.unwrap();
        assert_eq!(keys(&samples), expected, "{pattern}");
        assert!(samples.iter().all(|s| s.location.ends_with(&s.key)));
    }
    for (pattern, message) in [
        ("{train,t*}", "there are two images named train/cat/0.png"),
        ("*/bird", "no image in"),
        ("{val,nowhere}", "nowhere does not exist"),
    ] {
        let error = list_all(&at(pattern), &ListOptions::default()).await.unwrap_err().to_string();
        assert!(error.contains(message), "{pattern}: {error}");
    }
}

#[tokio::test]
async fn files_of_several_kinds_are_refused_with_a_pattern_that_selects_one() {
    let root = dataset(&["0.png", "old/backup.tar"]);
    let error = list_dir(&root, None, None).await.unwrap_err().to_string();
    assert!(error.contains("images (0.png) and tar shards (old/backup.tar)"), "{error}");
    assert!(error.contains("/**/*.png'"), "{error}");
}

#[tokio::test]
async fn images_without_captions_are_refused_with_candidates() {
    let root = dataset(&["0.png"]);
    let options = ListOptions { candidates: Some("captions"), ..ListOptions::default() };
    let error = list_all(root.path().to_str().unwrap(), &options).await.unwrap_err().to_string();
    assert!(error.contains("have no 'captions'"), "{error}");
}

#[tokio::test]
async fn labels_in_a_list_can_be_ignored() {
    let root = dataset(&["0.png"]);
    let csv = root.path().join("list.csv");
    fs::write(&csv, "path,label,breed\n0.png,cat,7\n").unwrap();
    for (from, label) in [(None, Some("cat")), (Some("none"), None), (Some("column:breed"), Some("7"))] {
        let from = from.map(LabelSource::from);
        let options = ListOptions { label_from: from.as_ref(), ..ListOptions::default() };
        let samples = list_all(csv.to_str().unwrap(), &options).await.unwrap();
        assert_eq!(samples[0].label.as_deref(), label);
    }
}

/// Lists objects from the last to the first.
#[derive(Debug)]
struct Backwards(InMemory);

impl std::fmt::Display for Backwards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("backwards")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Backwards {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Outcome<PutResult> {
        self.0.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Outcome<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Outcome<GetResult> {
        self.0.get_opts(path, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Outcome<Path>>) -> BoxStream<'static, Outcome<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Outcome<ObjectMeta>> {
        let objects = self.0.list(prefix).collect::<Vec<_>>();
        objects.map(|objects| futures::stream::iter(objects.into_iter().rev())).flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Outcome<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Outcome<()> {
        self.0.copy_opts(from, to, options).await
    }
}

async fn poured(
    store: Arc<dyn object_store::ObjectStore>,
    url: &Url,
    order: Order,
) -> (Result<(), WalkError>, Vec<Sample>) {
    let store = Store::from_parts(store, Location::Remote(url.clone()));
    let mut samples = Vec::new();
    let mut collector = Collector::new(&ListOptions::default(), &mut samples).unwrap();
    let mut intake = Intake::new("source".into(), &mut collector);
    let walked = walk::walk_remote(&store, url, "", |_| true, order, &mut intake).await;
    (walked, samples)
}

#[tokio::test]
async fn objects_get_urls_that_lead_back_to_them() {
    let memory = Arc::new(InMemory::new());
    let url = Url::parse("s3://user:secret@bucket/images?token=secret").unwrap();
    let store = Store::from_parts(memory.clone(), Location::Remote(url.clone()));
    for key in ["cat/a b#1%.png", "cat/.hidden/x.png", "list.txt"] {
        store.write(&Path::parse(key).unwrap(), Bytes::from_static(b"x")).await.unwrap();
    }
    let (walked, samples) = poured(memory, &url, Order::AsListed).await;
    walked.unwrap();
    assert_eq!(keys(&samples), ["cat/a b#1%.png"]);
    assert_eq!(samples[0].location, "s3://bucket/images/cat/a%20b%231%25.png");
    let back = Url::parse(&samples[0].location).unwrap();
    assert_eq!(Path::from_url_path(back.path()).unwrap().as_ref(), "images/cat/a b#1%.png");
}

#[tokio::test]
async fn objects_listed_out_of_order_are_sorted() {
    let url = Url::parse("s3://bucket/images").unwrap();
    let memory = InMemory::new();
    for key in ["a.png", "b.png", "c.png"] {
        memory.put(&Path::from(key), Bytes::from_static(b"x").into()).await.unwrap();
    }
    let store = Arc::new(Backwards(memory));
    assert!(matches!(poured(store.clone(), &url, Order::AsListed).await.0, Err(WalkError::OutOfOrder)));
    let (walked, samples) = poured(store, &url, Order::Sorted).await;
    walked.unwrap();
    assert_eq!(keys(&samples), ["a.png", "b.png", "c.png"]);
}

fn make_pipe(path: &std::path::Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[tokio::test]
async fn pipes_in_a_directory_are_passed_over_and_those_that_are_named_are_errors() {
    let root = dataset(&["a.png", "c.png"]);
    for name in ["b.png", "d.txt", "shard.tar", "images.csv"] {
        make_pipe(&root.path().join(name));
    }
    let samples = list_dir(&root, None, None).await.unwrap();
    assert_eq!(keys(&samples), ["a.png", "c.png"]);
    let error = async |name: &str| {
        let source = root.path().join(name);
        list_all(source.to_str().unwrap(), &ListOptions::default()).await.unwrap_err().to_string()
    };
    for name in ["b.png", "{a,b}.png", "shard.tar"] {
        assert!(error(name).await.contains("is a named pipe"), "{name}");
    }
    fs::write(root.path().join("list.txt"), "a.png\nb.png\n").unwrap();
    let error = error("list.txt").await;
    assert!(error.contains("line 2") && error.contains("is a named pipe"), "{error}");
}

#[tokio::test]
async fn a_file_that_has_become_a_pipe_is_an_error_when_it_is_read() {
    let root = TempDir::new().unwrap();
    let pipe = root.path().join("a");
    make_pipe(&pipe);
    let location = pipe.to_str().unwrap().to_owned();
    let parts = [None, Some(Part::Member { offset: 0 }), Some(Part::Cell { row: 0, column: "image".into() })];
    for part in parts {
        let image = Image { location: location.clone(), part, size: 0, etag: None };
        let error = Reader::new().read(&image).await.unwrap_err();
        assert!(error.to_string().contains("a named pipe") && !error.is_transient(), "{error}");
    }
}
