//! Independent programs read the outputs as they are.

use std::process::Command;

use elbo_tests::{elbo, job_flags, python, root, run_ok, some_images};
use tempfile::TempDir;

#[test]
fn pyarrow_and_duckdb_read_the_predictions() {
    let digits = some_images(2);
    std::fs::write(digits.path().join("one/broken.png"), b"no image").unwrap();
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    run_ok(elbo().arg("label").args(job_flags(digits.path(), &out)));

    let mut reader = Command::new(python("readers/requirements.txt"));
    let output = run_ok(reader.arg(root().join("tests/readers/read_predictions.py")).arg(&out));
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((seen["pyarrow"]["rows"].as_u64(), seen["duckdb"]["rows"].as_u64()), (Some(21), Some(21)));
    assert!(seen["pyarrow"]["accuracy"].as_f64() > Some(0.8), "{seen}");
    let columns = seen["pyarrow"]["columns"].as_object().unwrap();
    let expected = [
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
    for (name, kind) in expected {
        assert_eq!(columns[name], kind, "{name}");
    }
    let scores = columns["scores"].as_str().unwrap();
    for field in ["class_index: int32", "mean_error: float", "std_error: float", "n: uint32", "round: uint16"] {
        assert!(scores.contains(field), "{scores}");
    }
}
