//! Half precision and adapters: how weights change between file and layer.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_core::job::ModelDtype;
use elbo_core::loss::Loss;
use elbo_models::{DiffusionModel, LoadOptions, Lora, ModelError, Pass};
use elbo_tests::numbers::{channels_last, difference, flat};
use elbo_tests::{fixtures, model};

use crate::errors::table;
use crate::for_each;
use crate::reference::{Reference, device, times};

/// Mean and largest relative difference of two tables.
fn relative(found: &[f64], expected: &[f64]) -> (f64, f64) {
    assert_eq!(found.len(), expected.len());
    let all: Vec<f64> = found.iter().zip(expected).map(|(a, b)| (a / b - 1.0).abs()).collect();
    (all.iter().sum::<f64>() / all.len() as f64, all.iter().fold(0.0, |m, v| m.max(*v)))
}

for_each!(check_half_precision:
    half_precision_of_digits_sd "digits-sd",
    half_precision_of_stable_diffusion_1 "sd15",
    half_precision_of_stable_diffusion_2 "sd2-eps",
    half_precision_of_stable_diffusion_2_v "sd2-v",
    half_precision_of_sdxl "sdxl",
    half_precision_of_stable_diffusion_3 "sd3",
    half_precision_of_stable_diffusion_35 "sd35",
    half_precision_of_digits_dit "digits-dit",
);

/// In half precision, errors change at most twice as much as with PyTorch's own half precision.
fn check_half_precision(fixture: &str) {
    let reference = Reference::open(fixture);
    let theirs = safetensors::load(fixtures().join(fixture).join("precision.safetensors"), &Device::Cpu).unwrap();
    let exact = flat(reference.get("mse"));
    for (dtype, name) in [(ModelDtype::F16, "float16"), (ModelDtype::Bf16, "bfloat16")] {
        let model = DiffusionModel::load_with(&reference.model, &LoadOptions::new(device(), dtype)).unwrap();
        let ours = table(&reference, &model, &reference.schedule(), Loss::L2);
        let (ours, theirs) = (relative(&ours, &exact), relative(&flat(&theirs[name]), &exact));
        println!(
            "{fixture} {name}: mean {:.1e}, largest {:.1e}; PyTorch's {:.1e}, {:.1e}",
            ours.0, ours.1, theirs.0, theirs.1
        );
        assert!(ours.0 > 0.0 && ours.0 < 2.0 * theirs.0 && ours.1 < 2.0 * theirs.1);
    }
}

/// The model's outputs for the first image at the tenth timestep and all ten prompts, `[10, H, W, C]`.
fn predict(reference: &Reference, model: &DiffusionModel) -> Tensor {
    let (schedule, timesteps) = (reference.schedule(), [reference.timesteps()[9]]);
    let latents = reference.noisy(&schedule, 0, 9).to_device(&Device::Cpu).unwrap();
    let cache = model.network().time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let evaluations: Vec<_> = (0..10).map(|c| (0, c)).collect();
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
    model.network().forward(&pass, &cache, &reference.conditions(model)).unwrap()
}

fn with_loras(loras: &[(&str, f64)]) -> Result<DiffusionModel, ModelError> {
    let mut options = LoadOptions::default();
    for (name, scale) in loras {
        let path = fixtures().join("lora").join(name);
        options.loras.push(Arc::new(Lora::open(&path, *scale, &model())?));
    }
    DiffusionModel::load_with(&model(), &options)
}

#[test]
fn adapters_of_all_formats_match_diffusers_and_peft() {
    let (reference, lora) = (Reference::open("digits-sd"), fixtures().join("lora"));
    let expected = safetensors::load(lora.join("reference.safetensors"), &Device::Cpu).unwrap();
    let (diffusers, peft) = ("diffusers.safetensors", "peft/adapter_model.safetensors");
    let cases: [(&str, &[(&str, f64)]); 5] = [
        ("diffusers", &[(diffusers, 1.0)]),
        ("diffusers_half", &[(diffusers, 0.5)]),
        ("peft", &[(peft, 1.0)]),
        ("both", &[(diffusers, 0.5), (peft, 1.0)]),
        ("processors", &[("processors.safetensors", 1.0)]),
    ];
    let plain = predict(&reference, &with_loras(&[]).unwrap());
    for (name, loras) in cases {
        let model = with_loras(loras).unwrap();
        let found = predict(&reference, &model);
        let expected_output = channels_last(&expected[name]);
        let (error, effect) = (difference(name, &found, &expected_output), difference(name, &plain, &expected_output));
        println!("{name}: error {error:.2e}; the adapter changes the output by {effect:.2}");
        assert!(error < 2e-5 && effect > 0.01, "{name}: {error}");
        if name == "diffusers" {
            let text = model.encode_texts(&reference.strings("prompts")[..10]).unwrap();
            assert!(difference("text", &text.tokens, &expected["text"]) < 2e-5);
        }
    }
}

/// An adapter with the given tensors.
fn lora_error(tensors: &[(&str, &[usize])]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made.safetensors");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> =
        tensors.iter().map(|(key, shape)| ((*key).to_owned(), zeros(shape))).collect();
    safetensors::save(&tensors, &path).unwrap();
    let opened = Lora::open(&path, 1.0, &model());
    let loaded = opened.and_then(|lora| {
        let options = LoadOptions { loras: vec![Arc::new(lora)], ..LoadOptions::default() };
        DiffusionModel::load_with(&model(), &options)
    });
    let error = loaded.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("made.safetensors"), "{error}");
    error
}

#[test]
fn an_adapter_that_does_not_fit_is_named() {
    let module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q";
    let (down, up) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
    let error = lora_error(&[(&down, &[4, 48])]);
    assert!(error.contains(&down) && error.contains("other half"), "{error}");
    let error = lora_error(&[(&down, &[4, 48]), (&up, &[48, 3])]);
    assert!(error.contains("do not fit each other") && error.contains("[48, 3]"), "{error}");
    let error = lora_error(&[(&down, &[4, 47]), (&up, &[48, 4])]);
    assert!(error.contains("[4, 47]") && error.contains("[48, 48]"), "{error}");
    let (down, up) = ("unet.no.such.module.lora_A.weight", "unet.no.such.module.lora_B.weight");
    let error = lora_error(&[(down, &[4, 48]), (up, &[48, 4])]);
    assert!(error.contains("no.such.module.weight") && error.contains("[4, 48]"), "{error}");
    let error = lora_error(&[("transformer.x.lora_A.weight", &[4, 48])]);
    assert!(error.contains("the model has no transformer"), "{error}");
    let error = lora_error(&[("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", &[4, 48])]);
    assert!(error.contains("other half"), "{error}");
    assert!(lora_error(&[("unet.x.dora_scale", &[4])]).contains("unet.x.dora_scale"));
}
