//! Measures the speed of a worker's network, for any network whose configuration is available: evaluations per second,
//! arithmetic per second compared with the device's best, and the time of each operation. With a Python that has PyTorch and
//! diffusers, the same run also measures the network there.

mod candle;
mod lanes;
mod peak;
mod peer;
mod report;
mod subject;
mod trace;

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use elbo_core::job::ModelDtype;
use elbo_kernels::gpu;
use elbo_kernels::profile::Profile;
use elbo_worker::Device;

use self::lanes::Lanes;
use self::peak::Peak;
pub use self::peer::{PeerReport, PeerResult};
pub use self::report::{EngineReport, LibraryReport, Measured, OperationTime, PartTime};
pub use self::subject::{NAMES, Subject};
use super::BenchError;

/// Duration of a profile, and its maximum number of passes.
const PROFILED: Duration = Duration::from_secs(1);
const MOST_PROFILED: f64 = 100.0;

/// What to measure, and how.
#[derive(Clone, Debug)]
pub struct EngineBenchOptions {
    /// The network.
    pub subject: Subject,
    /// Batch sizes to measure; on the CPU, a batch is divided among the lanes.
    pub batches: Vec<usize>,
    /// Prompts per noisy latent. With one, nothing is shared and everything is computed for every evaluation, as in PyTorch.
    pub prompts: usize,
    /// The element type.
    pub dtype: ModelDtype,
    /// The device to compute on.
    pub device: Device,
    /// Threads on the CPU, with one lane each.
    pub threads: usize,
    /// Height and width of the latents; the configuration's if `None`.
    pub latent: Option<usize>,
    /// Minimum time of a measurement.
    pub seconds: f64,
    /// Measurements per batch size; the fastest counts, since disturbances only slow a measurement down.
    pub rounds: usize,
    /// Whether to measure large matrix products, to compare the engine with.
    pub peak: bool,
    /// File for a trace of the profile.
    pub trace: Option<PathBuf>,
    /// What else to measure.
    pub peers: Vec<Peer>,
}

/// Another implementation of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// candle-transformers', in this process.
    Candle,
    /// diffusers' in PyTorch, with this Python.
    Python(PathBuf),
}

impl FromStr for Peer {
    type Err = Infallible;

    fn from_str(name: &str) -> Result<Self, Infallible> {
        Ok(if name == "candle" { Self::Candle } else { Self::Python(name.into()) })
    }
}

/// Runs the measurements; `tell` receives progress messages. If PyTorch can't be measured, the report says why.
pub fn run(options: &EngineBenchOptions, mut tell: impl FnMut(&str)) -> Result<EngineReport, BenchError> {
    tell(&format!("making {}", options.subject));
    // Checked first, so that the user learns early if there will be no comparison.
    let python = options.peers.iter().find_map(|peer| match peer {
        Peer::Python(python) => Some(python.as_path()),
        Peer::Candle => None,
    });
    let peer = python.map(|python| peer::check(python).map(|()| python));
    if let Some(Err(error)) = &peer {
        tell(&format!("without PyTorch: {error}"));
    }
    let device = options.device.open()?;
    let lanes = Lanes::new(options, &device)?;
    let peak = if options.peak {
        tell("measuring the device's matrix products");
        Some(Peak::measure(&device, options)?)
    } else {
        None
    };
    let mut measured = Vec::new();
    for &batch in &options.batches {
        tell(&format!("measuring batches of {batch}"));
        measured.push(lanes.measure(batch, options)?);
    }
    let mut report = EngineReport::new(options, &device, lanes.side(), peak, measured);
    tell("taking a profile");
    let best = report.best();
    let passes = (best.evaluations_per_second * PROFILED.as_secs_f64() / best.batch as f64).clamp(1.0, MOST_PROFILED);
    let profile = Profile::start();
    lanes.passes(best.batch, passes as usize)?;
    let (spans, time) = profile.finish();
    report.add_profile(&spans, time, passes as usize, lanes.at_work(best.batch));
    if let Some(path) = &options.trace {
        trace::write(path, &spans)?;
    }
    if options.peers.contains(&Peer::Candle) {
        tell("measuring candle-transformers");
        match candle::measure(options, lanes.network()) {
            Ok(found) => report.candle = Some(found),
            Err(error) => report.candle_error = Some(error.to_string()),
        }
    }
    let peer = peer.map(|python| {
        python.and_then(|python| {
            tell("measuring PyTorch");
            peer::run(python, options)
        })
    });
    match peer {
        Some(Ok(peer)) => {
            // Measure both before and after PyTorch, so that a machine that slows down does not bias the result.
            tell("measuring again");
            for (&batch, before) in options.batches.iter().zip(&mut report.batches) {
                before.take_better(lanes.measure(batch, options)?);
            }
            report.set_peer(peer);
        }
        Some(Err(error)) => report.peer_error = Some(error.to_string()),
        None => {}
    }
    Ok(report)
}

/// Runs one pass over the first batch between the calls that mark the captured range for ncu and nsys. Warm-up passes run
/// first, so that one-time work is not captured.
pub fn capture(options: &EngineBenchOptions, mut tell: impl FnMut(&str)) -> Result<(), BenchError> {
    const WARM_UP: usize = 3;
    tell(&format!("making {}", options.subject));
    let device = options.device.open()?;
    let lanes = Lanes::new(options, &device)?;
    let batch = options.batches.first().copied().unwrap_or(1);
    tell("warming up");
    lanes.passes(batch, WARM_UP)?;
    tell(&format!("one pass over a batch of {batch}"));
    gpu::capture(&device, || lanes.passes(batch, 1))?
}
