//! How fast a worker's network is: evaluations per second, arithmetic per second beside the device's best, and where the time
//! goes, for any network whose configuration is at hand. With a Python that has PyTorch and diffusers, the same network there
//! is measured in the same run.

mod lanes;
mod peak;
mod peer;
mod report;
mod subject;
mod trace;

use std::path::PathBuf;
use std::time::Duration;

use elbo_core::job::ModelDtype;
use elbo_kernels::gpu;
use elbo_kernels::profile::Profile;
use elbo_worker::Device;

use self::lanes::Lanes;
pub use self::peer::{PeerReport, PeerResult};
pub use self::report::{EngineReport, LibraryReport, Measured, OperationTime, PartTime};
pub use self::subject::{NAMES, Subject};
use super::BenchError;

/// How long a profile is taken, and of how many passes at most.
const PROFILED: Duration = Duration::from_secs(1);
const MOST_PROFILED: f64 = 100.0;

/// What is measured, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The network.
    pub subject: Subject,
    /// Evaluations at a time, each number measured; on the CPU they are divided among the lanes.
    pub batches: Vec<usize>,
    /// Prompts of every noisy latent. With one, nothing is shared and all is computed for every evaluation, as the peer does.
    pub prompts: usize,
    /// The type computed in.
    pub dtype: ModelDtype,
    /// What is computed on.
    pub device: Device,
    /// Threads on the CPU, each a lane of its own.
    pub threads: usize,
    /// Side of the latents; what the configuration says, where absent.
    pub latent: Option<usize>,
    /// The least time a measurement takes.
    pub seconds: f64,
    /// Measurements of each batch; the fastest counts, since disturbances only ever slow one down.
    pub rounds: usize,
    /// Whether large products are measured, which the engine is compared with.
    pub peak: bool,
    /// Where a trace of the profile goes.
    pub trace: Option<PathBuf>,
    /// A Python with PyTorch and diffusers.
    pub peer: Option<PathBuf>,
}

/// Measures, telling what it is at. Where PyTorch can't be measured, the report says why.
pub fn run(options: &Options, mut tell: impl FnMut(&str)) -> Result<EngineReport, BenchError> {
    tell(&format!("making {}", options.subject));
    // Found out first, so that nobody waits for a comparison that will not come.
    let peer = options.peer.as_deref().map(|python| peer::check(python).map(|()| python));
    if let Some(Err(error)) = &peer {
        tell(&format!("without PyTorch: {error}"));
    }
    let device = options.device.open()?;
    let lanes = Lanes::new(options, &device)?;
    let peak = match options.peak {
        true => {
            tell("measuring the device's matrix products");
            Some(peak::flops_per_second(&device, options)?)
        }
        false => None,
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
    let peer = peer.map(|python| {
        python.and_then(|python| {
            tell("measuring PyTorch");
            peer::run(python, options)
        })
    });
    match peer {
        Some(Ok(peer)) => {
            // Both before and after the peer, so that a machine that slows down meanwhile does not decide.
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

/// Makes one pass over the first batch between the calls that ncu and nsys take for the beginning and the end of what they
/// look at, after others that made whatever is made only once.
pub fn capture(options: &Options, mut tell: impl FnMut(&str)) -> Result<(), BenchError> {
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
