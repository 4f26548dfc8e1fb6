//! Measures the UNet's evaluations per second on one thread, for the digits model with ten prompts per point.
//!
//! `cargo bench --bench unet`; the throughput column counts evaluations.

#![allow(clippy::panic, reason = "a benchmark has no caller to return an error to")]

use std::path::Path;

use candle_core::{Device, Tensor};
use divan::counter::ItemsCount;
use elbo_core::class::Classes;
use elbo_models::{DiffusionModel, Pass};

const PROMPTS: u32 = 10;

fn main() {
    divan::main();
}

/// A forward pass of `points` points with every prompt.
#[divan::bench(args = [1, 2, 4, 8])]
fn forward(bencher: divan::Bencher<'_, '_>, points: usize) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cli/demo/model");
    let Ok(model) = DiffusionModel::load(&dir) else {
        panic!("no model in {}", dir.display());
    };
    let names: Vec<String> = (0..PROMPTS).map(|i| i.to_string()).collect();
    let timesteps: Vec<u32> = (0..points as u32).map(|i| 25 + 100 * i).collect();
    let shape = (points, 8, 8, 4);
    let prepared = (|| {
        let classes = Classes::parse(&names.join("\n"), &["a photo of the digit {}".to_owned()]).unwrap_or_default();
        let conditions = model.text_conditions(&classes.texts())?;
        let latents = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
        let times: Vec<f32> = timesteps.iter().map(|t| *t as f32).collect();
        Ok::<_, elbo_models::ModelError>((conditions, model.network().time_cache(&timesteps, &times)?, latents))
    })();
    let Ok((conditions, times, latents)) = prepared else {
        panic!("preparing the model failed");
    };
    let evaluations: Vec<(u32, u32)> = (0..points as u32).flat_map(|p| (0..PROMPTS).map(move |c| (p, c))).collect();
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
    bencher.counter(ItemsCount::new(evaluations.len())).bench(|| model.network().forward(&pass, &times, &conditions));
}
