//! The results of the engine benchmark.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::Device;
use elbo_kernels::profile::{Part, Span};
use elbo_kernels::{InstructionSet, gpu};
use serde::Serialize;

use super::EngineBenchOptions;
use super::candle::CandleReport;
use super::peak::Peak;
use super::peer::PeerReport;

/// All results, as `--json` prints them.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// This program's version.
    pub version: &'static str,
    /// The network.
    pub model: String,
    /// Side of the latents.
    pub latent: usize,
    /// The element type.
    pub dtype: String,
    /// The device.
    pub device: String,
    /// Prompts per noisy latent.
    pub prompts: usize,
    /// The CUDA libraries in use.
    pub libraries: Vec<LibraryReport>,
    /// The instruction set of the CPU's kernels.
    pub instruction_set: Option<&'static str>,
    /// Floating point operations per second of multiply-adds in the registers of all threads at once, if measured on a CPU.
    pub core_flops: Option<f64>,
    /// Floating point operations per second of large products, if measured: the upper bound.
    pub peak_flops: Option<f64>,
    /// Floating point operations of the products in an evaluation.
    pub flops_per_evaluation: f64,
    /// Every batch size that was measured.
    pub batches: Vec<Measured>,
    /// The batch size that was profiled: the fastest. On a GPU, profiling waits for every operation.
    pub profiled_batch: usize,
    /// The time of a pass by part; `host` is the time outside of operations.
    pub parts: Vec<PartTime>,
    /// The same by operation, the longest first.
    pub operations: Vec<OperationTime>,
    /// The same network in candle-transformers.
    pub candle: Option<CandleReport>,
    /// Why candle-transformers was not measured, if it should have been.
    pub candle_error: Option<String>,
    /// The same network in PyTorch.
    pub peer: Option<PeerReport>,
    /// Why PyTorch was not measured, if it should have been.
    pub peer_error: Option<String>,
    /// Evaluations per second divided by those of PyTorch's fastest mode, each at its best batch size.
    pub ratio: Option<f64>,
}

/// The measurement of a batch size.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Evaluations per batch.
    pub batch: usize,
    /// Evaluations per second of the fastest round.
    pub evaluations_per_second: f64,
    /// Evaluations per second of the median round.
    pub median: f64,
    /// Peak memory until then, in bytes: the device's or the process's.
    pub memory_bytes: u64,
}

/// A library that this process has loaded.
#[derive(Clone, Debug, Serialize)]
pub struct LibraryReport {
    /// Like libcublasLt.
    pub name: String,
    /// The version that it reports, if known.
    pub version: Option<String>,
    /// Its file.
    pub path: PathBuf,
}

/// The time of one operation in a pass.
#[derive(Clone, Debug, Serialize)]
pub struct OperationTime {
    /// The operation.
    pub name: &'static str,
    /// The part it belongs to.
    pub part: &'static str,
    /// How often a pass runs it.
    pub calls: f64,
    /// Time of a pass, summed over the lanes.
    pub milliseconds: f64,
}

/// The time of one kind of operation in a pass.
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
    /// Summarises the rounds; there is at least one.
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

/// Peak memory of this process, as Linux reports it; 0 elsewhere.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

impl EngineReport {
    pub(super) fn new(
        options: &EngineBenchOptions,
        device: &Device,
        latent: usize,
        peak: Option<Peak>,
        batches: Vec<Measured>,
    ) -> Self {
        let libraries = gpu::libraries().into_iter();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            model: options.subject.to_string(),
            latent,
            dtype: options.dtype.to_string(),
            device: gpu::name(device).unwrap_or_else(|| format!("cpu, {} threads", options.threads)),
            prompts: options.prompts,
            libraries: libraries
                .map(|gpu::Library { name, version, path }| LibraryReport { name, version, path })
                .collect(),
            instruction_set: device.is_cpu().then(|| InstructionSet::in_use().map_or("", InstructionSet::name)),
            core_flops: peak.and_then(|peak| peak.registers),
            peak_flops: peak.map(|peak| peak.products),
            flops_per_evaluation: 0.0,
            batches,
            profiled_batch: 0,
            parts: Vec::new(),
            operations: Vec::new(),
            candle: None,
            candle_error: None,
            peer: None,
            peer_error: None,
            ratio: None,
        }
    }

    /// The fastest batch.
    pub fn best(&self) -> Measured {
        let rate = |measured: &&Measured| measured.evaluations_per_second;
        let best = self.batches.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)));
        best.copied().unwrap_or(Measured { batch: 1, evaluations_per_second: 0.0, median: 0.0, memory_bytes: 0 })
    }

    /// Adds a profile of passes over the fastest batch.
    pub(super) fn add_profile(&mut self, spans: &[Span], time: Duration, passes: usize, lanes: usize) {
        self.profiled_batch = self.best().batch;
        let evaluations = self.profiled_batch * passes;
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
        let mut operations: BTreeMap<(Part, &'static str), (usize, Duration)> = BTreeMap::new();
        for span in spans {
            let (calls, time) = operations.entry((span.part, span.name)).or_default();
            *calls += 1;
            *time += span.time;
        }
        let of_pass = |value: f64| value / passes as f64;
        let operation = |((part, name), (calls, time)): ((Part, &'static str), (usize, Duration))| OperationTime {
            name,
            part: part.name(),
            calls: of_pass(calls as f64),
            milliseconds: of_pass(1e3 * time.as_secs_f64()),
        };
        self.operations = operations.into_iter().map(operation).collect();
        self.operations.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
    }

    /// Adds PyTorch's results.
    pub(super) fn set_peer(&mut self, peer: PeerReport) {
        self.ratio = peer.best().map(|best| self.best().evaluations_per_second / best.evaluations_per_second);
        self.peer = Some(peer);
    }
}

impl fmt::Display for EngineReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, latent, dtype, device, prompts, .. } = self;
        writeln!(f, "{model}, latents of {latent}x{latent}, {dtype} on {device}; prompts of a latent: {prompts}")?;
        if let Some(set) = self.instruction_set {
            write!(f, "{set}; ")?;
        }
        if let Some(core) = self.core_flops {
            write!(f, "multiply-adds in registers: {:.3} TFLOP/s; ", core / 1e12)?;
        }
        if let Some(peak) = self.peak_flops {
            write!(f, "large products: {:.3} TFLOP/s; ", peak / 1e12)?;
        }
        writeln!(f, "an evaluation: {:.2} GFLOP", self.flops_per_evaluation / 1e9)?;
        for LibraryReport { name, version, path } in &self.libraries {
            writeln!(f, "{name} {} ({})", version.as_deref().unwrap_or_default(), path.display())?;
        }
        writeln!(f)?;
        writeln!(f, "batch  evaluations/s  ms/evaluation   TFLOP/s  of products  memory MiB")?;
        for measured in &self.batches {
            let rate = measured.evaluations_per_second;
            let flops = rate * self.flops_per_evaluation;
            let memory = measured.memory_bytes >> 20;
            let share = self.peak_flops.map_or_else(|| "-".to_owned(), |peak| format!("{:.1} %", 100.0 * flops / peak));
            writeln!(
                f,
                "{:>5}  {rate:>13.3}  {:>13.3}  {:>8.3}  {share:>11}  {memory:>10}",
                measured.batch,
                1e3 / rate,
                flops / 1e12,
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
        if let Some(error) = &self.candle_error {
            writeln!(f)?;
            writeln!(f, "candle-transformers was not measured: {error}")?;
        }
        if let Some(candle) = &self.candle {
            writeln!(f)?;
            write!(f, "{candle}")?;
            if let Some(best) = candle.best() {
                writeln!(f, "elbo / candle's best: {:.2}", self.best().evaluations_per_second / best)?;
            }
        }
        if let Some(error) = &self.peer_error {
            writeln!(f)?;
            write!(f, "PyTorch was not measured: {error}")?;
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
