//! Measures the same network in candle-transformers, in this process.

use std::fmt;
use std::time::Instant;

use candle_core::{Device, Tensor};
use elbo_core::job::ModelDtype;
use elbo_models::{LoadOptions, Network, TextEmbeddings, WeightsFrom};
use serde::Serialize;

use super::EngineBenchOptions;
use super::lanes::tokens_and_widths;
use super::report::Measured;
use crate::BenchError;
use crate::candle::CandleNetwork;

/// The timestep of every pass.
const TIMESTEP: f32 = 500.0;

/// candle-transformers' results.
#[derive(Clone, Debug, Serialize)]
pub struct CandleReport {
    /// Threads of an operation.
    pub threads: usize,
    /// The type that it computes in.
    pub dtype: String,
    /// Every batch size that was measured.
    pub batches: Vec<Measured>,
}

impl CandleReport {
    /// Evaluations per second of the fastest batch.
    pub fn best(&self) -> Option<f64> {
        self.batches.iter().map(|measured| measured.evaluations_per_second).reduce(f64::max)
    }
}

impl fmt::Display for CandleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "candle-transformers    batch  evaluations/s")?;
        let way = format!("{}, {} threads", self.dtype, self.threads);
        for measured in &self.batches {
            writeln!(f, "{way:<22} {:>5}  {:>13.3}", measured.batch, measured.evaluations_per_second)?;
        }
        Ok(())
    }
}

/// Runs its network with the configuration and the weights of ours, the same batches and threads.
pub(super) fn measure(options: &EngineBenchOptions, ours: &Network) -> Result<CandleReport, BenchError> {
    let refused = |why: String| Err(BenchError::Candle(why));
    if options.device.is_gpu() || options.dtype != ModelDtype::F32 {
        return refused("this benchmark runs it on the CPU in f32".to_owned());
    }
    let threads = candle_core::utils::get_num_threads();
    if threads != options.threads {
        let wanted = options.threads;
        return refused(format!("it uses {threads} threads: set RAYON_NUM_THREADS={wanted} for {wanted}"));
    }
    let mut load = LoadOptions::new(Device::Cpu, options.dtype);
    load.weights = WeightsFrom::Seed(0);
    let dir = options.subject.directory()?;
    let network = CandleNetwork::load(&dir.path().join(options.subject.family().network()), &load)?;
    let side = options.latent.unwrap_or(ours.sample_size());
    let random = |shape: &[usize]| Tensor::randn(0f32, 1f32, shape, &Device::Cpu);
    let mut batches = Vec::new();
    for &batch in &options.batches {
        let latents = random(&[batch, side, side, ours.in_channels()])?;
        let (tokens, width, pooled) = tokens_and_widths(ours);
        let texts = TextEmbeddings {
            tokens: random(&[batch, tokens, width])?,
            pooled: pooled.map(|pooled| random(&[batch, pooled])).transpose()?,
        };
        let pass = || network.forward(&latents, TIMESTEP, &texts);
        pass()?;
        let mut rates = Vec::new();
        for _ in 0..options.rounds.max(1) {
            let (started, mut passes) = (Instant::now(), 0);
            while passes == 0 || started.elapsed().as_secs_f64() < options.seconds {
                pass()?;
                passes += 1;
            }
            rates.push((passes * batch) as f64 / started.elapsed().as_secs_f64());
        }
        batches.push(Measured::new(batch, rates, None));
    }
    Ok(CandleReport { threads, dtype: network.dtype().as_str().to_owned(), batches })
}
