//! Races end to end: resumed, audited, replayed, and with timesteps from a pilot.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use elbo_tests::patience::seconds;
use elbo_tests::{Process, classes, elbo, json, model, predictions, results, run, run_ok, some_images, stderr};
use tempfile::TempDir;

fn label(images: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = elbo();
    command.args(["label", "--label-from", "parent", "--batch", "16", "--progress", "none", "--images"]).arg(images);
    command.arg("--classes").arg(classes()).arg("--model").arg(model()).arg("--out").arg(out).args(flags);
    command
}

fn report(out: &Path) -> serde_json::Value {
    json(elbo().args(["report", "--json"]).arg(out))
}

#[test]
fn an_audited_race_killed_at_any_moment_resumes_to_the_same_bytes() {
    let (images, outs) = (some_images(8), TempDir::new().unwrap());
    let flags = ["--write-errors", "--shard-size", "20", "--audit", "25%", "--keep", "3,1", "--samples", "8,20"];
    let undisturbed = outs.path().join("undisturbed");
    let started = Instant::now();
    run_ok(&mut label(images.path(), &undisturbed, &flags));
    let whole = started.elapsed();
    let expected = results(&undisturbed);
    // Four shards, each with predictions, errors and audit.
    assert_eq!(expected.len(), 12);

    let killed = outs.path().join("killed");
    let mut kills = 0;
    for percent in [20, 20, 20, 25] {
        let mut process = Process::start(&mut label(images.path(), &killed, &flags));
        kills += u32::from(process.kill_after(whole * percent / 100));
    }
    assert!(kills >= 3, "only {kills} kills hit a running process");
    run_ok(label(images.path(), &killed, &flags).args(["--workers", "3"]));
    assert!(results(&killed) == expected, "an interrupted race must give the bytes of an undisturbed one");

    let report = report(&killed);
    assert_eq!(report["evaluations_recomputed"], 0);
    let audit = &report["audit"];
    // The reference's evaluations: after 8 slots 3 prompts stay, up to 20 slots in all.
    assert_eq!(audit["reference_evaluations"], 8.0 * 10.0 + 12.0 * 3.0);
    let audited = audit["samples"].as_u64().unwrap();
    assert!((8..40).contains(&audited), "{audited} of 80");
    assert!(audit["agreement"].as_f64().unwrap() >= 0.9, "{audit}");
    assert!(audit["evaluations"].as_f64().unwrap() < 110.0, "{audit}");
    let verified = json(elbo().args(["verify", "--json"]).arg(&killed));
    assert_eq!((&verified["ok"], &verified["predictions"]), (&true.into(), &80.into()));
}

#[test]
fn a_race_is_the_default_and_harder_images_take_more_evaluations() {
    let (images, out) = (some_images(3), TempDir::new().unwrap());
    run_ok(&mut label(images.path(), out.path(), &[]));
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.path().join("job.json")).unwrap()).unwrap();
    assert_eq!(record["spec"]["policy"], serde_json::json!({"name": "race", "risk": 0.05, "max_slots": 250}));
    let rows = predictions(out.path());
    for row in &rows {
        // At least ten classes on two slots; then fewer classes on more slots.
        assert!(row.evaluations >= 20, "{row:?}");
        let scores = row.scores();
        assert_eq!(scores.iter().map(|score| score.n).sum::<u32>(), row.evaluations);
        assert!(row.labelled().unwrap().margin.is_some_and(|margin| margin > 0.0), "{row:?}");
        // Classes that were eliminated earlier rank lower.
        assert!(scores.is_sorted_by(|a, b| a.round >= b.round));
    }
    let evaluations: Vec<_> = rows.iter().map(|row| row.evaluations).collect();
    assert!(evaluations.iter().max() > evaluations.iter().min());
    assert!(report(out.path())["accuracy"]["top1"].as_f64().unwrap() >= 0.9);
}

#[test]
fn errors_of_an_exhaustive_job_predict_the_cost_of_a_race_and_its_best_timesteps() {
    let (images, outs) = (some_images(6), TempDir::new().unwrap());
    let all = outs.path().join("all");
    run_ok(&mut label(images.path(), &all, &["--policy", "exhaustive", "--samples", "50", "--write-errors"]));
    let (timesteps, csv) = (outs.path().join("timesteps.json"), outs.path().join("table.csv"));
    let replay = || {
        let mut replay = elbo();
        replay.args(["bench", "policy", "--samples", "10,50", "--pilot", "40", "--json", "--timesteps-to"]);
        replay.arg(&timesteps).arg("--csv").arg(&csv).arg(&all);
        replay
    };
    let table = json(&mut replay());
    let row = |name: &str| {
        let rows = table["rows"].as_array().unwrap();
        rows.iter().find(|row| row["policy"].as_str().unwrap().starts_with(name)).unwrap().clone()
    };
    assert_eq!(row("exhaustive")["evaluations"], 500.0);
    // On all slots, the replay gives the same accuracy as the job.
    assert_eq!(row("exhaustive")["accuracy"], report(&all)["accuracy"]["top1"]);
    assert_eq!(row("reference")["evaluations"], 10.0 * 10.0 + 40.0 * 5.0);
    let race = row("race, risk 0.05");
    assert!(race["evaluations"].as_f64().unwrap() < 150.0 && race["agreement"].as_f64().unwrap() > 0.9, "{race}");
    let lines = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(lines.lines().count(), 1 + table["rows"].as_array().unwrap().len());
    assert_eq!(json(&mut replay()), table, "the seed must decide the pilot's images");

    // A job accepts and records the timesteps that the pilot found.
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&timesteps).unwrap()).unwrap();
    let out = outs.path().join("race");
    run_ok(&mut label(images.path(), &out, &["--timesteps-from", timesteps.to_str().unwrap()]));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
    assert_eq!(record["spec"]["policy"]["timesteps"], found);

    let race = outs.path().join("race");
    let refused = run(elbo().args(["bench", "policy"]).arg(&race));
    assert!(stderr(&refused).contains("--policy exhaustive --samples 100 --write-errors"), "{}", stderr(&refused));
}

#[test]
fn invalid_race_settings_are_refused_with_a_remedy() {
    let (images, outs) = (some_images(1), TempDir::new().unwrap());
    let out = outs.path().join("out");
    let refused = |flags: &[&str]| {
        let started = Instant::now();
        let output = run(&mut label(images.path(), &out, flags));
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", stderr(&output));
        assert!(started.elapsed() < seconds(20));
        stderr(&output)
    };
    assert!(refused(&["--risk", "0.7"]).contains("--risk: a risk of 0.7 is not"));
    assert!(refused(&["--max-slots", "1"]).contains("--max-slots: 1 slots are out of range"));
    assert!(refused(&["--risk", "0.1", "--preset", "pets"]).contains("are for --policy race"));
    assert!(refused(&["--policy", "race", "--keep", "5,1"]).contains("add --policy reference"));
    assert!(refused(&["--audit", "0%"]).contains("above 0%"));
    assert!(refused(&["--audit", "1%", "--policy", "exhaustive"]).contains("--audit compares"));
    let file = outs.path().join("timesteps.json");
    std::fs::write(&file, r#"[{"from": 800, "to": 300, "share": 1}]"#).unwrap();
    assert!(refused(&["--timesteps-from", file.to_str().unwrap()]).contains("from 800 to 300"));
    std::fs::write(&file, r#"[{"from": 300, "to": 1300, "share": 1}]"#).unwrap();
    let beyond = run(&mut label(images.path(), &out, &["--timesteps-from", file.to_str().unwrap()]));
    assert!(stderr(&beyond).contains("the model has 1000"), "{}", stderr(&beyond));
}
