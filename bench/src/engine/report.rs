//! What was found out about an engine.

use std::fmt;
use std::time::Duration;

use candle_core::Device;
use elbo_kernels::gpu;
use elbo_kernels::profile::{Part, Span};
use serde::Serialize;

use super::Options;
use super::peer::PeerReport;

/// Everything, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// This program's version.
    pub version: &'static str,
    /// The network.
    pub model: String,
    /// Side of the latents.
    pub latent: usize,
    /// The type computed in.
    pub dtype: String,
    /// What is computed on.
    pub device: String,
    /// Prompts of every noisy latent.
    pub prompts: usize,
    /// Floating point operations per second of large products: what there is to have.
    pub peak_flops: f64,
    /// Floating point operations of the products of an evaluation.
    pub flops_per_evaluation: f64,
    /// Every batch size that was measured.
    pub batches: Vec<Measured>,
    /// Where the time of a pass goes; `host` is what no operation accounts for.
    pub parts: Vec<PartTime>,
    /// The same network in PyTorch.
    pub peer: Option<PeerReport>,
    /// Evaluations per second over those of the fastest way PyTorch has, each at its best batch.
    pub ratio: Option<f64>,
}

/// A batch size and how fast it was.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Evaluations at a time.
    pub batch: usize,
    /// Evaluations per second of the fastest round.
    pub evaluations_per_second: f64,
    /// Evaluations per second of the round in the middle.
    pub median: f64,
    /// The most memory in use until then, in bytes: the device's, or the process'.
    pub memory_bytes: u64,
}

/// How much of a pass is one kind of operation.
#[derive(Clone, Debug, Serialize)]
pub struct PartTime {
    /// conv, linear, attention, norm, other or host.
    pub part: &'static str,
    /// Share of the time of all lanes.
    pub share: f64,
    /// Floating point operations per second while it ran, of all lanes.
    pub flops_per_second: f64,
}

impl Measured {
    /// Sums up rounds, of which there is one at least.
    pub(super) fn new(batch: usize, mut rates: Vec<f64>, memory: Option<u64>) -> Self {
        rates.sort_by(f64::total_cmp);
        Self {
            batch,
            evaluations_per_second: rates.last().copied().unwrap_or_default(),
            median: rates.get(rates.len() / 2).copied().unwrap_or_default(),
            memory_bytes: memory.unwrap_or_else(peak_memory),
        }
    }

    /// Keeps the faster of two measurements of one batch size.
    pub(super) fn take_better(&mut self, other: Self) {
        if other.evaluations_per_second > self.evaluations_per_second {
            *self = other;
        }
    }
}

/// The most memory this process has had, as Linux tells; 0 elsewhere.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

impl EngineReport {
    pub(super) fn new(
        options: &Options,
        device: &Device,
        latent: usize,
        peak_flops: f64,
        batches: Vec<Measured>,
    ) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            model: options.subject.to_string(),
            latent,
            dtype: options.dtype.to_string(),
            device: gpu::name(device).unwrap_or_else(|| format!("cpu, {} threads", options.threads)),
            prompts: options.prompts,
            peak_flops,
            flops_per_evaluation: 0.0,
            batches,
            parts: Vec::new(),
            peer: None,
            ratio: None,
        }
    }

    /// The fastest batch.
    pub fn best(&self) -> Measured {
        let rate = |measured: &&Measured| measured.evaluations_per_second;
        let best = self.batches.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)));
        best.copied().unwrap_or(Measured { batch: 1, evaluations_per_second: 0.0, median: 0.0, memory_bytes: 0 })
    }

    /// Share of the device's products that the fastest batch makes use of.
    pub fn share_of_peak(&self) -> f64 {
        self.best().evaluations_per_second * self.flops_per_evaluation / self.peak_flops
    }

    /// Adds what passes over the fastest batch were made of.
    pub(super) fn add_profile(&mut self, spans: &[Span], time: Duration, passes: usize, lanes: usize) {
        let evaluations = self.best().batch * passes;
        self.flops_per_evaluation = spans.iter().map(|span| span.flops as f64).sum::<f64>() / evaluations as f64;
        let lanes = lanes.max(1) as f64;
        let total = time.as_secs_f64() * lanes;
        let of_part = |part: Part, name: &'static str| {
            let spans = spans.iter().filter(|span| span.part == part);
            let (time, flops) = spans
                .fold((0.0, 0.0), |(time, flops), span| (time + span.time.as_secs_f64(), flops + span.flops as f64));
            let flops_per_second = if time > 0.0 { flops / time * lanes } else { 0.0 };
            PartTime { part: name, share: time / total, flops_per_second }
        };
        self.parts = Part::ALL.iter().map(|(part, name)| of_part(*part, name)).collect();
        let known: f64 = self.parts.iter().map(|part| part.share).sum();
        self.parts.push(PartTime { part: "host", share: (1.0 - known).max(0.0), flops_per_second: 0.0 });
    }

    /// Adds what PyTorch made of it.
    pub(super) fn set_peer(&mut self, peer: PeerReport) {
        self.ratio = peer.best().map(|best| self.best().evaluations_per_second / best.evaluations_per_second);
        self.peer = Some(peer);
    }
}

impl fmt::Display for EngineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, latent, dtype, device, prompts, .. } = self;
        writeln!(f, "{model}, latents of {latent}x{latent}, {dtype} on {device}; prompts of a latent: {prompts}")?;
        writeln!(
            f,
            "large products: {:.3} TFLOP/s; an evaluation: {:.2} GFLOP",
            self.peak_flops / 1e12,
            self.flops_per_evaluation / 1e9
        )?;
        writeln!(f)?;
        writeln!(f, "batch  evaluations/s  ms/evaluation   TFLOP/s  of products  memory MiB")?;
        for measured in &self.batches {
            let rate = measured.evaluations_per_second;
            let flops = rate * self.flops_per_evaluation;
            let memory = measured.memory_bytes >> 20;
            writeln!(
                f,
                "{:>5}  {rate:>13.3}  {:>13.3}  {:>8.3}  {:>9.1} %  {memory:>10}",
                measured.batch,
                1e3 / rate,
                flops / 1e12,
                100.0 * flops / self.peak_flops,
            )?;
        }
        writeln!(f)?;
        writeln!(f, "part        share   TFLOP/s")?;
        for part in &self.parts {
            let rate = match part.flops_per_second {
                0.0 => String::new(),
                rate => format!("{:.3}", rate / 1e12),
            };
            writeln!(f, "{:<9} {:>5.1} %  {rate:>8}", part.part, 100.0 * part.share)?;
        }
        if let Some(peer) = &self.peer {
            writeln!(f)?;
            write!(f, "{peer}")?;
        }
        match self.ratio {
            Some(ratio) => write!(f, "elbo / PyTorch's best: {ratio:.2}"),
            None => Ok(()),
        }
    }
}
