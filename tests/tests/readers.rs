//! Independent programs read the outputs directly.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::process::Command;

use elbo_tests::{elbo, job_flags, predictions, python, root, run_ok, some_images};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The rows on which DuckDB, pyarrow, Polars, pandas and Hugging Face datasets agree.
fn read(out: &Path) -> Value {
    let home = TempDir::new().unwrap();
    let mut reader = Command::new(python("readers/requirements.txt"));
    reader.env("HF_HUB_OFFLINE", "1").env("HF_HOME", home.path());
    let output = run_ok(reader.arg(root().join("tests/readers/read_predictions.py")).arg(out));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Twenty digits and a file that is not an image, in shards of eight.
fn label(images: &Path, out: &Path, more: &[&str]) {
    let mut flags = job_flags(images, out);
    let at = flags.iter().position(|flag| flag == "--shard-size").unwrap();
    flags[at + 1] = "8".to_owned();
    run_ok(elbo().arg("label").args(flags).args(more));
}

/// The rows as this program reads them.
fn expected(out: &Path) -> Vec<Value> {
    let row = |row: elbo_core::prediction::Prediction| {
        let (labelled, scores) = (row.labelled(), row.scores());
        json!([
            row.sample.0,
            row.key,
            row.label,
            labelled.map(|l| l.class_name.clone()),
            labelled.map(|l| l.class.0),
            labelled.and_then(|l| l.margin),
            row.evaluations,
            if labelled.is_some() { "ok" } else { "quarantined" },
            row.error(),
            scores.len(),
            scores.get(1).map(|s| s.class.0),
            scores.get(1).map(|s| s.mean_error),
            scores.get(1).is_some_and(|s| s.std_error.is_some()),
        ])
    };
    predictions(out).into_iter().map(row).collect()
}

/// The value with its numbers in single precision, as in the files: a double that was printed and parsed may differ in its last
/// digit.
fn single(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(single).collect(),
        Value::Number(number) if number.is_f64() => json!(number.as_f64().map(|double| double as f32)),
        other => other,
    }
}

#[test]
fn five_programs_read_the_same_predictions() {
    let digits = some_images(2);
    std::fs::write(digits.path().join("one/broken.png"), b"no image").unwrap();
    let outs = TempDir::new().unwrap();
    let (all, two) = (outs.path().join("all"), outs.path().join("two"));
    label(digits.path(), &all, &[]);
    label(digits.path(), &two, &["--top-k", "2"]);

    for (out, kept) in [(&all, 10), (&two, 2)] {
        let seen = read(out);
        assert_eq!(single(seen["rows"].clone()), single(expected(out).into()));
        let counts = seen["by_reader"].as_object().unwrap();
        assert_eq!(counts.len(), 5);
        assert!(counts.values().all(|rows| *rows == 21), "{seen}");
        let broken = seen["rows"].as_array().unwrap().iter().filter(|row| row[7] == "quarantined");
        let broken: Vec<_> = broken.map(|row| (row[1].as_str(), row[3].is_null(), row[9].as_u64())).collect();
        assert_eq!(broken, [(Some("one/broken.png"), true, Some(0))]);
        assert!(seen["rows"].as_array().unwrap().iter().all(|row| row[7] == "quarantined" || row[9] == kept), "{seen}");

        // The metadata of a file.
        let job: Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
        let said = &seen["metadata"];
        assert_eq!(said["elbo.fingerprint"], job["fingerprint"]);
        assert_eq!(said["elbo.version"], job["versions"]["elbo"]);
        assert_eq!(said["elbo.protocol"], job["versions"]["protocol"].to_string());
        assert_eq!(said["elbo.top_k"].as_str(), (kept == 2).then_some("2"));
        let names = seen["names"].as_array().unwrap();
        let zero = json!([0, "zero"]);
        assert!(names.len() == 10 && names.contains(&zero), "{names:?}");

        // Every file has statistics of its columns, so that readers can skip files.
        let ids: Vec<_> = seen["statistics"].as_array().unwrap().iter().filter(|s| s[0] == "sample_id").collect();
        assert_eq!(ids, [&json!(["sample_id", 0, 7]), &json!(["sample_id", 8, 15]), &json!(["sample_id", 16, 20])]);
        assert_eq!(seen["statistics"].as_array().unwrap().len(), 6, "{seen}");
    }

    let columns = read(&all)["columns"].clone();
    let types = [
        ("sample_id", "uint64"),
        ("key", "string"),
        ("label", "string"),
        ("predicted_class", "string"),
        ("predicted_index", "int32"),
        ("confidence", "float"),
        ("margin", "float"),
        ("evaluations", "uint32"),
        ("status", "string"),
        ("error", "string"),
    ];
    for (name, kind) in types {
        assert_eq!(columns[name], kind, "{name}");
    }
    let scores = columns["scores"].as_str().unwrap();
    for field in ["class_index: int32", "mean_error: float", "std_error: float", "n: uint32", "round: uint16"] {
        assert!(scores.contains(field), "{scores}");
    }
}
