use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use tempfile::TempDir;
use url::Url;

use super::*;
use crate::class::Classes;

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
    list(root.path().to_str().unwrap(), &options).await
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
    assert_eq!(unknown_labels(&samples, &classes), [("dog".to_owned(), 1, "train/dog/1.png".to_owned())]);
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
        ("name,label\n0.png,cat\n", "no column 'key'"),
        ("key,label\n0.png,cat\n0.png,dog\n", "line 3: '0.png' is labelled 'dog' here and 'cat' above"),
        ("key,label\nimages/0.png,cat\n", "like '0.png'"),
    ] {
        let error = list_dir(&root, Some(&from(text)), None).await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let missing = LabelSource::File("/no/such.csv".into());
    assert!(list_dir(&root, Some(&missing), None).await.unwrap_err().to_string().contains("/no/such.csv"));
}

#[tokio::test]
async fn sources_without_images_say_what_was_looked_for() {
    let error = list("/no/such/images", &ListOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/images does not exist"), "{error}");
    let root = dataset(&["a.txt", "b.csv"]);
    let error = list_dir(&root, None, None).await.unwrap_err().to_string();
    assert!(error.contains("2 other files") && error.contains(".png .jpg"), "{error}");
    let file = root.path().join("a.png.gz");
    fs::write(&file, "x").unwrap();
    let error = list(file.to_str().unwrap(), &ListOptions::default()).await.unwrap_err().to_string();
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
async fn links_are_followed_unless_they_lead_in_a_circle() {
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
async fn objects_get_urls_that_lead_back_to_them() {
    let memory = Arc::new(InMemory::new());
    let url = Url::parse("s3://user:secret@bucket/images?token=secret").unwrap();
    let store = Store::from_parts(memory, Location::Remote(url.clone()));
    for key in ["cat/a b#1%.png", "cat/.hidden/x.png", "list.txt"] {
        store.write(&Path::parse(key).unwrap(), Bytes::from_static(b"x")).await.unwrap();
    }
    let (found, others) = directory::list_store(&store, &url).await.unwrap();
    assert_eq!(others, 1);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].key, "cat/a b#1%.png");
    assert_eq!(found[0].location, "s3://bucket/images/cat/a%20b%231%25.png");
    let back = Url::parse(&found[0].location).unwrap();
    assert_eq!(Path::from_url_path(back.path()).unwrap().as_ref(), "images/cat/a b#1%.png");
}
