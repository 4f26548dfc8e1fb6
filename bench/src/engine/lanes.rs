//! Runs the network as an engine does. On the CPU, there is a lane per thread, each with a share of the batch. On a GPU, two
//! lanes take turns with whole batches, so that one batch is always waiting.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use elbo_kernels::{Download, gpu};
use elbo_models::{Conditions, LoadOptions, Network, Pass, TextEmbeddings, TimeCache};

use super::EngineBenchOptions;
use super::report::Measured;
use crate::BenchError;

/// Tokens of a prompt: CLIP's; for Stable Diffusion 3, CLIP's followed by T5's.
const CLIP_TOKENS: usize = 77;
const T5_TOKENS: usize = 256;
/// Lanes of a GPU.
const GPU_LANES: usize = 2;
/// Timesteps that the points cycle through.
const TIMESTEPS: u32 = 100;

/// The network with its conditions.
#[derive(Debug)]
pub(super) struct Lanes {
    network: Network,
    conditions: Conditions,
    times: TimeCache,
    prompts: usize,
    threads: usize,
    side: usize,
    device: Device,
    dtype: DType,
    /// Held while a pass is submitted to a GPU.
    turn: Mutex<()>,
}

impl Lanes {
    /// Makes the network on a device.
    pub(super) fn new(options: &EngineBenchOptions, device: &Device) -> Result<Self, BenchError> {
        let load = LoadOptions::new(device.clone(), options.dtype);
        let compute = load.precision.compute;
        let network = options.subject.make(load)?;
        let side = options.latent.unwrap_or(network.sample_size());
        let (prompts, threads) = (options.prompts, options.threads);
        let conditions = match &network {
            Network::Dit(dit) => {
                let labels: Vec<u32> = (0..prompts as u32).map(|label| label % dit.classes() as u32).collect();
                Conditions::Labels(dit.label_cache(&labels)?)
            }
            network => {
                let (tokens, width, pooled) = tokens_and_widths(network);
                let random = |shape: &[usize]| {
                    Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?.to_device(device)?.to_dtype(compute)
                };
                let texts = TextEmbeddings {
                    tokens: random(&[prompts, tokens, width])?,
                    pooled: pooled.map(|pooled| random(&[prompts, pooled])).transpose()?,
                };
                network.text_conditions(&texts, 8 * side)?
            }
        };
        let timesteps: Vec<u32> = (0..TIMESTEPS).map(|i| i * 1000 / TIMESTEPS).collect();
        let times = network.time_cache(&timesteps, &timesteps.iter().map(|t| *t as f32).collect::<Vec<_>>())?;
        Ok(Self {
            network,
            conditions,
            times,
            prompts,
            threads,
            side,
            device: device.clone(),
            dtype: compute,
            turn: Mutex::default(),
        })
    }

    /// The network.
    pub(super) fn network(&self) -> &Network {
        &self.network
    }

    /// Side of the latents.
    pub(super) fn side(&self) -> usize {
        self.side
    }

    /// The share of a batch that each lane computes.
    fn shares(&self, batch: usize) -> Vec<usize> {
        if self.device.is_cpu() { shares(batch, self.threads) } else { vec![batch; GPU_LANES] }
    }

    /// How many lanes work on a batch.
    pub(super) fn at_work(&self, batch: usize) -> usize {
        if self.device.is_cpu() { self.shares(batch).len() } else { 1 }
    }

    /// Runs passes over a batch.
    pub(super) fn passes(&self, batch: usize, passes: usize) -> Result<(), BenchError> {
        let mut shares = self.shares(batch);
        shares.truncate(self.at_work(batch));
        on_every(shares.len(), |lane| {
            let work = self.work(shares[lane])?;
            (0..passes).try_for_each(|_| work.run(self))
        })
        .map(drop)
    }

    /// Measures passes over batches of one size.
    pub(super) fn measure(&self, batch: usize, options: &EngineBenchOptions) -> Result<Measured, BenchError> {
        let least = Duration::from_secs_f64(options.seconds);
        let shares = self.shares(batch);
        let mut rates = Vec::new();
        self.passes(batch, 1)?;
        let work = shares.iter().map(|share| self.work(*share)).collect::<Result<Vec<_>, _>>()?;
        for _ in 0..options.rounds.max(1) {
            let started = Instant::now();
            let of_lanes = on_every(shares.len(), |lane| {
                let mut passes = 0usize;
                while passes == 0 || started.elapsed() < least {
                    work[lane].run(self)?;
                    passes += 1;
                }
                Ok((passes * shares[lane], started.elapsed()))
            })?;
            let rate = |evaluations: usize, time: Duration| evaluations as f64 / time.as_secs_f64();
            rates.push(if self.device.is_cpu() {
                // Each lane has its own core, which idles once the lane is done.
                of_lanes.into_iter().map(|(evaluations, time)| rate(evaluations, time)).sum()
            } else {
                let end = of_lanes.iter().map(|(_, time)| *time).max().unwrap_or_default();
                rate(of_lanes.iter().map(|(evaluations, _)| evaluations).sum(), end)
            });
        }
        Ok(Measured::new(batch, rates, gpu::memory_high(&self.device)))
    }

    /// The evaluations of one lane.
    fn work(&self, evaluations: usize) -> Result<Work, BenchError> {
        let points = evaluations.div_ceil(self.prompts);
        let shape = (points, self.side, self.side, self.network.in_channels());
        let of_point = |i: usize| ((i / self.prompts) as u32, (i % self.prompts) as u32);
        Ok(Work {
            latents: Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?.to_device(&self.device)?.to_dtype(self.dtype)?,
            timesteps: (0..points as u32).map(|i| i * 7 % TIMESTEPS * 1000 / TIMESTEPS).collect(),
            evaluations: (0..evaluations).map(of_point).collect(),
        })
    }
}

/// The input of a lane's passes.
struct Work {
    latents: Tensor,
    timesteps: Vec<u32>,
    evaluations: Vec<(u32, u32)>,
}

impl Work {
    fn run(&self, lanes: &Lanes) -> Result<(), BenchError> {
        let pass = Pass { latents: &self.latents, timesteps: &self.timesteps, evaluations: &self.evaluations };
        if lanes.device.is_cpu() {
            lanes.network.forward(&pass, &lanes.times, &lanes.conditions)?;
            return Ok(());
        }
        let output = {
            let _turn = lanes.turn.lock().unwrap_or_else(PoisonError::into_inner);
            first_value(&lanes.network.forward(&pass, &lanes.times, &lanes.conditions)?)?
        };
        Ok(output.wait().map(drop)?)
    }
}

/// Tokens of a prompt, a token's width, and the width of the pooled text if there is one.
pub(super) fn tokens_and_widths(network: &Network) -> (usize, usize, Option<usize>) {
    let (width, pooled) = network.text_widths().unwrap_or_default();
    let tokens = match network {
        Network::Mmdit(_) => CLIP_TOKENS + T5_TOKENS,
        _ => CLIP_TOKENS,
    };
    (tokens, width, pooled)
}

/// Downloads one value of a tensor. Once it arrives, the whole tensor has been computed.
pub(super) fn first_value(x: &Tensor) -> Result<Download, BenchError> {
    Ok(Download::start(&x.flatten_all()?.narrow(0, 0, 1)?)?)
}

/// Divides a batch evenly among at most `lanes` lanes, none without work.
fn shares(batch: usize, lanes: usize) -> Vec<usize> {
    let lanes = lanes.min(batch).max(1);
    (0..lanes).map(|lane| batch / lanes + usize::from(lane < batch % lanes)).collect()
}

/// Runs `work` with the number of each lane in parallel, and returns the results.
pub(super) fn on_every<T: Send>(
    lanes: usize,
    work: impl Fn(usize) -> Result<T, BenchError> + Sync,
) -> Result<Vec<T>, BenchError> {
    std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = (0..lanes).map(|lane| scope.spawn(move || work(lane))).collect();
        running.into_iter().map(|lane| lane.join().map_err(|_| BenchError::Lane)?).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_divided_completely_and_without_idle_lanes() {
        assert_eq!(shares(7, 3), [3, 2, 2]);
        assert_eq!(shares(1, 2), [1]);
        assert_eq!(shares(4, 2), [2, 2]);
    }
}
