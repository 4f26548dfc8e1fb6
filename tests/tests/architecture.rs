//! Which crates may depend on what: the core needs no IO, and the protocol no store clients. And what gets compiled twice.

#![allow(clippy::unwrap_used)] // clippy's leave for tests does not reach their helpers

use std::collections::BTreeSet;
use std::process::Command;

use elbo_tests::root;
use tempfile::TempDir;

/// The crates that `package` depends on, without build dependencies.
fn needed_by(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--package", package])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    tree.lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

#[test]
fn the_core_and_the_protocol_need_no_io() {
    let stores = ["object_store", "arrow-array", "parquet", "reqwest", "elbo-store", "elbo-data", "elbo-hub"];
    let io = ["tokio", "hyper", "tonic", "axum", "futures"];
    for (package, refused) in [("elbo-core", [&stores[..], &io].concat()), ("elbo-proto", stores.to_vec())] {
        let needed = needed_by(package);
        assert!(needed.contains("serde") || needed.contains("prost"), "{package}: {needed:?}");
        let found: Vec<_> = refused.into_iter().filter(|name| needed.contains(*name)).collect();
        assert!(found.is_empty(), "{package} needs {found:?}");
    }
}

#[test]
fn models_need_neither_coordinators_nor_servers() {
    let needed = needed_by("elbo-models");
    for name in
        ["elbo-coordinator", "elbo-worker", "elbo-net", "elbo-proto", "elbo-data", "elbo-output", "tonic", "axum"]
    {
        assert!(!needed.contains(name), "elbo-models needs {name}");
    }
}

/// The units that a cargo command compiles or runs, each with its features and profile.
fn units_of(command: &[&str]) -> BTreeSet<String> {
    let scratch = TempDir::new().unwrap();
    let output = Command::new(env!("CARGO"))
        .args(command)
        .args(["--release", "--locked", "-Z", "unstable-options", "--unit-graph"])
        // Makes a stable compiler show its plan too; nothing is compiled.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", scratch.path())
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let graph: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let unit = |unit: &serde_json::Value| {
        let parts = ["pkg_id", "target", "mode", "platform", "features", "profile"].map(|key| unit[key].to_string());
        parts.join(" ")
    };
    graph["units"].as_array().unwrap().iter().map(unit).collect()
}

/// `cargo run` builds only the program. If that changed a feature, everything would be compiled twice.
#[test]
fn running_and_testing_build_the_same_units() {
    let (run, test) = (units_of(&["build", "--bin", "elbo"]), units_of(&["test", "--no-run"]));
    let twice: Vec<_> = run.difference(&test).collect();
    assert!(run.len() > 300 && twice.is_empty(), "{} of {} are compiled twice: {twice:#?}", twice.len(), run.len());
    assert!(!run.iter().any(|unit| unit.contains("s3s")), "`cargo run` must not build what only tests need");
}
