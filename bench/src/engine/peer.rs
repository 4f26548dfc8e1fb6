//! Measures the same network in PyTorch and diffusers, in a separate process.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::EngineBenchOptions;
use crate::BenchError;

/// The peer's program, which can also be run by hand.
const SCRIPT: &str = include_str!("../../../tests/peer/engine.py");

/// The peer's results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerReport {
    /// The device as PyTorch calls it.
    pub device: String,
    /// PyTorch's version.
    pub torch: String,
    /// A result for every mode and batch size.
    pub results: Vec<PeerResult>,
}

/// One way to run the network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerResult {
    /// eager or compile.
    pub mode: String,
    /// Whether images were kept channels last.
    pub channels_last: bool,
    /// Evaluations at a time.
    pub batch: usize,
    /// Evaluations per second of the fastest round.
    pub evaluations_per_second: f64,
}

impl PeerReport {
    /// The fastest.
    pub fn best(&self) -> Option<&PeerResult> {
        self.results.iter().max_by(|a, b| a.evaluations_per_second.total_cmp(&b.evaluations_per_second))
    }
}

impl fmt::Display for PeerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "PyTorch {}      batch  evaluations/s", self.torch)?;
        for result in &self.results {
            let way = format!("{}{}", result.mode, if result.channels_last { ", channels last" } else { "" });
            writeln!(f, "{way:<22} {:>5}  {:>13.3}", result.batch, result.evaluations_per_second)?;
        }
        Ok(())
    }
}

fn failed(python: &Path, why: impl fmt::Display) -> BenchError {
    BenchError::Peer { python: python.to_owned(), why: why.to_string() }
}

/// Checks that the peer can run, before time is spent on anything else.
pub(super) fn check(python: &Path) -> Result<(), BenchError> {
    let output = Command::new(python).args(["-W", "ignore", "-c", "import torch, diffusers"]).output();
    let output = output.map_err(|error| failed(python, error))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(python, String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("it ended")))
    }
}

/// Runs the peer with the same network, type, batches and threads.
pub(super) fn run(python: &Path, options: &EngineBenchOptions) -> Result<PeerReport, BenchError> {
    let dir = options.subject.directory()?;
    let device = if options.device.is_gpu() { "cuda" } else { "cpu" };
    let batches: Vec<String> = options.batches.iter().map(ToString::to_string).collect();
    let mut command = Command::new(python);
    command.args(["-W", "ignore", "-", "--model"]).arg(dir.path());
    command.args(["--batch", &batches.join(","), "--dtype", &options.dtype.to_string(), "--device", device]);
    command.args(["--threads", &options.threads.to_string(), "--seconds", &options.seconds.to_string()]);
    command.args(["--rounds", &options.rounds.to_string()]);
    // Autotuning takes minutes, and has more choices on a GPU.
    let modes = if options.device.is_gpu() { "eager,compile,max-autotune" } else { "eager,compile" };
    command.args(["--modes", modes]);
    if let Some(side) = options.latent {
        command.args(["--latent", &side.to_string()]);
    }
    let failed = |why: String| failed(python, why);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| failed(error.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(SCRIPT.as_bytes()).map_err(|error| failed(error.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("it ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(format!("its output can't be parsed: {error}")))
}
