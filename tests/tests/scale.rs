//! The coordinator's benchmark at a small size: reports of many workers that join, straggle, die and answer at the same time
//! are reduced to the right predictions, and a killed coordinator is back at once.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use elbo_tests::{elbo, json, run, stderr};

#[test]
fn every_prediction_is_right_with_many_simulated_workers() {
    let report = json(elbo().args([
        "bench",
        "coordinator",
        "--json",
        "--preset",
        "cifar10",
        "--classes",
        "10",
        "--samples",
        "8000",
        "--workers",
        "40",
        "--rate",
        "2000",
        "--seconds",
        "3",
        "--shards",
        "1",
        "--settle",
        "0",
    ]));
    let predictions = &report["predictions"];
    assert!(predictions["checked"].as_u64().unwrap() >= 1000, "{report}");
    assert_eq!(predictions["wrong"], 0, "{report}");
    assert_eq!(report["steady"][0]["refused"], 0, "{report}");
    assert_eq!(report["flat_out"]["refused"], 0, "{report}");
    assert!(report["steady"][0]["evaluations_per_second"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["restart"]["first_lease_seconds"].as_f64().unwrap() < 10.0, "{report}");
}

#[test]
fn a_benchmark_that_would_run_out_of_images_is_refused() {
    let refused = run(elbo().args(["bench", "coordinator", "--samples", "4000"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("fewer --shards"), "{}", stderr(&refused));
}
