use std::fs;

use elbo_core::sample::Sample;
use tempfile::TempDir;

use super::super::{LabelSource, ListOptions, is_list, list};
use super::*;

/// A directory with a list and images.
struct Listed(TempDir);

impl Listed {
    fn new(images: &[&str]) -> Self {
        let root = TempDir::new().unwrap();
        for image in images {
            let path = root.path().join(image);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, image).unwrap();
        }
        Self(root)
    }

    async fn list(&self, name: &str, text: &str, options: ListOptions<'_>) -> Result<Vec<Sample>, DatasetError> {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        let mut samples = Vec::new();
        list(path.to_str().unwrap(), &options, &mut samples).await?;
        Ok(samples)
    }

    async fn error(&self, name: &str, text: &str, candidates: Option<&str>) -> String {
        self.list(name, text, ListOptions { candidates, ..ListOptions::default() }).await.unwrap_err().to_string()
    }
}

fn with_candidates(candidates: &str) -> ListOptions<'_> {
    ListOptions { candidates: Some(candidates), ..ListOptions::default() }
}

#[tokio::test]
async fn a_text_list_names_images_in_its_own_order() {
    let listed = Listed::new(&["b.png", "sub/a.bin"]);
    let absolute = listed.0.path().join("sub/a.bin");
    let text = format!("\u{feff}b.png\n\n  {}  \n", absolute.display());
    let samples = listed.list("images.TXT", &text, ListOptions::default()).await.unwrap();
    let keys: Vec<_> = samples.iter().map(|s| s.key.as_str()).collect();
    assert_eq!(keys, ["b.png", absolute.to_str().unwrap()]);
    assert_eq!(samples[0].location, listed.0.path().join("b.png").to_str().unwrap());
    assert_eq!((samples[1].id.0, samples[1].size), (1, 9));
    assert!(samples.iter().all(|s| s.etag.is_some() && s.label.is_none() && s.candidates.is_empty()));
}

#[tokio::test]
async fn a_csv_list_has_labels_unless_they_come_from_elsewhere() {
    let listed = Listed::new(&["cat/0.png", "dog/1.png"]);
    let text = "note,label,file_name\nx,cat,cat/0.png\n\"y, z\",,./dog/1.png\n";
    let samples = listed.list("l.csv", text, ListOptions::default()).await.unwrap();
    let of = |samples: &[Sample]| samples.iter().map(|s| (s.key.clone(), s.label.clone())).collect::<Vec<_>>();
    let expected = |first: Option<&str>, second: Option<&str>| {
        [("cat/0.png", first), ("./dog/1.png", second)].map(|(key, l)| (key.to_owned(), l.map(str::to_owned)))
    };
    assert_eq!(of(&samples), expected(Some("cat"), None));
    let parent = ListOptions { label_from: Some(&LabelSource::Parent), limit: Some(9), ..ListOptions::default() };
    assert_eq!(of(&listed.list("l.csv", text, parent).await.unwrap()), expected(Some("cat"), Some("dog")));
    let one = ListOptions { limit: Some(1), ..ListOptions::default() };
    assert_eq!(listed.list("l.csv", text, one).await.unwrap().len(), 1);
}

#[tokio::test]
async fn captions_are_a_json_array_or_one_in_each_column() {
    let listed = Listed::new(&["0.png", "1.png"]);
    let json = "path,captions,label,pair_id\n0.png,\"[\"\"a b\"\", \"\"b, a\"\"]\",1,7\n1.png,\"[\"\"c\"\"]\",c,\n";
    let samples = listed.list("l.csv", json, with_candidates("captions")).await.unwrap();
    assert_eq!(samples[0].candidates, ["a b", "b, a"]);
    assert_eq!((samples[0].label.as_deref(), samples[0].pair.as_deref()), (Some("b, a"), Some("7")));
    assert_eq!((samples[1].label.as_deref(), samples[1].pair.as_deref()), (Some("c"), None));

    let columns = "path,c0,c1,c2\n0.png,a,b,\n1.png,a,b,c\n";
    let samples = listed.list("l.csv", columns, with_candidates("c0, c1,c2")).await.unwrap();
    assert_eq!(samples.iter().map(|s| s.candidates.len()).collect::<Vec<_>>(), [2, 3]);
    // Without --candidates the columns are ignored.
    let samples = listed.list("l.csv", json, ListOptions::default()).await.unwrap();
    assert!(samples[0].candidates.is_empty() && samples[0].pair.is_none());
    assert_eq!(samples[0].label.as_deref(), Some("1"));
}

#[tokio::test]
async fn mistakes_name_the_line() {
    let listed = Listed::new(&["0.png", "1.png"]);
    for (text, problem) in [
        ("path\n0.png\n./0.png\n", "line 3: './0.png' is in line 2 already"),
        ("path\n0.png\n2.png\n", "line 3: there is no "),
        ("path\n0.png\n../\n", "is a directory"),
        ("path,label\n0.png,a\n,b\n", "line 3: the path is empty"),
        ("path,label\n0.png\n", "l.csv, line 2: it has 1 field, and the header names 2 columns"),
        ("path,label\r\n0.png,x\r\nmissing.png,y\r\n", "l.csv, line 3: there is no "),
        ("path;label\n\n0.png;a\n;b\n", "line 4: the path is empty"),
        ("path,path\n0.png,a\n", "it has two columns 'path'"),
        ("path\n\"0.png\n1.png\n", "line 2: the quote that opens here is never closed"),
        ("name,label\n0.png,a\n", "one of path, key, image, file_name, filename, url; there are name, label"),
        ("path,label\n", "names no image"),
        ("path\nftp://host/0.png\n", "line 2: reading ftp://host/0.png"),
    ] {
        let error = listed.error("l.csv", text, None).await;
        assert!(error.contains(problem), "{error}");
    }
    for (cell, problem) in [
        ("a cat", "line 2: the column 'captions' must hold the captions as a JSON array"),
        ("[1]", "line 2: the column 'captions'"),
        ("[]", "line 2: there is no caption"),
        ("\"[\"\"a\"\", \"\"\"\"]\"", "line 2: caption 1 is empty"),
        ("\"[\"\"a\"\", \"\"a\"\"]\"", "line 2: the caption 'a' is there twice"),
        ("\"[\"\"b\"\"]\"", "line 2: the label 'x' is none of the captions"),
    ] {
        let error = listed.error("l.csv", &format!("path,label,captions\n0.png,x,{cell}\n"), Some("captions")).await;
        assert!(error.contains(problem), "{error}");
    }
    assert!(listed.error("l.csv", "path\n0.png\n", Some("c")).await.contains("no column 'c'"));
    assert!(listed.error("l.txt", "0.png\n", Some("c")).await.contains("give a .csv or .tsv list"));
    assert!(listed.error("l.txt", "0.png\n2.png\n", None).await.contains("line 2: there is no "));
    let gap = listed.error("l.csv", "path,c0,c1\n0.png,,b\n", Some("c0,c1")).await;
    assert!(gap.contains("line 2: caption 0 is empty"), "{gap}");
}

#[tokio::test]
async fn a_list_reads_the_same_in_every_file_format() {
    let listed = Listed::new(&["im/frame:0001.png", "b.png"]);
    for (name, text) in [
        ("l.csv", "path,label\r\nim/frame:0001.png,zero\r\nb.png,one\r\n"),
        ("l.csv", "\"\";\"File_Name\";\"Label\"\n\"1\";\"im/frame:0001.png\";\"zero\"\n\"2\";\"b.png\";\"one\"\n"),
        ("l.tsv", "label\tpath\nzero\tim/frame:0001.png\none\tb.png\n"),
    ] {
        let samples = listed.list(name, text, ListOptions::default()).await.unwrap();
        let found: Vec<_> = samples.iter().map(|s| (s.key.as_str(), s.label.as_deref())).collect();
        assert_eq!(found, [("im/frame:0001.png", Some("zero")), ("b.png", Some("one"))], "{text:?}");
        assert_eq!(samples[0].location, listed.0.path().join("im/frame:0001.png").to_str().unwrap());
    }
    let captions = listed.list("l.tsv", "Path\tCaptions\nb.png\t[\"a\", \"b\"]\n", with_candidates("captions")).await;
    assert_eq!(captions.unwrap()[0].candidates, ["a", "b"]);
    let plain = listed.list("l.txt", "im/frame:0001.png\rb.png\r", ListOptions::default()).await.unwrap();
    assert_eq!(plain.len(), 2);
}

#[tokio::test]
async fn an_error_names_a_file_in_another_unicode_form() {
    let listed = Listed::new(&["cafe\u{301}.png"]);
    let error = listed.error("l.csv", "path\ncaf\u{e9}.png\n", None).await;
    assert!(error.contains("line 2: there is no ") && error.contains("in another Unicode form (NFD)"), "{error}");
    let accents = "path,c0,c1,label\ncafe\u{301}.png,caf\u{e9},tea,cafe\u{301}\n";
    let samples = listed.list("l.csv", accents, with_candidates("c0,c1")).await.unwrap();
    assert_eq!(samples[0].label.as_deref(), Some("caf\u{e9}"));
    let twice = listed.error("l.csv", "path,c0,c1\ncafe\u{301}.png,caf\u{e9},cafe\u{301}\n", Some("c0,c1")).await;
    assert!(twice.contains("line 2: the caption") && twice.contains("at the positions 0 and 1"), "{twice}");
}

#[tokio::test]
async fn labels_from_elsewhere_are_captions_too() {
    let listed = Listed::new(&["a/0.png"]);
    let text = "path,c0,c1,label\na/0.png,x,a,nonsense\n";
    let options = ListOptions { label_from: Some(&LabelSource::Parent), ..with_candidates("c0,c1") };
    let samples = listed.list("l.csv", text, options).await.unwrap();
    assert_eq!(samples[0].label.as_deref(), Some("a"));
    let text = "path,c0,c1\na/0.png,x,y\n";
    let error = listed.list("l.csv", text, options).await.unwrap_err().to_string();
    assert!(error.contains("the label of a/0.png is 'a', which is none of its captions"), "{error}");
}

#[test]
fn paths_are_relative_to_the_list() {
    let base = |list: &str| Base::of(&Location::parse(list).unwrap());
    let at = |list: &str, key: &str| base(list).locate(key, &[Origin::Any]).unwrap();
    assert_eq!(at("/data/l.csv", "./a/b.png"), Location::Local("/data/a/b.png".into()));
    assert_eq!(at("/data/l.csv", "/x.png"), Location::Local("/x.png".into()));
    assert_eq!(at("/data/l.csv", "im/frame:0001.png"), Location::Local("/data/im/frame:0001.png".into()));
    assert_eq!(at("/data/l.csv", "frame:0001.png"), Location::Local("/data/frame:0001.png".into()));
    let remote = |url: &str| Location::Remote(Url::parse(url).unwrap());
    assert_eq!(at("/data/l.csv", "s3://b/x.png"), remote("s3://b/x.png"));
    assert_eq!(at("s3://b/lists/l.csv", "frame:1.png"), remote("s3://b/lists/frame:1.png"));
    assert_eq!(at("s3://b/lists/l.csv", "img/x y.png"), remote("s3://b/lists/img/x%20y.png"));
    assert_eq!(at("s3://b/lists/l.csv", "https://host/x.png"), remote("https://host/x.png"));
    assert_eq!(at("/data/lists/l.csv", "../images/a.png"), Location::Local("/data/images/a.png".into()));
    assert_eq!(at("s3://b/lists/l.csv", "../images/./x y.png"), remote("s3://b/images/x%20y.png"));
    assert_eq!(at("s3://b/lists/l.csv", "a/../b.png"), remote("s3://b/lists/b.png"));
    assert_eq!(at("https://host/l.csv", "../../b.png"), remote("https://host/b.png"));
}

#[test]
fn a_list_from_the_network_may_name_its_own_origin_and_allowed_ones() {
    let at = |list: &str, key: &str, allowed: &[Origin]| Base::of(&Location::parse(list).unwrap()).locate(key, allowed);
    for (key, flag) in [
        ("/etc/passwd", "--list-origins file://"),
        ("file:///etc/passwd", "--list-origins file://"),
        ("http://169.254.169.254/x.png", "--list-origins http://169.254.169.254"),
        ("s3://another/x.png", "--list-origins s3://another"),
    ] {
        for list in ["https://host/lists/l.txt", "s3://bucket/l.csv"] {
            let error = at(list, key, &[]).unwrap_err();
            assert!(error.contains(key.trim_start_matches("file://")) && error.ends_with(flag), "{error}");
        }
        let allowed = flag.trim_start_matches("--list-origins ").parse().unwrap();
        assert!(at("https://host/lists/l.txt", key, &[allowed]).is_ok());
        // A local list may name anything.
        assert!(at("/data/l.csv", key, &[]).is_ok());
    }
    for key in ["x.png", "../x.png", "https://host/x.png"] {
        let Location::Remote(url) = at("https://host/lists/l.txt", key, &[]).unwrap() else { panic!("{key}") };
        assert_eq!(url.host_str(), Some("host"));
    }
}

#[test]
fn a_list_is_recognised_by_its_name() {
    assert!(
        is_list("images.csv")
            && is_list("a:b.tsv")
            && is_list("s3://b/l.TXT")
            && !is_list("images")
            && !is_list("a.png")
    );
    let directory = TempDir::with_suffix(".csv").unwrap();
    assert!(!is_list(directory.path().to_str().unwrap()));
}
