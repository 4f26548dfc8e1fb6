//! Pilots before races: with embedded workers, with separate workers, and killed at any moment.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use elbo_tests::patience::wait_until;
use elbo_tests::{Process, classes, elbo, free_address, json, model, results, run, run_ok, some_images, stderr};
use tempfile::TempDir;

const FLAGS: [&str; 9] =
    ["--label-from", "parent", "--progress", "none", "--pilot", "20", "--shard-size", "20", "--images"];

fn label(images: &Path, out: &Path) -> Command {
    let mut command = elbo();
    command.arg("label").args(FLAGS).arg(images).arg("--classes").arg(classes());
    command.arg("--model").arg(model()).arg("--out").arg(out).args(["--batch", "16"]);
    command
}

fn read_json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_race_uses_the_timesteps_of_its_pilot_with_any_workers_and_after_any_kill() {
    let (images, outs) = (some_images(8), TempDir::new().unwrap());
    let undisturbed = outs.path().join("undisturbed");
    let started = Instant::now();
    let said = stderr(&run_ok(&mut label(images.path(), &undisturbed)));
    let whole = started.elapsed();
    assert!(said.contains("pilot: 20 images to learn which timesteps to use"), "{said}");
    assert!(said.contains("images to use the timesteps from"), "{said}");
    let expected = results(&undisturbed);

    // The learned timesteps are in job.json, and in a file that --timesteps-from accepts.
    let learned = read_json(&undisturbed.join("pilot/timesteps.json"));
    let record = read_json(&undisturbed.join("job.json"));
    assert_eq!(record["spec"]["policy"]["timesteps"], learned);
    let findings = read_json(&undisturbed.join("pilot/findings.json"));
    assert_eq!((&findings["samples"], &findings["window"]["start"]), (&20.into(), &learned[0]["from"]));
    assert!(findings["trials"].as_array().unwrap().len() > 10);
    // A pilot is a job of its own: twenty images of all classes, each on a hundred timesteps with every prompt.
    let pilot = json(elbo().args(["report", "--json"]).arg(undisturbed.join("pilot")));
    assert_eq!((&pilot["samples"], &pilot["evaluations"]), (&20.into(), &20_000.into()));
    assert!(pilot["accuracy"]["mean_per_class"].as_f64().unwrap() > 0.8, "images come from the whole dataset: {pilot}");

    let killed = outs.path().join("killed");
    let mut kills = 0;
    for percent in [30, 30, 40] {
        let mut process = Process::start(&mut label(images.path(), &killed));
        kills += u32::from(process.kill_after(whole * percent / 100));
    }
    assert!(kills >= 2, "only {kills} kills hit a running process");
    run_ok(&mut label(images.path(), &killed));
    assert!(results(&killed) == expected, "an interrupted pilot and race must give the bytes of undisturbed ones");

    // The result of another job's pilot is refused; no race has begun with it.
    let other = outs.path().join("other");
    elbo_tests::copy_tree(&undisturbed.join("pilot"), &other.join("pilot"));
    let refused = run(label(images.path(), &other).args(["--seed", "7"]));
    assert!(stderr(&refused).contains("seed: 0 -> 7"), "{}", stderr(&refused));
    assert!(!other.join("job.json").exists());

    // As if killed when the pilot was done but its findings were not written yet.
    for gone in ["job.json", "pilot/timesteps.json", "pilot/findings.json"] {
        std::fs::remove_file(killed.join(gone)).unwrap();
    }
    for gone in ["predictions", "manifest", "ledger"] {
        std::fs::remove_dir_all(killed.join(gone)).unwrap();
    }
    run_ok(&mut label(images.path(), &killed));
    assert!(results(&killed) == expected, "the race must not run with data loaded for its pilot");

    // Workers stay for the race after the pilot is done.
    let (address, shared) = (free_address(), outs.path().join("shared"));
    let mut coordinator = elbo();
    coordinator.arg("coordinator").args(FLAGS).arg(images.path()).arg("--classes").arg(classes());
    coordinator.arg("--model").arg(model()).arg("--out").arg(&shared).args(["--listen", &address]);
    let mut coordinator = Process::start(&mut coordinator);
    let mut workers: Vec<_> = (0..2)
        .map(|_| {
            let mut worker = elbo();
            worker.args(["worker", "--coordinator", &format!("http://{address}"), "--batch", "16"]);
            Process::start(&mut worker)
        })
        .collect();
    assert_eq!(coordinator.wait(), Some(0));
    for worker in &mut workers {
        assert_eq!(worker.wait(), Some(0));
    }
    assert!(results(&shared) == expected);
    let report = json(elbo().args(["report", "--json"]).arg(&shared));
    assert_eq!((&report["samples"], &report["evaluations_recomputed"]), (&80.into(), &0.into()));

    // With --fresh, the pilot runs again.
    run_ok(label(images.path(), &shared).arg("--fresh"));
    assert!(results(&shared) == expected);
}

#[test]
fn a_pilot_is_only_for_races() {
    let (images, outs) = (some_images(1), TempDir::new().unwrap());
    let out = outs.path().join("out");
    for flags in [&["--policy", "exhaustive"][..], &["--keep", "3,1", "--samples", "5,10"]] {
        let refused = run(label(images.path(), &out).args(flags));
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("leave --pilot out"), "{}", stderr(&refused));
    }
    assert!(!out.join("job.json").exists());

    let mut without = elbo();
    without.args(["label", "--progress", "none", "--images"]).arg(images.path()).arg("--classes").arg(classes());
    run_ok(without.arg("--model").arg(model()).arg("--out").arg(&out));
    let refused = run(&mut label(images.path(), &out));
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("started without a pilot"), "{}", stderr(&refused));
}

#[test]
fn a_worker_follows_its_coordinator_to_another_job() {
    let (images, outs, address) = (some_images(4), TempDir::new().unwrap(), free_address());
    let coordinator = |out: &str, seed: &str| {
        let mut command = elbo();
        command.args(["coordinator", "--label-from", "parent", "--progress", "none", "--images"]).arg(images.path());
        command.arg("--classes").arg(classes()).arg("--model").arg(model()).arg("--out").arg(outs.path().join(out));
        command.args(["--listen", &address, "--seed", seed, "--policy", "exhaustive", "--samples", "200"]);
        Process::start(&mut command)
    };
    let mut first = coordinator("first", "1");
    let mut worker = elbo();
    worker.args(["worker", "--coordinator", &format!("http://{address}"), "--batch", "16"]);
    let mut worker = Process::start(&mut worker);
    // In the middle of the first job, another job takes its place.
    let begun = || {
        let status = run(elbo().args(["status", "--json", &format!("http://{address}")]));
        let status = serde_json::from_slice::<serde_json::Value>(&status.stdout).unwrap_or_default();
        status["evaluations"].as_u64() > Some(0)
    };
    wait_until(|| "the first job makes no progress", begun);
    first.kill();
    assert!(
        !outs.path().join("first/predictions").join("shard-00000.parquet").exists(),
        "the first job ended too early"
    );
    let mut second = coordinator("second", "2");
    assert_eq!(second.wait(), Some(0));
    assert_eq!(worker.wait(), Some(0));

    let alone = outs.path().join("alone");
    let mut label = elbo();
    label.args(["label", "--label-from", "parent", "--progress", "none", "--images"]).arg(images.path());
    label.arg("--classes").arg(classes()).arg("--model").arg(model()).arg("--out").arg(&alone);
    run_ok(label.args(["--seed", "2", "--policy", "exhaustive", "--samples", "200"]));
    assert!(results(&outs.path().join("second")) == results(&alone), "the first job must not affect the second");
}
