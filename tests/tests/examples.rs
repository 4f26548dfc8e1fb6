//! Each job file in `examples/` labels some of the demo's images.

use elbo_tests::{elbo, predictions, root, run_ok};
use tempfile::TempDir;

#[test]
fn every_example_labels_images() {
    let entries = std::fs::read_dir(root().join("examples")).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        let out = TempDir::new().unwrap();
        let mut command = elbo();
        command.current_dir(root()).args(["label", "--limit", "6", "--progress", "none"]);
        run_ok(command.arg("--job").arg(&file).arg("--out").arg(out.path().join("out")));
        assert_eq!(predictions(&out.path().join("out")).len(), 6, "{}", file.display());
    }
}
