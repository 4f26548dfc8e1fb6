//! `kill -9` at any moment, then the same command again: the bytes are the same, and acknowledged units are not recomputed.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::time::{Duration, Instant};

use elbo_tests::patience::{seconds, wait_until};
use elbo_tests::web::Web;
use elbo_tests::{Process, elbo, job_flags, json, make_pipe, results, run, run_ok, some_images, sorted, stderr};
use tempfile::TempDir;

const PER_CLASS: usize = 10;

fn label(images: &Path, out: &Path, workers: usize) -> std::process::Command {
    let mut command = elbo();
    command.arg("label").args(job_flags(images, out)).args(["--workers", &workers.to_string(), "--write-errors"]);
    command
}

/// The evaluation counts of a finished job, from the ledger and from the predictions.
fn totals(out: &Path) -> serde_json::Value {
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
    record["totals"].clone()
}

#[test]
fn a_job_killed_at_any_moment_resumes_to_the_bytes_of_an_undisturbed_run() {
    let images = some_images(PER_CLASS);
    let outs = TempDir::new().unwrap();
    let undisturbed = outs.path().join("one");
    let started = Instant::now();
    run_ok(&mut label(images.path(), &undisturbed, 1));
    let whole = started.elapsed();
    let expected = results(&undisturbed);
    // Four shards of 25 samples, each with predictions and errors.
    assert_eq!(expected.len(), 8);

    let three = outs.path().join("three");
    run_ok(&mut label(images.path(), &three, 3));
    assert!(results(&three) == expected, "three workers must give the bytes of one");

    // One job that is killed again and again, at the start, in the first round, during commits and near the end.
    let killed = outs.path().join("killed");
    let mut kills = 0;
    for percent in [5, 10, 12, 15, 16, 17] {
        let mut process = Process::start(&mut label(images.path(), &killed, 1 + percent % 3));
        kills += u32::from(process.kill_after(whole * percent as u32 / 100));
    }
    assert!(kills >= 4, "only {kills} kills hit a running process");
    run_ok(&mut label(images.path(), &killed, 2));
    assert!(results(&killed) == expected, "an interrupted run must give the bytes of an undisturbed one");
    let (interrupted, plain) = (totals(&killed), totals(&undisturbed));
    assert_eq!(interrupted["evaluations"], plain["evaluations"]);
    assert_eq!(interrupted["evaluations_recomputed"], 0, "acknowledged blocks must not be computed again");

    let verified = json(elbo().args(["verify", "--json"]).arg(&killed));
    assert_eq!(verified["ok"], true);
    assert_eq!(verified["predictions"], PER_CLASS as u64 * 10);

    // Once the job is done, the same command computes and changes nothing.
    let again = run_ok(&mut label(images.path(), &killed, 2));
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing was computed"));
    assert!(results(&killed) == expected);
}

#[test]
fn signals_stop_cleanly_with_exit_code_3_and_say_how_to_resume() {
    let images = some_images(PER_CLASS);
    let outs = TempDir::new().unwrap();
    for signal in ["INT", "TERM"] {
        let out = outs.path().join(signal);
        let mut command = label(images.path(), &out, 2);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        let child = command.spawn().unwrap();
        let id = child.id().to_string();
        // Once some results are durable.
        wait_until(|| "it never begins", || out.join("job.json").exists());
        std::thread::sleep(Duration::from_millis(500));
        assert!(std::process::Command::new("kill").arg(format!("-{signal}")).arg(&id).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(stderr(&output).contains("run the same command again to resume"), "{}", stderr(&output));
    }
    run_ok(&mut label(images.path(), &outs.path().join("INT"), 1));
    run_ok(&mut label(images.path(), &outs.path().join("TERM"), 3));
    assert!(results(&outs.path().join("INT")) == results(&outs.path().join("TERM")));
}

#[test]
fn hanging_storage_does_not_delay_a_stop() {
    let images = some_images(1);
    let outs = TempDir::new().unwrap();
    let interrupted = |process: &mut Process, what: &str| {
        let since = Instant::now();
        process.signal("INT");
        assert_eq!(process.wait(), Some(3), "{what}");
        assert!(since.elapsed() < seconds(20), "{what}: {:?}", since.elapsed());
    };
    let label = |list: &Path, out: &str| {
        let mut flags = job_flags(list, &outs.path().join(out));
        let labels = flags.iter().position(|flag| flag == "--label-from").unwrap();
        flags.drain(labels..labels + 2);
        let mut command = elbo();
        command.arg("label").args(flags);
        command
    };

    // Images that never arrive. There is one request per image for the listing (ten), then more for reading.
    let served = Web::serve(images.path());
    *served.site.dribble.lock().unwrap() = Some(".png".into());
    let list: String = sorted(images.path())
        .iter()
        .flat_map(|class| sorted(class))
        .map(|image| format!("{}/{}\n", served.files(), image.strip_prefix(images.path()).unwrap().display()))
        .collect();
    let file = outs.path().join("list.txt");
    std::fs::write(&file, list).unwrap();
    let mut reading = Process::start(&mut label(&file, "reading"));
    wait_until(
        || "it reads no image",
        || {
            assert!(reading.is_running());
            served.asked().len() >= 11
        },
    );
    interrupted(&mut reading, "reading");

    // A listing that hangs in the file system: the pipe has a writer that writes nothing.
    let pipe = outs.path().join("pipe.txt");
    make_pipe(&pipe);
    let mut listing = Process::start(&mut label(&pipe, "listing"));
    let writer = std::fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    interrupted(&mut listing, "listing");
    drop(writer);

    // A listing that hangs on the network.
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("list.txt"), "a.png\n".repeat(100)).unwrap();
    let lists = Web::serve(directory.path());
    *lists.site.dribble.lock().unwrap() = Some("list.txt".into());
    let mut fetching = Process::start(&mut label(Path::new(&format!("{}/list.txt", lists.files())), "fetching"));
    wait_until(
        || "it fetches no list",
        || {
            assert!(fetching.is_running());
            !lists.asked().is_empty()
        },
    );
    interrupted(&mut fetching, "fetching");
}

#[test]
fn a_changed_job_over_an_old_output_is_refused_and_the_differences_are_named() {
    let images = some_images(1);
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    run_ok(&mut label(images.path(), &out, 1));
    let before = results(&out);

    let refused = run(label(images.path(), &out, 1).args(["--loss", "l1", "--seed", "7"]));
    assert_eq!(refused.status.code(), Some(1));
    let message = stderr(&refused);
    assert!(message.contains(r#"loss: "l2" -> "l1""#), "{message}");
    assert!(message.contains("seed: 0 -> 7"), "{message}");
    assert!(message.contains("--fresh"), "{message}");
    assert!(results(&out) == before, "a refused job must not touch the old results");

    run_ok(label(images.path(), &out, 1).args(["--loss", "l1", "--fresh"]));
    assert!(results(&out) != before);
}
