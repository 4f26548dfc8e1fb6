//! What may depend on what: the core is pure, and what both sides speak needs no clients of stores.

#![allow(clippy::unwrap_used)] // clippy's leave for tests does not reach their helpers

use std::collections::BTreeSet;
use std::process::Command;

use elbo_tests::root;

/// The crates that `package` needs, without those of its build.
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
