//! Confidence end to end: fitted to labels or an audit when a job ends, or taken from another job.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use elbo_core::prediction::{Outcome, Prediction};
use elbo_output::predictions::{self};
use elbo_tests::{classes, elbo, json, model, predictions, results, run, run_ok, some_images, stderr};
use tempfile::TempDir;

/// A short race, so that some predictions are wrong.
fn label(images: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = elbo();
    command.args(["label", "--batch", "16", "--progress", "none", "--shard-size", "50", "--risk", "0.3"]);
    command.args(["--max-slots", "3", "--images"]).arg(images).arg("--classes").arg(classes());
    command.arg("--model").arg(model()).arg("--out").arg(out).args(flags);
    command
}

fn report(out: &Path) -> serde_json::Value {
    json(elbo().args(["report", "--json"]).arg(out))
}

/// The accuracy of predictions and their mean confidence.
fn right_and_claimed(rows: &[Prediction]) -> (f64, f64) {
    let labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let is_right = |row: &Prediction| {
        let label = row.key.split('/').next().unwrap();
        labels.iter().position(|name| *name == label) == Some(row.scores()[0].class.0 as usize)
    };
    let count = rows.len() as f64;
    let claimed = rows.iter().map(|row| f64::from(row.confidence().unwrap())).sum::<f64>();
    (rows.iter().filter(|row| is_right(row)).count() as f64 / count, claimed / count)
}

#[test]
fn with_labels_confidence_matches_accuracy_and_the_softmax_of_errors_does_not() {
    let (images, outs) = (some_images(20), TempDir::new().unwrap());
    let out = outs.path().join("out");
    run_ok(&mut label(images.path(), &out, &["--label-from", "parent"]));
    let (right, claimed) = right_and_claimed(&predictions(&out));
    assert!(right > 0.85 && right < 1.0, "{right}");
    assert!((right - claimed).abs() < 0.02, "{right} {claimed}");
    let report = report(&out);
    let findings = &report["confidence"]["findings"];
    assert_eq!((&findings["source"], &findings["reliability"]["samples"]), (&"labels".into(), &200.into()));
    assert!(findings["reliability"]["ece"].as_f64().unwrap() < 0.06, "{findings}");
    // The softmax gives each of the ten classes a tenth, whatever the image.
    let softmax = findings["softmax"].as_f64().unwrap();
    assert!((softmax - 0.1).abs() < 0.01 && findings["softmax_ece"].as_f64().unwrap() > 0.75, "{findings}");
    let bins = findings["reliability"]["bins"].as_array().unwrap();
    assert_eq!(bins.iter().map(|bin| bin["samples"].as_u64().unwrap()).sum::<u64>(), 200);

    // A job that was interrupted while writing confidences ends with the same bytes.
    let expected = results(&out);
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
    record["state"] = "unfinished".into();
    record["confidence"] = serde_json::Value::Null;
    std::fs::write(out.join("job.json"), record.to_string()).unwrap();
    let shard = out.join("predictions/shard-00001.parquet");
    let mut rows = predictions::decode_predictions(Bytes::from(std::fs::read(&shard).unwrap())).unwrap();
    for row in &mut rows {
        if let Outcome::Labelled(labelled) = &mut row.outcome {
            labelled.confidence = None;
        }
    }
    std::fs::write(&shard, predictions::encode_predictions(&rows, &[]).unwrap()).unwrap();
    run_ok(&mut label(images.path(), &out, &["--label-from", "parent"]));
    assert!(results(&out) == expected);
}

#[test]
fn uncertain_images_get_no_class_and_a_calibration_works_for_images_without_labels() {
    let (images, outs) = (some_images(12), TempDir::new().unwrap());
    let (known, unknown) = (outs.path().join("known"), outs.path().join("unknown"));
    run_ok(&mut label(images.path(), &known, &["--label-from", "parent", "--abstain-below", "0.8"]));
    let rows = predictions(&known);
    let (sure, unsure): (Vec<_>, Vec<_>) = rows.iter().cloned().partition(|row| row.labelled().is_some());
    assert!(!unsure.is_empty() && sure.len() > unsure.len());
    assert!(sure.iter().all(|row| row.confidence().unwrap() >= 0.8 && row.status() == "ok"));
    assert!(unsure.iter().all(|row| row.confidence().unwrap() < 0.8 && row.status() == "uncertain"));
    assert!(unsure.iter().all(|row| row.scores().len() == 10 && row.margin().is_some()));
    assert!(right_and_claimed(&sure).0 > right_and_claimed(&unsure).0 + 0.1);
    let report = report(&known);
    assert_eq!((&report["labelled"], &report["uncertain"]), (&sure.len().into(), &unsure.len().into()));
    assert_eq!(report["accuracy"]["top1"].as_f64().unwrap(), right_and_claimed(&sure).0);
    assert_eq!(json(elbo().args(["verify", "--json"]).arg(&known))["predictions"], 120);
    let csv = outs.path().join("labels.csv");
    run_ok(elbo().arg("export").arg(&known).args(["--format", "csv", "--to"]).arg(&csv));
    let text = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(text.lines().filter(|line| line.contains(",uncertain,")).count(), unsure.len());

    let refused = run(&mut label(images.path(), &unknown, &["--label-from", "none", "--abstain-below", "0.8"]));
    assert!(!refused.status.success() && stderr(&refused).contains("--calibration-from"), "{}", stderr(&refused));
    let from = ["--label-from", "none", "--abstain-below", "0.8", "--calibration-from", known.to_str().unwrap()];
    run_ok(&mut label(images.path(), &unknown, &from));
    let again = predictions(&unknown);
    let of = |rows: &[Prediction]| rows.iter().map(|row| row.outcome.clone()).collect::<Vec<_>>();
    assert_eq!(of(&again), of(&rows), "the same errors and calibration must give the same confidence");
    let bare = run(&mut label(images.path(), &outs.path().join("x"), &["--calibration-from", "/nowhere"]));
    assert!(stderr(&bare).contains("/nowhere"), "{}", stderr(&bare));
}

#[test]
fn without_labels_an_audit_measures_agreement_with_the_reference() {
    let (images, outs) = (some_images(8), TempDir::new().unwrap());
    let out = outs.path().join("out");
    run_ok(&mut label(images.path(), &out, &["--label-from", "none", "--audit", "60%", "--samples", "10,40"]));
    let report = report(&out);
    let findings = &report["confidence"]["findings"];
    assert_eq!(findings["source"], "audit");
    assert_eq!(findings["reliability"]["samples"], report["audit"]["samples"]);
    assert_eq!(findings["reliability"]["accuracy"].as_f64(), report["audit"]["agreement"].as_f64());
    assert!(predictions(&out).iter().all(|row| row.confidence().is_some()));
}
