use std::io::{Cursor, SeekFrom};
use std::sync::{Arc, Mutex};

use elbo_core::sample::Sample;
use elbo_store::Store;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::super::{LabelSource, list as list_source};
use super::*;

/// A tar archive of these members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn usual() -> Vec<u8> {
    archive(&[
        ("000.jpg", b"first image"),
        ("000.cls", b"7\n"),
        ("000.txt", b"a cat\n"),
        ("sub/001.json", br#"{"label": "dog", "captions": ["a dog", "a cat"], "breed": 3}"#),
        ("sub/001.png", b"second"),
        ("sub/._001.png", b"junk"),
        ("002.seg.png", b"mask"),
        ("002.webp", b"third"),
        ("002.txt", b"an owl\n\na fox\n"),
        ("003.json", b"{}"),
        ("README", b"no sample"),
    ])
}

async fn list_shard(bytes: &[u8], options: &ListOptions<'_>) -> Result<Vec<Sample>, DatasetError> {
    Ok(account_of(bytes, options).await?.0)
}

/// The samples, and what was passed over.
async fn account_of(bytes: &[u8], options: &ListOptions<'_>) -> Result<(Vec<Sample>, String), DatasetError> {
    let root = TempDir::new().unwrap();
    let path = root.path().join("shard-0.tar");
    std::fs::write(&path, bytes).unwrap();
    let mut samples = Vec::new();
    let listed = list_source(path.to_str().unwrap(), options, &mut samples).await?;
    assert_eq!(listed.samples, samples.len() as u64);
    let reader = Reader::new();
    for sample in &samples {
        // The listed members are the ones that are read.
        let image = reader.read(&sample.into()).await.unwrap();
        assert_eq!(image.len() as u64, sample.size);
        assert!(["first image", "second", "third"].map(str::as_bytes).contains(&&image[..]) || sample.size > 100);
    }
    Ok((samples, listed.passed_over.to_string()))
}

#[tokio::test]
async fn members_with_equal_names_up_to_the_first_dot_are_a_sample() {
    let samples = list_shard(&usual(), &ListOptions::default()).await.unwrap();
    let seen: Vec<_> = samples.iter().map(|s| (s.key.as_str(), s.size, s.label.as_deref())).collect();
    assert_eq!(
        seen,
        [
            ("shard-0.tar/000.jpg", 11, Some("7")),
            ("shard-0.tar/sub/001.png", 6, Some("dog")),
            ("shard-0.tar/002.webp", 5, Some("an owl\n\na fox")),
        ]
    );
    assert!(samples.iter().all(|s| s.etag.is_some()));
}

#[tokio::test]
async fn labels_come_from_the_named_member_or_field() {
    for (from, expected) in [
        ("none", [None, None, None]),
        ("column:txt", [Some("a cat"), None, Some("an owl\n\na fox")]),
        ("column:breed", [None, Some("3"), None]),
    ] {
        let from = LabelSource::from(from);
        let options = ListOptions { label_from: Some(&from), ..ListOptions::default() };
        let samples = list_shard(&usual(), &options).await.unwrap();
        assert_eq!(samples.iter().map(|s| s.label.as_deref()).collect::<Vec<_>>(), expected, "{from}");
    }
}

#[tokio::test]
async fn captions_come_from_lines_or_from_a_list() {
    let members: [(&str, &[u8]); 5] = [
        ("0.jpg", b"first image"),
        ("0.txt", b"a cat\na dog\n"),
        ("0.cls", b"1"),
        ("1.jpg", b"second"),
        ("1.json", br#"{"txt": ["x", "y", "z"]}"#),
    ];
    let options = ListOptions { candidates: Some("txt"), ..ListOptions::default() };
    let samples = list_shard(&archive(&members), &options).await.unwrap();
    assert_eq!(samples[0].candidates, ["a cat", "a dog"]);
    // A position among the captions.
    assert_eq!(samples[0].label.as_deref(), Some("a dog"));
    assert_eq!(samples[1].candidates, ["x", "y", "z"]);

    for (name, message) in [
        ("captions", "neither a .captions nor a list"),
        ("cls", "a sample 1 that can't be used: it has neither a .cls"),
    ] {
        let options = ListOptions { candidates: Some(name), ..ListOptions::default() };
        let error = list_shard(&archive(&members), &options).await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[tokio::test]
async fn a_truncated_shard_is_refused_wherever_it_was_cut() {
    let image = [1; 3000];
    let whole = archive(&[("0.jpg", b"first image"), ("0.cls", b"1"), ("1.jpg", &image)]);
    let ends = whole.len() - 1024;
    for length in [ends + 100, ends, ends - 100, ends - 3072, ends - 3072 - 200, 512 + 5, 100] {
        let error = list_shard(&whole[..length], &ListOptions::default()).await.unwrap_err().to_string();
        let says = ["cut off", "damaged", "no image in"].iter().any(|text| error.contains(text));
        assert!(says && error.contains("shard-0.tar"), "{length}: {error}");
    }
    // One block of zeros is enough.
    assert_eq!(list_shard(&whole[..ends + 512], &ListOptions::default()).await.unwrap().len(), 2);
}

#[tokio::test]
async fn an_error_names_a_member_beyond_the_end_of_the_archive() {
    let whole = archive(&[("0.jpg", &[1; 3000]), ("1.jpg", &[2; 3000])]);
    let error = list_shard(&whole[..5000], &ListOptions::default()).await.unwrap_err().to_string();
    assert!(error.contains("in the middle of its member 1.jpg"), "{error}");
}

#[tokio::test]
async fn invalid_archives_are_refused() {
    let mut lie = archive(&[("0.jpg", b"first image")]);
    let mut header = Header::new_gnu();
    header.set_path("0.jpg").unwrap();
    header.set_size(u64::MAX / 2);
    header.set_cksum();
    lie[..512].copy_from_slice(header.as_bytes());
    let not_text = archive(&[("0.jpg", b"first image"), ("0.cls", b"\xff\xfe")]);
    for (bytes, message) in [
        (&b"<html>no archive</html>".repeat(100)[..], "not a tar archive"),
        (&lie, "cut off"),
        (&not_text, "its member 0.cls is not UTF-8"),
    ] {
        let error = list_shard(bytes, &ListOptions::default()).await.unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
    }
}

#[tokio::test]
async fn no_image_or_label_of_a_sample_is_lost_silently() {
    type Members = &'static [(&'static str, &'static [u8])];
    let cases: [(Members, &str); 9] = [
        // Names that differ only after a dot are one sample.
        (
            &[("IMG.01.05_1.png", b"first image"), ("IMG.01.05_2.png", b"first image")],
            "IMG.01.05_1.png and IMG.01.05_2.png are two images",
        ),
        (
            &[("a.input.png", b"first image"), ("a.target.jpg", b"first image")],
            "a.input.png and a.target.jpg are two images",
        ),
        (&[("a.jpg", b"first image"), ("a.JPEG", b"first image")], "a.jpg and a.JPEG are two images"),
        (
            &[("a.jpg", b"first image"), ("b.jpg", b"first image"), ("a.cls", b"1"), ("b.cls", b"2")],
            "a member a.cls separated from others",
        ),
        (
            &[("0.jpg", b"first image"), ("1.txt", b"x"), ("0.jpg", b"first image")],
            "a member 0.jpg separated from others",
        ),
        (&[("0.jpg", b"first image"), ("0.jpg", b"first image")], "its member 0.jpg is there twice"),
        (&[("0.jpg", b"first image"), ("0.cls", b"1"), ("0.cls", b"2")], "two members 0.cls and 0.cls of the sample 0"),
        (&[("0.jpg", b"first image"), ("0.cls", b"1"), ("0.CLS", b"2")], "two members 0.cls and 0.CLS of the sample 0"),
        (&[("notes.md", b"x"), ("0.cls", b"1")], "no image in"),
    ];
    for (members, message) in cases {
        let error = list_shard(&archive(members), &ListOptions::default()).await.unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("shard-0.tar"), "{message}: {error}");
    }
    // Without labels, they cause no error.
    let none = LabelSource::None;
    let without = ListOptions { label_from: Some(&none), ..ListOptions::default() };
    let (samples, passed_over) = account_of(&archive(cases[3].0), &without).await.unwrap();
    assert_eq!((samples.len(), passed_over.as_str()), (2, ""));
}

#[tokio::test]
async fn passed_over_members_are_counted() {
    let members: [(&str, &[u8]); 14] = [
        (".ipynb_checkpoints/0.jpg", b"junk"),
        ("__MACOSX/0.jpg", b"junk"),
        ("@eaDir/0.jpg/x.jpg", b"junk"),
        ("._0.jpg", b"junk"),
        ("0.jfif", b"first image"),
        ("0.cls", b"1"),
        ("1.avif", b"unknown"),
        ("1.cls", b"1"),
        ("2.JPE", b"second"),
        ("2.json", b"{\"label\": "),
        ("3.jpg", b"third"),
        ("3.png", b"mask"),
        ("3.json", b"{\"score\": NaN, \"low\": -Infinity, \"label\": 7}"),
        ("LICENSE", b"free"),
    ];
    let (samples, passed_over) = account_of(&archive(&members), &ListOptions::default()).await.unwrap();
    let seen: Vec<_> = samples.iter().map(|s| (s.key.as_str(), s.label.as_deref())).collect();
    assert_eq!(
        seen,
        [("shard-0.tar/0.jfif", Some("1")), ("shard-0.tar/2.JPE", None), ("shard-0.tar/3.jpg", Some("7"))]
    );
    assert_eq!(
        passed_over,
        "hidden, or left by an operating system: 4 (.ipynb_checkpoints/0.jpg, __MACOSX/0.jpg, @eaDir/0.jpg/x.jpg, ...); \
         no extension: 1 (LICENSE); extension .avif: 1 (1.avif); further image of a sample: 1 (3.png); \
         label or captions without an image: 1 (1.cls); label that can't be read: 1 (2.json)"
    );
    // A .json that is not needed may contain anything.
    let broken: [(&str, &[u8]); 3] = [("0.jpg", b"first image"), ("0.cls", b"1"), ("0.json", b"{")];
    let (samples, passed_over) = account_of(&archive(&broken), &ListOptions::default()).await.unwrap();
    assert_eq!((samples[0].label.as_deref(), passed_over.as_str()), (Some("1"), ""));
    let captions = ListOptions { candidates: Some("json"), ..ListOptions::default() };
    let error = list_shard(&archive(&broken), &captions).await.unwrap_err().to_string();
    assert!(error.contains("its member 0.json is not JSON"), "{error}");
}

#[tokio::test]
async fn a_hard_link_is_the_member_it_refers_to() {
    let mut builder = Builder::new(Vec::new());
    let mut member = |kind: EntryType, name: &str, content: &[u8], target: &str| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        if target.is_empty() {
            header.set_cksum();
            builder.append_data(&mut header, name, content).unwrap();
        } else {
            builder.append_link(&mut header, name, target).unwrap();
        }
    };
    member(EntryType::Regular, "./a.jpg", b"first image", "");
    member(EntryType::Regular, "./a.cls", b"4", "");
    member(EntryType::Link, "./b.jpg", b"", "./a.jpg");
    member(EntryType::Link, "./b.cls", b"", "./a.cls");
    member(EntryType::Symlink, "./c.jpg", b"", "a.jpg");
    member(EntryType::Link, "./d.jpg", b"", "./gone.jpg");
    let (samples, passed_over) = account_of(&builder.into_inner().unwrap(), &ListOptions::default()).await.unwrap();
    let seen: Vec<_> = samples.iter().map(|s| (s.key.as_str(), s.size, s.label.as_deref())).collect();
    assert_eq!(seen, [("shard-0.tar/a.jpg", 11, Some("4")), ("shard-0.tar/b.jpg", 11, Some("4"))]);
    assert_eq!(passed_over, "link to no earlier member: 2 (c.jpg, d.jpg)");
}

#[tokio::test]
async fn empty_and_compressed_archives_are_errors() {
    let gzip = [b"\x1f\x8b\x08\x00\x00".to_vec(), vec![0x1b; 2000]].concat();
    let control = {
        let mut bytes = b"\x1b[31mnot a tar".to_vec();
        bytes.resize(2048, 7);
        bytes
    };
    for (bytes, message) in [
        (archive(&[]), "there is no image in"),
        (gzip, "shard-0.tar is compressed with gzip: decompress it"),
        (control, "is not a tar archive, or is damaged"),
    ] {
        let error = list_shard(&bytes, &ListOptions::default()).await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(!error.chars().any(char::is_control), "{error:?}");
    }
}

#[tokio::test]
async fn long_names_and_other_kinds_of_members_are_read() {
    let long = format!("{}/0.jpg", "directory".repeat(30));
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Directory);
    header.set_size(0);
    header.set_cksum();
    builder.append_data(&mut header, "directory.png/", std::io::empty()).unwrap();
    let mut header = Header::new_ustar();
    header.set_size(11);
    header.set_cksum();
    builder.append_pax_extensions([("path", long.as_bytes())]).unwrap();
    builder.append(&header, &b"first image"[..]).unwrap();
    let samples = list_shard(&builder.into_inner().unwrap(), &ListOptions::default()).await.unwrap();
    assert_eq!(samples.iter().map(|s| s.key.as_str()).collect::<Vec<_>>(), [format!("shard-0.tar/{long}")]);
}

/// A local file that notes how many bytes of it were read.
struct Counted<'a>(Cursor<Vec<u8>>, &'a Mutex<u64>);

impl Read for Counted<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(target)?;
        *self.1.lock().unwrap() += count as u64;
        Ok(count)
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

fn large_images() -> (Vec<u8>, File) {
    let image = vec![7; 200_000];
    let members: Vec<_> = (0..20).map(|i| (format!("{i:03}.jpg"), format!("{i:03}.cls"))).collect();
    let members: Vec<(&str, &[u8])> =
        members.iter().flat_map(|(jpg, cls)| [(jpg.as_str(), &image[..]), (cls.as_str(), &b"1"[..])]).collect();
    let bytes = archive(&members);
    let (key, location) = ("shard.tar".to_owned(), "memory:///shard.tar".to_owned());
    let file = File { key, location, size: bytes.len() as u64, etag: None };
    (bytes, file)
}

#[test]
fn images_are_not_read_to_list_a_shard() {
    let (bytes, file) = large_images();
    let (size, read) = (file.size, Mutex::new(0));
    let wanted = Wanted::new(&ListOptions::default());
    let found = index(&file, Counted(Cursor::new(bytes), &read), size, &wanted).unwrap();
    assert_eq!(found.found.len(), 20);
    assert!(*read.lock().unwrap() < size / 50, "{} of {size}", read.lock().unwrap());
}

#[tokio::test]
async fn a_remote_shard_is_read_by_ranges_and_listed_as_a_local_one() {
    for (bytes, file) in [large_images(), (usual(), File { size: usual().len() as u64, ..large_images().1 })] {
        let (store, path) = (Arc::new(InMemory::new()), Path::from("shard.tar"));
        store.put(&path, bytes.clone().into()).await.unwrap();
        let wanted = Wanted::new(&ListOptions::default());
        let local = index(&file, Cursor::new(bytes), file.size, &wanted).unwrap();
        let ranges = Ranges::new(&Store::from_parts(store, Location::parse("memory:///").unwrap()), path, file.size);
        let remote = tokio::task::spawn_blocking(move || index(&file, ranges, file.size, &wanted)).await.unwrap();
        assert_eq!(remote.unwrap(), local);
    }
}
