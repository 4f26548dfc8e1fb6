//! The scripts that measure a GPU (`deploy/cuda`), without a GPU: a step that can't run, fails or hangs affects no other step.
//! `tests/cuda/emulated.sh measure` runs the complete scripts on the emulated device.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use elbo_tests::patience::seconds;
use elbo_tests::{elbo, json, root, run};
use tempfile::TempDir;

/// A Python without packages, and a directory for the measured programs.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let made =
            Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(dir.path().join("python")).status();
        assert!(made.unwrap().success());
        std::fs::create_dir(dir.path().join("carry")).unwrap();
        Self(dir)
    }

    fn carry(&self, name: &str) -> PathBuf {
        self.0.path().join("carry").join(name)
    }

    /// Replaces both programs with a shell script.
    fn script(&self, text: &str) {
        for name in ["elbo", "parity"] {
            std::fs::write(self.carry(name), format!("#!/bin/bash\n{text}\n")).unwrap();
            std::fs::set_permissions(self.carry(name), PermissionsExt::from_mode(0o755)).unwrap();
        }
    }

    /// Runs one of the scripts on the CPU; returns its output and report.
    fn run(&self, script: &str, seconds: &str) -> (Output, String) {
        let out = self.0.path().join("out");
        let tools = root().join("tests/cuda/tools");
        let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(root().join("deploy/cuda").join(script));
        command.args(["--tiny", "--device", "cpu", "--seconds", seconds, "--wheels", "/nonexistent", "--carry"]);
        command.arg(self.0.path().join("carry")).env("PATH", path).env("OUT", &out);
        command.env("PYTHON", self.0.path().join("python/bin/python3")).env("PYTHONDONTWRITEBYTECODE", "1");
        let output = run(&mut command);
        let report = std::fs::read_to_string(out.join("report.md"));
        (output, report.unwrap_or_default())
    }
}

/// The newest build of the parity tests, in the directory of this test.
fn parity() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let is_parity = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("parity-") && Path::new(&name).extension().is_none()
    };
    let found = std::fs::read_dir(deps).unwrap().map(|entry| entry.unwrap().path()).filter(is_parity);
    found.max_by_key(|path| path.metadata().unwrap().modified().unwrap()).unwrap()
}

/// The outcome of a step in a report.
fn outcome<'a>(report: &'a str, step: &str) -> &'a str {
    let line = report.lines().find(|line| line.starts_with(&format!("| {step}")));
    line.and_then(|line| line.split('|').nth(2)).unwrap_or_default().trim()
}

#[test]
fn without_a_gpu_or_pytorch_everything_else_is_measured() {
    let bench = Bench::new();
    symlink(elbo().get_program(), bench.carry("elbo")).unwrap();
    symlink(parity(), bench.carry("parity")).unwrap();
    let (output, report) = bench.run("measure.sh", "300");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for step in ["digits in bf16", "parity", "elbo: digits ", "elbo: digits, 10 prompts"] {
        assert_eq!(outcome(&report, step), "ok", "{step}: {said}{report}");
    }
    // On a CPU, no kernel runs between the profiler's start and stop.
    assert_eq!(outcome(&report, "ncu: time of every kernel"), "failed", "{report}");
    for step in ["PyTorch: ceilings", "PyTorch, eager: digits", "PyTorch, max-autotune: digits"] {
        assert_eq!(outcome(&report, step), "skipped", "{step}: {report}");
    }
    assert!(report.contains("has no PyTorch") && report.contains("% right"), "{report}");
    assert!(report.contains("| digits | 1 | 4 |") && report.contains("| digits | 10 | 10 |"), "{report}");
    assert!(report.contains("conv2d") && report.contains("emulated"), "{report}");
    assert!(bench.0.path().join("out/trace.json").is_file());
}

#[test]
fn a_missing_peer_only_skips_the_comparison() {
    let mut bench = elbo();
    bench.args([
        "bench",
        "engine",
        "--model",
        "digits",
        "--batch",
        "2,3",
        "--seconds",
        "0.01",
        "--rounds",
        "1",
        "--json",
    ]);
    let report = json(bench.args(["--no-peak", "--peer", "/nonexistent/python"]));
    assert!(report["batches"].as_array().is_some_and(|batches| batches.len() == 2), "{report}");
    assert!(report["peer_error"].as_str().is_some_and(|error| error.contains("/nonexistent/python")), "{report}");
    assert!(report["peer"].is_null() && report["ratio"].is_null() && report["peak_flops"].is_null(), "{report}");
    // On the CPU, the norm before a convolution is fused into it; elsewhere it is a separate operation.
    let operations: Vec<_> =
        report["operations"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(operations.contains(&"conv2d") && operations.contains(&"feed-forward"), "{operations:?}");
}

#[test]
fn a_failing_program_is_inspected_but_not_measured() {
    let bench = Bench::new();
    bench.script("echo 'the device is on fire' >&2; exit 1");
    let (output, report) = bench.run("measure.sh", "60");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(outcome(&report, "digits in bf16"), "failed", "{report}");
    assert_eq!(outcome(&report, "compute-sanitizer"), "failed", "{report}");
    assert!(report.contains("the device is on fire") && !report.contains("parity"), "{report}");
}

#[test]
fn a_step_that_hangs_ends_in_time_with_all_its_processes() {
    let bench = Bench::new();
    let alive = bench.0.path().join("alive");
    bench.script(&format!(
        "trap '' TERM; (trap '' TERM; while true; do touch {}; sleep 0.1; done) & sleep 1000",
        alive.display()
    ));
    let started = Instant::now();
    let (_, report) = bench.run("sanitize.sh", "30");
    assert!(started.elapsed() < seconds(120), "{:?}", started.elapsed());
    assert_eq!(outcome(&report, "elbo --version"), "timeout", "{report}");
    assert_eq!(outcome(&report, "CUDA's libraries"), "timeout", "{report}");
    assert_eq!(outcome(&report, "memcheck"), "skipped", "{report}");
    assert!(report.contains("no time was left"), "{report}");
    assert!(alive.exists());
    std::fs::remove_file(&alive).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(!alive.exists(), "processes started by a step must not outlive it");
}

#[test]
fn missing_programs_are_named_with_the_command_that_builds_them() {
    let bench = Bench::new();
    std::fs::remove_dir(bench.0.path().join("carry")).unwrap();
    let (output, _) = bench.run("measure.sh", "10");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("deploy/cuda/build.sh makes it"));
}
