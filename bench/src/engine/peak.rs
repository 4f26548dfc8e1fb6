//! The matrix product rate that this program reaches on a device.

use std::time::Instant;

use candle_core::{Device, Tensor};
use elbo_kernels::Linear;
use elbo_models::Precision;

use super::EngineBenchOptions;
use crate::BenchError;

/// Rows, inputs and outputs of the product on a core and on a GPU: large enough that only the product matters.
const SIDE: [usize; 2] = [2048, 8192];
/// Products at a time on a core, and on a GPU, where they are queued.
const PRODUCTS: [usize; 2] = [1, 20];
/// Images that the rows belong to.
const IMAGES: usize = 32;
/// Measurements.
const REPEATS: usize = 6;

/// What a device can do, in floating point operations per second: the best of several measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peak {
    /// Multiply-adds in registers, on all CPU threads at once.
    pub(super) registers: Option<f64>,
    /// Large products.
    pub(super) products: f64,
}

impl Peak {
    pub(super) fn measure(device: &Device, options: &EngineBenchOptions) -> Result<Self, BenchError> {
        let registers = if device.is_cpu() {
            let of_threads = super::lanes::on_every(options.threads, |_| Ok(elbo_kernels::peak::flops_per_second()))?;
            Some(of_threads.iter().sum())
        } else {
            None
        };
        Ok(Self { registers, products: products(device, options)? })
    }
}

fn products(device: &Device, options: &EngineBenchOptions) -> Result<f64, BenchError> {
    let kind = usize::from(!device.is_cpu());
    let (side, products) = (SIDE[kind], PRODUCTS[kind]);
    let threads = if device.is_cpu() { options.threads } else { 1 };
    let dtype = Precision::on(device, options.dtype).compute;
    let random = || Tensor::rand(-1f32, 1f32, (side, side), &Device::Cpu)?.to_device(device)?.to_dtype(dtype);
    // Shaped like a batch of images, because that decides how a layer is computed.
    let x = random()?.reshape((IMAGES, side / IMAGES, side))?;
    let layer = Linear::new(&random()?, None)?;
    let work = |_| {
        for _ in 1..products {
            layer.forward(&x, None)?;
        }
        Ok(super::lanes::first_value(&layer.forward(&x, None)?)?.wait().map(drop)?)
    };
    work(0)?;
    let mut best = 0f64;
    for _ in 0..REPEATS {
        let started = Instant::now();
        super::lanes::on_every(threads, work)?;
        let flops = threads * products * 2 * side * side * side;
        best = best.max(flops as f64 / started.elapsed().as_secs_f64());
    }
    Ok(best)
}
