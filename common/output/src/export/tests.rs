use std::io::Read;
use std::path::Path as FsPath;
use std::sync::Arc;

use elbo_core::ids::{ClassIndex, Round, SampleId, ShardId};
use elbo_core::prediction::{Labelled, Outcome, Score};
use elbo_core::sample::Sample;
use elbo_data::SampleSink;
use elbo_data::manifest::ManifestRecord;
use elbo_data::manifest::ManifestWriter;
use object_store::memory::InMemory;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::layout;
use crate::predictions::encode_predictions;

/// Exports a job whose samples have no captions of their own.
async fn export(out: &Store, spec: &JobSpec, to: &Location, options: ExportOptions) -> Result<Exported, ExportError> {
    super::export(out, spec, &ManifestRecord::default(), to, options).await
}

fn spec(change: Value) -> JobSpec {
    let mut spec = json!({
        "images": "i", "model": "m", "classes": {"names": [[3, "cat"], [7, "dog, wet"], [9, "owl"]], "prompts": []},
        "policy": {"name": "exhaustive", "samples": 1, "trials": 1}, "loss": "l2", "dtype": "f32", "size": null, "seed": 0,
        "noise_scope": "sample", "noise": null, "write_errors": false, "label_from": null, "limit": null, "shard_size": 4,
    });
    for (key, value) in change.as_object().unwrap() {
        spec[key] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

/// Sample 2 is quarantined; for the others the second class is best, with a margin of a quarter.
fn row(id: u64, key: &str) -> Prediction {
    let score = |class, mean_error| Score {
        class: ClassIndex(class),
        mean_error,
        std_error: Some(0.125),
        n: 20,
        round: Round(1),
    };
    let labelled = Labelled {
        class: ClassIndex(7),
        class_name: "dog, wet".into(),
        confidence: None,
        margin: Some(0.25),
        scores: vec![score(7, 0.1), score(9, 0.35), score(3, 0.4)],
    };
    let bad = Outcome::Quarantined { error: "decode: \"cut\noff\"".into() };
    Prediction {
        sample: SampleId(id),
        key: key.into(),
        label: (id == 0).then(|| "dog, wet".into()),
        evaluations: if id == 2 { 0 } else { 60 },
        outcome: if id == 2 { bad } else { Outcome::Labelled(labelled) },
    }
}

/// An output with samples of these keys, four to a shard.
async fn output(keys: &[&str]) -> Store {
    let out = Store::from_parts(Arc::new(InMemory::new()), Location::Local("/out".into()));
    let rows: Vec<_> = (0..).zip(keys).map(|(id, key)| row(id, key)).collect();
    for (shard, rows) in (0..).zip(rows.chunks(4)) {
        let path = layout::predictions(ShardId(shard));
        out.write(&path, encode_predictions(rows, &[]).unwrap()).await.unwrap();
    }
    out
}

fn options(format: Format) -> ExportOptions {
    ExportOptions { format, scores: None, force: false }
}

fn at(directory: &TempDir, name: &str) -> Location {
    Location::Local(directory.path().join(name))
}

fn read_json(path: &FsPath) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// The members of a tar, in order.
fn members(path: &FsPath) -> Vec<(String, Value)> {
    let mut archive = tar::Archive::new(std::fs::File::open(path).unwrap());
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        (entry.path().unwrap().to_string_lossy().into_owned(), serde_json::from_str(&text).unwrap())
    });
    entries.collect()
}

/// Every file below a directory.
fn files(directory: &FsPath) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                found.push(path.strip_prefix(directory).unwrap().to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn csv_has_a_line_for_every_sample_with_its_best_classes() {
    let directory = TempDir::new().unwrap();
    let out = output(&["a/0.png", "a/1.png", "b,2.png", "3.png", "4.png"]).await;
    let to = at(&directory, "new/labels.csv");
    let options = ExportOptions { scores: Some(2), ..options(Format::Csv) };
    let exported = export(&out, &spec(json!({})), &to, options).await.unwrap();
    assert_eq!(exported, Exported { samples: 5, files: 1, skipped: 0 });
    let expected = [
        "key,label,predicted_class,predicted_index,confidence,margin,evaluations,status,error,class_1,error_1,class_2,error_2",
        "a/0.png,\"dog, wet\",\"dog, wet\",7,,0.25,60,ok,,\"dog, wet\",0.1,owl,0.35",
        "a/1.png,,\"dog, wet\",7,,0.25,60,ok,,\"dog, wet\",0.1,owl,0.35",
        "\"b,2.png\",,,,,,0,quarantined,\"decode: \"\"cut\noff\"\"\",,,,",
        "3.png,,\"dog, wet\",7,,0.25,60,ok,,\"dog, wet\",0.1,owl,0.35",
        "4.png,,\"dog, wet\",7,,0.25,60,ok,,\"dog, wet\",0.1,owl,0.35",
        "",
    ];
    assert_eq!(std::fs::read_to_string(to.local().unwrap()).unwrap(), expected.join("\n"));
    assert_eq!(files(directory.path()), ["new/labels.csv"]);
}

#[tokio::test]
async fn an_exported_csv_holds_no_formulas() {
    let directory = TempDir::new().unwrap();
    let out = output(&["=HYPERLINK(\"http://evil/\").png", "@a.png", "-1", "b\u{1b}[2J.png"]).await;
    let to = at(&directory, "labels.csv");
    export(&out, &spec(json!({})), &to, ExportOptions { scores: Some(0), ..options(Format::Csv) }).await.unwrap();
    let text = std::fs::read_to_string(to.local().unwrap()).unwrap();
    let lines: Vec<&str> = text.lines().skip(1).collect();
    let rest = ",\"dog, wet\",7,,0.25,60,ok,";
    assert_eq!(lines[0], format!("\"'=HYPERLINK(\"\"http://evil/\"\").png\",\"dog, wet\"{rest}"));
    assert_eq!(lines[1], format!("'@a.png,{rest}"));
    assert!(lines[2].starts_with("-1,"), "{text}");
    assert!(text.contains("b\\u{1b}[2J.png,"), "{text}");
}

#[tokio::test]
async fn csv_has_no_more_columns_than_a_job_has_classes_or_kept_scores() {
    let out = output(&["0.png"]).await;
    for (change, scores, expected) in [
        (json!({}), None, 3),
        (json!({"top_k": 1}), None, 1),
        (json!({}), Some(0), 0),
        (json!({"top_k": 2}), Some(9), 2),
    ] {
        let directory = TempDir::new().unwrap();
        let to = at(&directory, "labels.csv");
        let options = ExportOptions { scores, ..options(Format::Csv) };
        export(&out, &spec(change), &to, options).await.unwrap();
        let text = std::fs::read_to_string(to.local().unwrap()).unwrap();
        assert_eq!(text.lines().next().unwrap().matches("class_").count(), expected, "{text}");
    }
}

#[tokio::test]
async fn json_is_written_beside_the_image_and_names_the_classes() {
    let directory = TempDir::new().unwrap();
    let keys = ["a/x.v2.png", "plain", "b/50% #1?.jpeg", "../up/../y.png", "https://host//dir/z.jpg?size=1"];
    let out = output(&keys).await;
    let exported = export(&out, &spec(json!({})), &at(&directory, "json"), options(Format::Json)).await.unwrap();
    assert_eq!(exported, Exported { samples: 5, files: 5, skipped: 0 });
    let json = directory.path().join("json");
    let text = std::fs::read_to_string(json.join("a/x.v2.json")).unwrap();
    let expected = concat!(
        r#"{"sample_id":0,"key":"a/x.v2.png","label":"dog, wet","predicted_class":"dog, wet","predicted_index":7,"#,
        r#""confidence":null,"margin":0.25,"evaluations":60,"status":"ok","error":null,"scores":["#,
        r#"{"class":"dog, wet","class_index":7,"mean_error":0.1,"std_error":0.125,"n":20,"round":1},"#,
        r#"{"class":"owl","class_index":9,"mean_error":0.35,"std_error":0.125,"n":20,"round":1},"#,
        r#"{"class":"cat","class_index":3,"mean_error":0.4,"std_error":0.125,"n":20,"round":1}]}"#,
    );
    assert_eq!(text, expected);
    assert_eq!(read_json(&json.join("plain.json"))["key"], "plain");
    let bad = read_json(&json.join("b/50% #1?.json"));
    assert_eq!(
        (&bad["status"], &bad["error"], &bad["scores"]),
        (&json!("quarantined"), &json!("decode: \"cut\noff\""), &json!([]))
    );
    // Nothing is written outside the destination.
    assert_eq!(files(directory.path()).len(), 5);
    assert!(files(directory.path()).iter().all(|file| file.starts_with("json/")));
}

#[tokio::test]
async fn members_of_a_tar_are_exported_to_a_tar_in_order() {
    let directory = TempDir::new().unwrap();
    let keys: Vec<String> = (0..6)
        .map(|i| format!("train/shard-000.tar/{:06}.jpg", 900 - i))
        .chain((0..3).map(|i| format!("train/shard-001.tar/deep/{i}.left.png")))
        .chain(["lone.png".to_owned()])
        .collect();
    let out = output(&keys.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let options = ExportOptions { scores: Some(1), ..options(Format::Json) };
    let exported = export(&out, &spec(json!({})), &at(&directory, ""), options).await.unwrap();
    assert_eq!(exported, Exported { samples: 10, files: 3, skipped: 0 });
    assert_eq!(files(directory.path()), ["lone.json", "train/shard-000.tar", "train/shard-001.tar"]);
    let first = members(&directory.path().join("train/shard-000.tar"));
    let names: Vec<_> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["000900.json", "000899.json", "000898.json", "000897.json", "000896.json", "000895.json"]);
    assert_eq!(first[1].1["key"], "train/shard-000.tar/000899.jpg");
    assert_eq!(first[1].1["scores"].as_array().unwrap().len(), 1);
    assert_eq!(first[2].1["status"], "quarantined");
    // In WebDataset a sample's name ends at the first dot.
    let second = members(&directory.path().join("train/shard-001.tar"));
    assert_eq!(
        second.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["deep/0.json", "deep/1.json", "deep/2.json"]
    );

    // The same job gives the same bytes.
    let again = TempDir::new().unwrap();
    export(&out, &spec(json!({})), &at(&again, ""), options).await.unwrap();
    let tar = |directory: &TempDir| std::fs::read(directory.path().join("train/shard-000.tar")).unwrap();
    assert!(tar(&directory) == tar(&again));
}

#[tokio::test]
async fn samples_that_share_a_place_are_named_and_nothing_is_written() {
    for (keys, expected) in [
        (vec!["a/x.jpg", "a/y.jpg", "b/x.jpg", "c.png", "a/x.png"], ["'a/x.jpg' and 'a/x.png'", "a/x.json"]),
        (vec!["s.tar/1.a.jpg", "s.tar/1.b.jpg"], ["'s.tar/1.a.jpg' and 's.tar/1.b.jpg'", "s.tar/1.json"]),
        (vec!["s.tar/1.jpg", "t.tar/1.jpg", "s.tar/2.jpg"], ["'s.tar/2.jpg' comes after", "s.tar was begun before"]),
    ] {
        let directory = TempDir::new().unwrap();
        let refused = export(&output(&keys).await, &spec(json!({})), &at(&directory, ""), options(Format::Json)).await;
        let message = refused.unwrap_err().to_string();
        assert!(expected.iter().all(|text| message.contains(text)), "{message}");
        assert!(files(directory.path()).is_empty());
        // CSV can hold all of them.
        let csv = export(&output(&keys).await, &spec(json!({})), &at(&directory, "a.csv"), options(Format::Csv)).await;
        assert_eq!(csv.unwrap().samples, keys.len() as u64);
    }
}

#[tokio::test]
async fn a_sample_whose_name_cannot_be_a_file_name_is_left_out_and_the_rest_is_exported() {
    let directory = TempDir::new().unwrap();
    let (long, deep) = ("x".repeat(300), format!("s.tar/{}/../../../../up.jpg", "y".repeat(120)));
    let (long_file, long_member, zero) =
        (format!("{long}.png"), format!("s.tar/{long}.jpg"), format!("s.tar/{}\0.jpg", "z".repeat(120)));
    let keys = [
        "a.png",
        // Its path runs through the file of the previous sample.
        "a.json/b.png",
        &long_file,
        "s.tar/../../etc/passwd.jpg",
        "s.tar//etc/passwd.jpg",
        &deep,
        &zero,
        "s.tar/0.jpg",
        &long_member,
        "s.tar/1.jpg",
        "z.png",
    ];
    let out = output(&keys).await;
    let to = at(&directory, "json");
    let exported = export(&out, &spec(json!({})), &to, options(Format::Json)).await.unwrap();
    assert_eq!(exported, Exported { samples: 5, files: 3, skipped: 6 });
    // Two samples need the same name, one as a file and one as a directory; only one of them is written.
    let mut found = files(directory.path());
    let contested = found.iter().position(|file| file == "json/a.json" || file == "json/a.json/b.json").unwrap();
    found.remove(contested);
    assert_eq!(found, ["json/s.tar", "json/z.json"]);
    let names: Vec<_> = members(&directory.path().join("json/s.tar")).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["0.json".to_owned(), format!("{long}.json"), "1.json".to_owned()]);
    // CSV has a line for each.
    let csv = export(&out, &spec(json!({})), &at(&directory, "a.csv"), options(Format::Csv)).await.unwrap();
    assert_eq!(csv, Exported { samples: 11, files: 1, skipped: 0 });
}

#[tokio::test]
async fn if_case_is_ignored_the_second_of_two_equal_names_has_no_place() {
    let (out, spec, listed) = (
        output(&["A/x.png", "a/X.png", "S.tar/0.jpg", "s.tar/1.jpg"]).await,
        spec(json!({})),
        ManifestRecord::default(),
    );
    let rows = Rows { store: &out, spec: &spec, listed: &listed };
    let placed = async |longest, folds_case| {
        let plan = sidecar::Plan::within(&rows, longest, folds_case).await.unwrap();
        ["A/x.png", "a/X.png", "S.tar/0.jpg", "s.tar/1.jpg"].map(|key| plan.place(key).is_ok())
    };
    assert_eq!(placed(usize::MAX, false).await, [true; 4]);
    assert_eq!(placed(usize::MAX, true).await, [true, false, true, false]);
    // The limit is on the object's name, not on the members of a tar.
    assert_eq!(placed(6, false).await, [false, false, true, true]);
}

#[tokio::test]
async fn existing_files_are_replaced_only_with_force() {
    let directory = TempDir::new().unwrap();
    std::fs::create_dir(directory.path().join("a")).unwrap();
    std::fs::write(directory.path().join("a/1.json"), "mine").unwrap();
    std::fs::write(directory.path().join("a/other.json"), "mine too").unwrap();
    std::fs::write(directory.path().join("labels.csv"), "mine").unwrap();
    let out = output(&["a/0.png", "a/1.png"]).await;
    for (format, name) in [(Format::Json, ""), (Format::Csv, "labels.csv")] {
        let refused =
            export(&out, &spec(json!({})), &at(&directory, name), options(format)).await.unwrap_err().to_string();
        assert!(refused.contains("has 1 of the files") && refused.contains("--force"), "{refused}");
        assert_eq!(files(directory.path()), ["a/1.json", "a/other.json", "labels.csv"]);
        let force = ExportOptions { force: true, ..options(format) };
        export(&out, &spec(json!({})), &at(&directory, name), force).await.unwrap();
        let _ = std::fs::remove_file(directory.path().join("a/0.json"));
    }
    assert_eq!(read_json(&directory.path().join("a/1.json"))["key"], "a/1.png");
    assert_eq!(std::fs::read_to_string(directory.path().join("a/other.json")).unwrap(), "mine too");
    assert!(std::fs::read_to_string(directory.path().join("labels.csv")).unwrap().starts_with("key,"));
}

#[tokio::test]
async fn destinations_a_format_cannot_use_are_refused() {
    let directory = TempDir::new().unwrap();
    let out = output(&["0.png"]).await;
    let refused = |error: Result<Exported, ExportError>| error.unwrap_err().to_string();
    let csv = export(&out, &spec(json!({})), &at(&directory, ""), options(Format::Csv)).await;
    assert!(refused(csv).contains("is a directory"));
    let bucket = Location::parse("s3://bucket/").unwrap();
    assert!(refused(export(&out, &spec(json!({})), &bucket, options(Format::Csv)).await).contains("give its name"));
    let own = export(&out, &spec(json!({})), &Location::Local("/out".into()), options(Format::Json)).await;
    assert!(refused(own).contains("among the job's own"));
}

#[tokio::test]
async fn a_samples_own_captions_are_its_class_names() {
    let directory = TempDir::new().unwrap();
    let out = output(&["0.png", "1.png"]).await;
    let caption = |id: u64| (0..10).map(|k| format!("caption {k} of {id}")).collect();
    let samples: Vec<_> = (0..3)
        .map(|id| Sample {
            id: SampleId(id),
            key: format!("{id}.png"),
            location: String::new(),
            part: None,
            size: 1,
            etag: None,
            label: None,
            candidates: caption(id),
            pair: None,
        })
        .collect();
    let mut manifest = ManifestWriter::new(4);
    samples.into_iter().for_each(|sample| manifest.take(sample).unwrap());
    let (files, listed) = manifest.finish().unwrap();
    for (path, bytes) in files {
        out.write(&path, bytes).await.unwrap();
    }
    let of_captions = spec(json!({"candidates": "texts", "shard_size": 4, "classes": {"names": [], "prompts": []}}));
    let csv = at(&directory, "labels.csv");
    let scores = Some(2);
    let options = |format| ExportOptions { format, scores, force: false };
    // The third sample has no row yet.
    assert_eq!(super::export(&out, &of_captions, &listed, &csv, options(Format::Csv)).await.unwrap().samples, 2);
    let text = std::fs::read_to_string(csv.local().unwrap()).unwrap();
    assert!(text.ends_with("caption 7 of 1,0.1,caption 9 of 1,0.35\n"), "{text}");
    super::export(&out, &of_captions, &listed, &at(&directory, "json"), options(Format::Json)).await.unwrap();
    assert_eq!(read_json(&directory.path().join("json/0.json"))["scores"][1]["class"], "caption 9 of 0");
}
