//! The whole job against PyTorch + diffusers: same images, same noise, same schedule (`tests/peer/classify.py`).

use elbo_common::predictions::decode_predictions;
use elbo_tests::{classes, elbo, images, model, root, run_ok, sorted};
use serde_json::Value;
use tempfile::TempDir;

/// Largest relative difference of a class's mean error; PyTorch computed it in f32 as well.
const TOLERANCE: f64 = 1e-5;

#[test]
fn every_prediction_and_every_mean_error_is_that_of_pytorch() {
    let fixtures = root().join("tests/fixtures/digits-sd");
    let peer: Value = serde_json::from_slice(&std::fs::read(fixtures.join("peer.json")).unwrap()).unwrap();
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    let mut command = elbo();
    command.arg("label").arg("--images").arg(images()).arg("--classes").arg(classes()).arg("--model").arg(model());
    command.arg("--noise").arg(fixtures.join("noise.safetensors")).arg("--out").arg(&out);
    run_ok(command.args(["--keep", "5,1", "--samples", "20,100", "--loss", "l2", "--progress", "none"]));

    let predictions: Vec<_> = sorted(&out.join("predictions"))
        .into_iter()
        .flat_map(|f| decode_predictions(std::fs::read(f).unwrap().into()).unwrap())
        .collect();
    let expected = peer["images"].as_array().unwrap();
    assert_eq!((predictions.len(), expected.len()), (360, 360));
    for (ours, theirs) in predictions.iter().zip(expected) {
        assert_eq!(ours.key, theirs["key"].as_str().unwrap());
        let labelled = ours.labelled().unwrap();
        assert_eq!(labelled.class_name, theirs["predicted"].as_str().unwrap(), "{}", ours.key);
        for score in &labelled.scores {
            let class = score.class.0 as usize;
            assert_eq!(u64::from(score.n), theirs["n"][class].as_u64().unwrap(), "{} class {class}", ours.key);
            let mean = theirs["mean"][class].as_f64().unwrap();
            let difference = (f64::from(score.mean_error) - mean).abs() / mean;
            assert!(difference < TOLERANCE, "{} class {class}: {difference}", ours.key);
        }
    }
}
