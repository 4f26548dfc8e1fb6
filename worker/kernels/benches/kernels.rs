//! Measures the kernels on one thread, beside the core's peak and candle's operations.
//!
//! `cargo bench --bench kernels`, or with a part of a name behind `--`. `ELBO_SIMD` names the instruction set.

#![allow(clippy::panic, reason = "a benchmark has no caller to return an error to")]

use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor};
use elbo_kernels::{
    Conv2d, FeedForward, Fused, InstructionSet, KeyValues, LayerNorm, Linear, Padding, cross_attention,
};
use elbo_kernels::{peak, self_attention};

/// How long each side of a comparison is measured in a round.
const ROUND: Duration = Duration::from_millis(300);
/// Rounds, in which both sides take turns.
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    // candle's operations use every core otherwise, and read this once.
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let run = std::env::current_exe().and_then(|program| {
            std::process::Command::new(program).args(std::env::args_os().skip(1)).env("RAYON_NUM_THREADS", "1").status()
        });
        return run.map(|_| ()).map_err(candle_core::Error::wrap);
    }
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    let set = InstructionSet::in_use().map_err(candle_core::Error::wrap)?;
    println!("{set}: {:.1} GFLOP/s of multiply-adds in registers", peak::flops_per_second() / 1e9);
    println!("{:44} {:>8} {:>8} {:>8} {:>6}", "", "GFLOP/s", "of peak", "candle", "ratio");
    products(&filter)?;
    convolutions(&filter)?;
    attention(&filter)
}

/// Linear layers and feed-forwards of Stable Diffusion 2's UNet with 64x64 latents, and of the digits model.
fn products(filter: &str) -> Result<()> {
    for (rows, inputs, outputs) in [
        (2048, 2048, 2048),
        (4096, 320, 320),
        (4096, 320, 960),
        (1024, 640, 640),
        (256, 1280, 1280),
        (64, 1280, 1280),
        (256, 5120, 1280),
        (64, 64, 192),
        (64, 256, 64),
    ] {
        let (x, weight, bias) = (random((rows, inputs))?, random((outputs, inputs))?, random(outputs)?);
        let layer = Linear::new(&weight, Some(&bias))?;
        let name = format!("linear {rows} x {inputs} x {outputs}");
        let reference = || x.matmul(&weight.t()?)?.broadcast_add(&bias);
        compare(filter, &name, 2 * rows * inputs * outputs, || layer.forward(&x, None), reference)?;
    }
    for (positions, channels) in [(4096, 320), (1024, 640), (256, 1280), (64, 64)] {
        let x = random((1, positions, channels))?;
        let weights = [random((8 * channels, channels))?, random((channels, 4 * channels))?];
        let (scale, shift) = (random(channels)?, random(channels)?);
        let [gate, out] = [Linear::new(&weights[0], None)?, Linear::new(&weights[1], None)?];
        let block = FeedForward::new(LayerNorm::new(1e-5, &scale, &shift)?, gate, out);
        let norm = candle_nn::LayerNorm::new(scale, shift, 1e-5);
        let reference = || {
            let hidden = candle_nn::Module::forward(&norm, &x)?.squeeze(0)?.matmul(&weights[0].t()?)?;
            let halves = hidden.chunk(2, 1)?;
            (&halves[0] * halves[1].gelu_erf()?)?.matmul(&weights[1].t()?)? + x.squeeze(0)?
        };
        let flops = 2 * positions * channels * 12 * channels;
        compare(filter, &format!("feed-forward {positions} x {channels}"), flops, || block.forward(&x), reference)?;
    }
    Ok(())
}

/// FLOP of a convolution are those of its definition, of which Winograd's method needs 4/9.
fn convolutions(filter: &str) -> Result<()> {
    for (side, inputs, outputs, stride) in [
        (64, 320, 320, 1),
        (64, 640, 320, 1),
        (32, 640, 640, 1),
        (16, 1280, 1280, 1),
        (8, 1280, 1280, 1),
        (64, 320, 320, 2),
        (64, 320, 4, 1),
        (8, 64, 64, 1),
        (4, 128, 128, 1),
    ] {
        let (x, kernel, bias) = (random((1, side, side, inputs))?, random((outputs, inputs, 3, 3))?, random(outputs)?);
        let conv = Conv2d::new(&kernel, Some(&bias), stride, Padding::Around)?;
        let planes = x.permute((0, 3, 1, 2))?.contiguous()?;
        let added = bias.reshape((1, outputs, 1, 1))?;
        let name = format!("convolution {side}x{side} {inputs} to {outputs}{}", if stride > 1 { " by 2" } else { "" });
        let flops = 2 * 9 * inputs * outputs * (side / stride) * (side / stride);
        let reference = || planes.conv2d(&kernel, 1, stride, 1, 1)?.broadcast_add(&added);
        compare(filter, &name, flops, || conv.forward(&x, Fused::default()), reference)?;
    }
    Ok(())
}

/// FLOP of attention are those of its two products, without the softmax.
fn attention(filter: &str) -> Result<()> {
    let plain = |q: &Tensor, k: &Tensor, v: &Tensor, heads: usize| {
        let split = |x: &Tensor| {
            let (batch, len, channels) = x.dims3()?;
            x.reshape((batch, len, heads, channels / heads))?.transpose(1, 2)?.contiguous()
        };
        let dim = q.dim(2)? / heads;
        let scores = (split(q)?.matmul(&split(k)?.t()?)? / (dim as f64).sqrt())?;
        candle_nn::ops::softmax_last_dim(&scores)?.matmul(&split(v)?)?.transpose(1, 2)?.contiguous()
    };
    for (len, heads, dim) in [(4096, 5, 64), (1024, 10, 64), (256, 20, 64), (4096, 8, 40), (64, 4, 16)] {
        let qkv = random((1, len, 3 * heads * dim))?;
        let flops = 4 * len * len * heads * dim;
        let reference = || {
            let parts = qkv.chunk(3, 2)?;
            plain(&parts[0], &parts[1], &parts[2], heads)
        };
        let name = format!("self-attention {len} x {heads} heads of {dim}");
        compare(filter, &name, flops, || self_attention(&qkv, heads, false), reference)?;
        let (q, k) = (random((1, len, heads * dim))?, random((1, 77, heads * dim))?);
        let cache = KeyValues::new(&k, &k, heads)?;
        let name = format!("cross-attention {len} x 77 x {heads} heads of {dim}");
        let ours = || cross_attention(&q, &cache, &[(0, 0)]);
        compare(filter, &name, 4 * len * 77 * heads * dim, ours, || plain(&q, &k, &k, heads))?;
    }
    Ok(())
}

fn random(shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Tensor::rand(-1f32, 1f32, shape, &Device::Cpu)
}

/// Prints a line with the fastest rounds of both.
fn compare(
    filter: &str,
    name: &str,
    flops: usize,
    ours: impl Fn() -> Result<Tensor>,
    reference: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    if !name.contains(filter) {
        return Ok(());
    }
    let [mut peak_rate, mut rate, mut candle] = [0f64; 3];
    for _ in 0..ROUNDS {
        peak_rate = peak_rate.max(peak::flops_per_second());
        rate = rate.max(flops as f64 / seconds(&ours)?);
        candle = candle.max(flops as f64 / seconds(&reference)?);
    }
    let share = 100.0 * rate / peak_rate;
    println!("{name:44} {:8.1} {share:6.0} % {:8.1} {:6.2}", rate / 1e9, candle / 1e9, rate / candle);
    Ok(())
}

/// The shortest time of one call within a round.
fn seconds(work: &impl Fn() -> Result<Tensor>) -> Result<f64> {
    let (begin, mut best) = (Instant::now(), f64::MAX);
    while begin.elapsed() < ROUND {
        let started = Instant::now();
        work()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}
