//! Models of full size with random weights. `tests/full_size/make.py` writes them and says how to run this test.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device, safetensors};
use elbo_models::{ClipTextModel, LoadOptions, Pass, Probe, TextEmbeddings, Unet, VaeEncoder};
use elbo_tests::numbers::{assert_close, channels_last};

/// Relative to the largest magnitude.
const TOLERANCE: f64 = 1e-4;

#[test]
#[ignore = "needs a model written by tests/full_size/make.py"]
fn a_model_of_full_size_matches_diffusers() {
    let dir = PathBuf::from(std::env::var_os("ELBO_FULL_SIZE").expect("ELBO_FULL_SIZE, the model's directory"));
    let reference = safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap();
    let integers = |name: &str| reference[name].to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1::<i64>();
    let integers = |name: &str| integers(name).unwrap().into_iter().map(|v| v as u32).collect::<Vec<_>>();
    let options = LoadOptions::default();

    let ids: Vec<Vec<u32>> = integers("ids").chunks(77).map(<[u32]>::to_vec).collect();
    let encoder = ClipTextModel::load(&dir.join("text_encoder"), &options).unwrap();
    let embeds = encoder.forward(&ids, &mut Probe::none()).unwrap().last_hidden_state;
    assert_close("embeds", &embeds, &reference["embeds"], TOLERANCE);
    drop(encoder);

    let vae = VaeEncoder::load(&dir.join("vae"), &options).unwrap();
    let latents = vae.encode(&channels_last(&reference["pixels"]), &mut Probe::none()).unwrap();
    assert_close("latents", &latents, &channels_last(&reference["latents"]), TOLERANCE);
    drop(vae);

    let started = Instant::now();
    let unet = Unet::load(&dir.join("unet"), &options).unwrap();
    println!("loading the UNet took {:.1?}", started.elapsed());
    let (started, timesteps) = (Instant::now(), integers("timestep"));
    let times = unet.time_cache(&timesteps, &timesteps.iter().map(|t| *t as f32).collect::<Vec<_>>()).unwrap();
    let texts = TextEmbeddings { tokens: reference["embeds"].clone(), pooled: None };
    let prompts = unet.prompt_cache(&texts, 512).unwrap();
    let input =
        Pass { latents: &channels_last(&reference["x_t"]), timesteps: &timesteps, evaluations: &[(0, 0), (0, 1)] };
    let epsilon = unet.forward(&input, &times, &prompts).unwrap();
    println!("two evaluations took {:.1?} on one core", started.elapsed());
    assert_close("epsilon", &epsilon, &channels_last(&reference["epsilon"]), TOLERANCE);
}
