//! Autoencoders and networks, submodule by submodule.

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_models::{Conditions, Dit, ModelError, Network, Pass, Probe, VaeEncoder};
use elbo_tests::fixtures;
use elbo_tests::numbers::{assert_close, bits, channels_last};

use crate::for_each;
use crate::reference::{Reference, device, options, times};

for_each!(check_latents:
    latents_of_digits_sd "digits-sd",
    latents_of_stable_diffusion_1 "sd15",
    latents_of_sdxl "sdxl",
    latents_of_stable_diffusion_3 "sd3",
    latents_of_digits_dit "digits-dit",
);

fn check_latents(fixture: &str) {
    let reference = Reference::open(fixture);
    let vae = VaeEncoder::load(&reference.model.join("vae"), &options()).unwrap();
    let mut seen = 0;
    let mut watch = |name: &str, tensor: &Tensor| {
        let name = format!("vae.{name}");
        if reference.has(&name) {
            let first = tensor.narrow(0, 0, 1).unwrap();
            assert_close(&name, &first, &reference.channels_last(&name), 5e-6);
            seen += 1;
        }
    };
    let pixels = reference.pixels();
    let latents = vae.encode(&pixels, &mut Probe::new(&mut watch)).unwrap();
    assert_eq!(seen, reference.tensors.keys().filter(|k| k.starts_with("vae.")).count());
    assert_close("latents", &latents, &reference.channels_last("latents_mean"), 1e-5);
    let alone = vae.encode(&pixels.narrow(0, 5, 1).unwrap(), &mut Probe::none()).unwrap();
    assert_same("an image alone", &alone, &latents.narrow(0, 5, 1).unwrap());
}

for_each!(check_network:
    stages_of_digits_sd "digits-sd",
    stages_of_stable_diffusion_1 "sd15",
    stages_of_stable_diffusion_2 "sd2-eps",
    stages_of_stable_diffusion_2_v "sd2-v",
    stages_of_sdxl "sdxl",
    stages_of_stable_diffusion_3 "sd3",
    stages_of_stable_diffusion_35 "sd35",
    stages_of_digits_dit "digits-dit",
    stages_of_bk_sdm_base "unets/bk-sdm-base",
    stages_of_bk_sdm_small "unets/bk-sdm-small",
    stages_of_bk_sdm_tiny_and_tiny_sd "unets/bk-sdm-tiny",
    stages_of_bk_sdm_v2_base "unets/bk-sdm-v2-base",
    stages_of_bk_sdm_v2_small "unets/bk-sdm-v2-small",
    stages_of_bk_sdm_v2_tiny "unets/bk-sdm-v2-tiny",
    stages_of_sd_turbo "unets/sd-turbo",
    stages_of_sdxl_turbo "unets/sdxl-turbo",
    stages_of_ssd_1b "unets/ssd-1b",
    stages_of_segmind_vega "unets/segmind-vega",
    stages_of_koala "unets/koala-700m",
    stages_of_latent_consistency "unets/lcm",
    stages_of_only_cross_attention "unets/only-cross",
);

fn check_network(fixture: &str) {
    let reference = Reference::open(fixture);
    let (model, schedule) = (reference.model(), reference.schedule());
    let timesteps = [reference.timesteps()[9]];
    let cache = model.network().time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let conditions = reference.conditions(&model);
    let latents = reference.noisy(&schedule, 0, 9);
    if reference.has("x_t_0_9") {
        assert_close("x_t", &latents, &reference.channels_last("x_t_0_9"), 1e-6);
    }
    let prefix = if matches!(model.network(), Network::Unet(_)) { "unet." } else { "transformer." };
    let mut seen = Vec::new();
    let mut watch = |name: &str, tensor: &Tensor| {
        let name = format!("{prefix}{name}");
        if reference.has(&name) {
            let expected = reference.get(&name);
            let expected = if expected.rank() == 4 { reference.channels_last(&name) } else { expected.clone() };
            assert_close(&name, tensor, &expected, 1e-5);
            seen.push(name);
        }
    };
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 7)] };
    let mut probe = Probe::new(&mut watch);
    match (model.network(), &conditions) {
        (Network::Unet(unet), Conditions::Prompts(cache_of_prompts)) => {
            unet.forward_probed(&pass, &cache, cache_of_prompts, &mut probe)
        }
        (Network::Dit(dit), Conditions::Labels(labels)) => dit.forward_probed(&pass, &cache, labels, &mut probe),
        (Network::Mmdit(mmdit), Conditions::Contexts(contexts)) => {
            mmdit.forward_probed(&pass, &cache, contexts, &mut probe)
        }
        _ => panic!("conditions of another family"),
    }
    .unwrap();
    if let Network::Unet(unet) = model.network() {
        let embedding = unet.time_embedding(&times(&schedule, &timesteps)).unwrap();
        assert_close("time embedding", &embedding, reference.get("unet.time_embedding"), 2e-6);
        seen.push("unet.time_embedding".into());
        if reference.has("unet.add_embedding") {
            let pooled = reference.get("pooled_prompt_embeds").narrow(0, 7, 1).unwrap().to_device(&device()).unwrap();
            let added = unet.added_embedding(Some(&pooled), model.size()).unwrap().unwrap();
            assert_close("added embedding", &added, reference.get("unet.add_embedding"), 5e-6);
            seen.push("unet.add_embedding".into());
        }
    }
    let unseen: Vec<_> = reference.tensors.keys().filter(|k| k.starts_with(prefix) && !seen.contains(k)).collect();
    assert!(unseen.is_empty(), "not compared: {unseen:?}");

    if reference.has("model_output_uncond_0_9") {
        let (conditions, last) = match model.network() {
            Network::Dit(dit) => (Conditions::Labels(dit.label_cache(&[10]).unwrap()), 0),
            _ => (conditions, 10),
        };
        let pass = Pass { evaluations: &[(0, last)], ..pass };
        let empty = model.network().forward(&pass, &cache, &conditions).unwrap();
        assert_close("unconditional", &empty, &reference.channels_last("model_output_uncond_0_9"), 1e-5);
    }
}

for_each!(check_nonsquare:
    digits_sd_takes_latents_that_are_not_square "digits-sd",
    stable_diffusion_2_takes_latents_that_are_not_square "sd2-eps",
    sdxl_takes_latents_that_are_not_square "sdxl",
    stable_diffusion_3_takes_latents_that_are_not_square "sd3",
    bk_sdm_tiny_takes_latents_that_are_not_square "unets/bk-sdm-tiny",
    ssd_1b_takes_latents_that_are_not_square "unets/ssd-1b",
);

fn check_nonsquare(fixture: &str) {
    let reference = Reference::open(fixture);
    let model = reference.model();
    let (timesteps, inputs): (Vec<u32>, Vec<f32>) = if reference.has("nonsquare_timesteps") {
        let timesteps = reference.integers("nonsquare_timesteps");
        (timesteps.clone(), timesteps.iter().map(|t| *t as f32).collect())
    } else {
        let sigmas = reference.get("nonsquare_sigmas").to_vec1::<f32>().unwrap();
        ((0..).take(sigmas.len()).collect(), sigmas.iter().map(|s| 1000.0 * s).collect())
    };
    let cache = model.network().time_cache(&timesteps, &inputs).unwrap();
    let latents = reference.channels_last("nonsquare_in").to_device(&device()).unwrap();
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 3), (1, 3)] };
    let output = model.network().forward(&pass, &cache, &reference.conditions(&model)).unwrap();
    assert_close("output", &output, &reference.channels_last("nonsquare_out"), 1e-5);
}

/// Asserts that the bits are the same. On a GPU the values only have to be close, since its libraries may choose another order
/// of summation for another batch.
pub(crate) fn assert_same(name: &str, found: &Tensor, expected: &Tensor) {
    if device().is_cpu() {
        assert_eq!(bits(found), bits(expected), "{name}")
    } else {
        assert_close(name, found, expected, 1e-5)
    }
}

for_each!(check_batches:
    digits_sd_gives_the_same_in_any_batch "digits-sd",
    sdxl_gives_the_same_in_any_batch "sdxl",
    stable_diffusion_35_gives_the_same_in_any_batch "sd35",
    digits_dit_gives_the_same_in_any_batch "digits-dit",
    bk_sdm_tiny_gives_the_same_in_any_batch "unets/bk-sdm-tiny",
    ssd_1b_gives_the_same_in_any_batch "unets/ssd-1b",
    latent_consistency_gives_the_same_in_any_batch "unets/lcm",
    only_cross_attention_gives_the_same_in_any_batch "unets/only-cross",
);

fn check_batches(fixture: &str) {
    let reference = Reference::open(fixture);
    let (model, schedule) = (reference.model(), reference.schedule());
    let conditions = reference.conditions(&model);
    let timesteps = [0, 9, 19].map(|k| reference.timesteps()[k]);
    let cache = model.network().time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let last = reference.get("latents_mean").dims()[0] - 1;
    let latents = [(0, 0), (3, 9), (5, 19)].map(|(i, k)| reference.noisy(&schedule, last.min(i), k));
    let latents = Tensor::cat(&latents, 0).unwrap();
    let evaluations = [(0, 4), (0, 0), (0, 7), (1, 7), (2, 3), (2, 9), (2, 1)];
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
    let batch = model.network().forward(&pass, &cache, &conditions).unwrap();
    for (i, &(point, condition)) in evaluations.iter().enumerate() {
        let p = point as usize;
        let pass = Pass {
            latents: &latents.narrow(0, p, 1).unwrap(),
            timesteps: &timesteps[p..=p],
            evaluations: &[(0, condition)],
        };
        let alone = model.network().forward(&pass, &cache, &conditions).unwrap();
        assert_same(&format!("evaluation {i}"), &alone, &batch.narrow(0, i, 1).unwrap());
    }
}

#[test]
fn latents_of_a_wrong_shape_are_refused() {
    for fixture in ["digits-sd", "digits-dit", "sd3"] {
        let reference = Reference::open(fixture);
        let model = reference.model();
        let cache = model.network().time_cache(&[5], &[5.0]).unwrap();
        let odd = Tensor::zeros((1, 7, 8, model.network().in_channels()), DType::F32, &device()).unwrap();
        let pass = Pass { latents: &odd, timesteps: &[5], evaluations: &[(0, 0)] };
        let error = model.network().forward(&pass, &cache, &reference.conditions(&model)).unwrap_err();
        assert!(matches!(error, ModelError::Input(_)), "{error}");
    }
}

#[test]
fn the_original_names_of_dit_are_understood() {
    let dir = fixtures().join("dit-original");
    let reference = safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap();
    let dit = Dit::load(&dir.join("transformer"), &options()).unwrap();
    let integers = |name: &str| reference[name].to_vec1::<i64>().unwrap().into_iter().map(|v| v as u32);
    let (timesteps, labels): (Vec<u32>, Vec<u32>) = (integers("timesteps").collect(), integers("labels").collect());
    let inputs: Vec<f32> = timesteps.iter().map(|t| *t as f32).collect();
    let cache = dit.time_cache(&timesteps, &inputs).unwrap();
    let pass = Pass {
        latents: &channels_last(&reference["latents"]).to_device(&device()).unwrap(),
        timesteps: &timesteps,
        evaluations: &[(0, 0), (1, 1), (2, 2)],
    };
    let output = dit.forward(&pass, &cache, &dit.label_cache(&labels).unwrap()).unwrap();
    assert_close("output", &output, &channels_last(&reference["output"]), 1e-5);
    assert!(matches!(dit.label_cache(&[6]), Err(ModelError::NoSuchClass { .. })));
}
