//! A coordinator and workers as separate processes, any of which may be killed.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::time::Duration;

use elbo_tests::patience::{seconds, wait_until};
use elbo_tests::{
    Process, coordinator_flags, copy_tree, elbo, free_address, images, job_flags, json, model, results, run, run_ok,
    some_images, stderr,
};
use tempfile::TempDir;

struct Cluster {
    address: String,
    images: TempDir,
    outs: TempDir,
}

impl Cluster {
    fn new(per_class: usize) -> Self {
        Self { address: free_address(), images: some_images(per_class), outs: TempDir::new().unwrap() }
    }

    fn out(&self) -> std::path::PathBuf {
        self.outs.path().join("cluster")
    }

    fn coordinator(&self) -> Process {
        let mut command = elbo();
        command.arg("coordinator").args(coordinator_flags(self.images.path(), &self.out()));
        Process::start(command.args(["--listen", &self.address, "--lease-seconds", "2"]))
    }

    fn worker_command(&self) -> std::process::Command {
        let mut command = elbo();
        command.args(["worker", "--threads", "1", "--batch", "16"]);
        command.args(["--coordinator", &format!("http://{}", self.address)]);
        command
    }

    fn worker(&self) -> Process {
        Process::start(&mut self.worker_command())
    }

    /// The status, once the coordinator answers.
    fn status(&self) -> Option<serde_json::Value> {
        let output = run(elbo().args(["status", "--json", &format!("http://{}", self.address)]));
        serde_json::from_slice(&output.stdout).ok()
    }

    fn wait_for(&self, what: &str, reached: impl Fn(&serde_json::Value) -> bool) {
        wait_until(
            || format!("waiting for {what}: {:?}", self.status()),
            || self.status().is_some_and(|status| reached(&status)),
        );
    }

    /// The bytes of an undisturbed `elbo label`.
    fn expected(&self) -> Vec<(String, Vec<u8>)> {
        let out = self.outs.path().join("expected");
        run_ok(elbo().arg("label").args(job_flags(self.images.path(), &out)));
        results(&out)
    }
}

fn recomputed(out: &Path) -> u64 {
    json(elbo().args(["report", "--json"]).arg(out))["evaluations_recomputed"].as_u64().unwrap()
}

#[test]
fn a_job_whose_workers_and_coordinator_are_killed_ends_with_the_same_bytes() {
    let cluster = Cluster::new(10);
    let mut coordinator = cluster.coordinator();
    let mut victim = cluster.worker();
    cluster.wait_for("first results", |s| s["evaluations"].as_u64() > Some(0));
    victim.kill();
    let mut survivor = cluster.worker();
    cluster.wait_for("the second worker's results", |s| s["evaluations"].as_u64() > Some(2_000));
    // The coordinator dies. Its worker keeps unacknowledged results and continues with the next coordinator.
    coordinator.kill();
    assert!(survivor.is_running());
    let mut coordinator = cluster.coordinator();
    let mut late = cluster.worker();
    assert_eq!(coordinator.wait(), Some(0));
    assert_eq!(survivor.wait(), Some(0));
    assert_eq!(late.wait(), Some(0));
    assert!(results(&cluster.out()) == cluster.expected());
    let verified = json(elbo().args(["verify", "--json"]).arg(cluster.out()));
    assert_eq!((verified["ok"].as_bool(), verified["missing"].as_u64()), (Some(true), Some(0)));
}

#[test]
fn a_worker_leaves_on_sigterm_and_hands_its_leases_back() {
    let cluster = Cluster::new(10);
    let mut coordinator = cluster.coordinator();
    let mut worker = cluster.worker();
    cluster.wait_for("a lease", |s| s["workers"][0]["leases"].as_u64() > Some(0));
    worker.signal("TERM");
    assert_eq!(worker.wait(), Some(0));
    let status = cluster.status().unwrap();
    assert_eq!(status["workers"].as_array().map(Vec::len), Some(0));
    assert_eq!(status["state"], "waiting for workers");
    let _other = cluster.worker();
    assert_eq!(coordinator.wait(), Some(0));
    assert_eq!(recomputed(&cluster.out()), 0);
}

#[test]
fn a_second_coordinator_takes_over_and_the_first_stops_with_an_error() {
    let cluster = Cluster::new(10);
    let mut first = elbo();
    first.arg("coordinator").args(coordinator_flags(cluster.images.path(), &cluster.out()));
    first.args(["--listen", &cluster.address]).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let first = first.spawn().unwrap();
    let mut worker = cluster.worker();
    cluster.wait_for("first results", |s| s["evaluations"].as_u64() > Some(0));
    let second = Cluster { address: free_address(), images: TempDir::new().unwrap(), outs: TempDir::new().unwrap() };
    let mut command = elbo();
    command.arg("coordinator").args(coordinator_flags(cluster.images.path(), &cluster.out()));
    let mut second_coordinator = Process::start(command.args(["--listen", &second.address]));
    let output = first.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("another coordinator has taken over"), "{}", stderr(&output));
    worker.end();
    let _worker = second.worker();
    assert_eq!(second_coordinator.wait(), Some(0));
    assert!(results(&cluster.out()) == cluster.expected());
}

#[test]
fn a_label_command_whose_job_is_taken_over_ends_with_its_workers_at_once() {
    let cluster = Cluster::new(20);
    let mut first = elbo();
    first.arg("label").args(job_flags(cluster.images.path(), &cluster.out())).args(["--threads", "1"]);
    let first = first.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // In the middle of the job.
    wait_until(|| "it never begins", || cluster.out().join("job.json").exists());
    std::thread::sleep(Duration::from_millis(500));
    let _second = cluster.coordinator();
    cluster.wait_for("the second coordinator", |s| s["state"] == "waiting for workers");
    let replaced = std::time::Instant::now();
    let output = first.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("another coordinator has taken over"), "{}", stderr(&output));
    // A worker without a coordinator would wait a minute for a new one.
    assert!(replaced.elapsed() < seconds(30), "it ended only after {:?}", replaced.elapsed());
}

#[test]
fn listening_beyond_loopback_needs_a_token_and_a_wrong_token_is_refused() {
    let outs = TempDir::new().unwrap();
    let flags = coordinator_flags(&images(), &outs.path().join("out"));
    let refused = run(elbo().arg("coordinator").args(&flags).args(["--listen", "0.0.0.0:0"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--token-file"), "{}", stderr(&refused));

    let cluster = Cluster::new(1);
    let token = outs.path().join("token");
    std::fs::write(&token, "right\n").unwrap();
    let mut command = elbo();
    command.arg("coordinator").args(coordinator_flags(cluster.images.path(), &cluster.out()));
    let mut coordinator = Process::start(command.args(["--listen", &cluster.address]).arg("--token-file").arg(&token));
    wait_until(|| "it never listens", || std::net::TcpStream::connect(&cluster.address).is_ok());
    let none = run(&mut cluster.worker_command());
    assert_eq!(none.status.code(), Some(1));
    assert!(stderr(&none).contains("a token is needed"), "{}", stderr(&none));
    let wrong = run(cluster.worker_command().env("ELBO_TOKEN", "wrong"));
    assert!(stderr(&wrong).contains("the token is wrong"), "{}", stderr(&wrong));
    run_ok(cluster.worker_command().arg("--token-file").arg(&token));
    assert_eq!(coordinator.wait(), Some(0));
}

#[test]
fn a_worker_that_cannot_load_the_model_leaves_with_an_error_while_another_finishes_the_job() {
    let cluster = Cluster::new(5);
    let mut command = elbo();
    command.arg("coordinator").args(coordinator_flags(cluster.images.path(), &cluster.out()));
    command
        .args(["--listen", &cluster.address])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped());
    let coordinator = command.spawn().unwrap();
    cluster.wait_for("the coordinator", |s| s["state"] == "waiting for workers");

    let other = TempDir::new().unwrap();
    copy_tree(&model(), other.path());
    let weights = other.path().join("unet/diffusion_pytorch_model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let refused = run(cluster.worker_command().arg("--model").arg(other.path()));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("is not the one the job was started with"), "{}", stderr(&refused));
    assert_eq!(cluster.status().unwrap()["workers"].as_array().map(Vec::len), Some(0));

    let mut two = Process::start(cluster.worker_command().args(["--device", "cpu,cpu"]));
    cluster.wait_for("both engines", |s| {
        let names = s["workers"].as_array().unwrap().iter().filter_map(|w| w["worker"].as_str());
        let ends: Vec<_> =
            names.filter_map(|name| name.rsplit_once('/')).map(|(_, number)| number.to_owned()).collect();
        ends == ["0", "1"]
    });
    assert_eq!(two.wait(), Some(0));
    let ended = coordinator.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0));
    // The operator does not have to look for the reason on the worker's machine.
    assert!(stderr(&ended).contains("is not the one the job was started with"), "{}", stderr(&ended));
    assert!(results(&cluster.out()) == cluster.expected());
}
