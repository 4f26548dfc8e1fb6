//! Models as other tools and versions save them. They load as the same models, or the difference is reported.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_models::{DiffusionModel, Inspection, ModelError};
use elbo_tests::numbers::assert_close;
use serde_json::{Value, json};

use crate::loading::copied;
use crate::reference::Reference;
use crate::stages::assert_same;

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// The model's encodings of a short and a long text.
fn embeddings(model: &Path) -> Tensor {
    let texts = ["a photo of a small cat", &"many words ".repeat(60)].map(str::to_owned);
    DiffusionModel::load(model).unwrap().encode_texts(&texts).unwrap().tokens
}

#[test]
fn padding_and_truncation_of_a_tokenizer_file_are_ignored() {
    for (fixture, tokenizers) in [("sd15", &["tokenizer"][..]), ("sdxl", &["tokenizer", "tokenizer_2"])] {
        let plain = Reference::open(fixture).model;
        let expected = embeddings(&plain);
        let padding = json!({"strategy": {"Fixed": 77}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!"});
        let truncation = json!({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0});
        for (key, value) in [("padding", padding), ("truncation", truncation)] {
            let model = copied(&plain);
            for tokenizer in tokenizers {
                edit(&model.path().join(tokenizer).join("tokenizer.json"), |file| file[key] = value.clone());
            }
            assert_same(&format!("{fixture} {key}"), &embeddings(model.path()), &expected);
        }
    }
}

/// Renames the weights in a file.
fn rename(path: &Path, name: impl Fn(&str) -> String) {
    let tensors = safetensors::load(path, &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> = tensors.into_iter().map(|(key, tensor)| (name(&key), tensor)).collect();
    safetensors::save(&tensors, path).unwrap();
}

#[test]
fn text_encoders_without_prefixes_are_the_same() {
    let plain = Reference::open("sd3").model;
    let expected = embeddings(&plain);
    let model = copied(&plain);
    for encoder in ["text_encoder", "text_encoder_2"] {
        let file = model.path().join(encoder).join("model.safetensors");
        rename(&file, |key| key.strip_prefix("text_model.").unwrap_or(key).to_owned());
    }
    let t5 = model.path().join("text_encoder_3/model.safetensors");
    rename(&t5, |key| key.replace("shared.", "embed_tokens.").trim_start_matches("encoder.").to_owned());
    assert_same("sd3", &embeddings(model.path()), &expected);
}

#[test]
fn a_null_end_of_text_means_the_default() {
    let plain = Reference::open("sd15").model;
    let model = copied(&plain);
    edit(&model.path().join("text_encoder/config.json"), |config| config["eos_token_id"] = Value::Null);
    assert_same("sd15", &embeddings(model.path()), &embeddings(&plain));
}

fn load_error(model: &Path) -> String {
    DiffusionModel::load(model).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn weights_are_found_in_any_one_variant() {
    let plain = Reference::open("digits-sd").model;
    let name = |variant: &str| format!("unet/diffusion_pytorch_model{variant}.safetensors");
    for variant in [".fp16", ".bf16", ".fp32", ".non_ema", ".ema"] {
        let model = copied(&plain);
        std::fs::rename(model.path().join(name("")), model.path().join(name(variant))).unwrap();
        DiffusionModel::load(model.path()).unwrap_or_else(|error| panic!("{variant}: {error}"));
    }
    let model = copied(&plain);
    let path = |variant: &str| model.path().join(name(variant));
    std::fs::rename(path(""), path(".non_ema")).unwrap();
    std::fs::copy(path(".non_ema"), path(".ema")).unwrap();
    match DiffusionModel::load(model.path()) {
        Err(error @ ModelError::Variants { .. }) => {
            let error = error.to_string();
            assert!(error.contains("model.ema.safetensors, diffusion_pytorch_model.non_ema.safetensors"), "{error}");
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn the_most_precise_variant_is_taken() {
    let model = copied(&Reference::open("digits-sd").model);
    let path = |variant: &str| model.path().join(format!("unet/diffusion_pytorch_model{variant}.safetensors"));
    std::fs::rename(path(""), path(".fp32")).unwrap();
    for variant in [".fp16", ".bf16"] {
        std::fs::write(path(variant), "never read").unwrap();
    }
    DiffusionModel::load(model.path()).unwrap();
}

#[test]
fn an_index_of_a_variant_is_found() {
    let model = copied(&Reference::open("digits-sd").model);
    let dir = model.path().join("unet");
    let shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors";
    let whole = dir.join("diffusion_pytorch_model.safetensors");
    let keys: Vec<String> = safetensors::load(&whole, &Device::Cpu).unwrap().into_keys().collect();
    std::fs::rename(&whole, dir.join(shard)).unwrap();
    let map: HashMap<String, &str> = keys.into_iter().map(|key| (key, shard)).collect();
    let index = json!({ "weight_map": map }).to_string();
    std::fs::write(dir.join("diffusion_pytorch_model.fp16.safetensors.index.json"), index).unwrap();
    DiffusionModel::load(model.path()).unwrap();
}

#[test]
fn latent_statistics_are_applied_as_in_diffusers() {
    let reference = Reference::open("sdxl");
    let model = copied(&reference.model);
    let (mean, std) = ([0.1f32, -0.2, 0.3, 0.4], [2.0f32, 0.5, 1.5, 4.0]);
    edit(&model.path().join("vae/config.json"), |config| {
        (config["latents_mean"], config["latents_std"]) = (json!(mean), json!(std));
    });
    let scale = {
        let config: Value =
            serde_json::from_slice(&std::fs::read(model.path().join("vae/config.json")).unwrap()).unwrap();
        config["scaling_factor"].as_f64().unwrap()
    };
    let found = DiffusionModel::load(model.path()).unwrap().encode_images(&reference.pixels()).unwrap();
    // The reference's latents are scaled: (latents - latents_mean) * scaling_factor / latents_std of the original ones.
    let row = |values: [f32; 4]| Tensor::new(&values, &Device::Cpu).unwrap();
    let unscaled = (reference.channels_last("latents_mean").to_dtype(DType::F32).unwrap() / scale).unwrap();
    let expected = unscaled.broadcast_sub(&row(mean)).unwrap().broadcast_div(&row(std)).unwrap();
    assert_close("latents", &found, &(expected * scale).unwrap(), 1e-5);

    let model = copied(&Reference::open("sd15").model);
    edit(&model.path().join("vae/config.json"), |config| {
        (config["latents_mean"], config["latents_std"]) = (json!(mean), json!(std));
    });
    let error = load_error(model.path());
    assert!(error.contains("vae/config.json") && error.contains("latents_mean"), "{error}");
}

#[test]
fn an_inspection_shows_the_schedule_and_each_error_once() {
    let model = copied(&Reference::open("digits-sd").model);
    edit(&model.path().join("scheduler/scheduler_config.json"), |config| {
        config["rescale_betas_zero_snr"] = true.into();
    });
    let found = Inspection::of(model.path(), "digits-sd");
    let schedule = found.schedule.unwrap();
    let parts = ["PNDMScheduler", "scaled_linear from 0.00085 to 0.012", "1000 timesteps", "zero terminal SNR"];
    assert!(parts.iter().all(|part| schedule.contains(part)), "{schedule}");
    assert_eq!(found.prediction.as_deref(), Some("epsilon"));
    assert!(found.ok, "{:?}", found.problems);

    std::fs::write(model.path().join("model_index.json"), "{").unwrap();
    let found = Inspection::of(model.path(), "digits-sd");
    assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
}

#[test]
fn an_inspection_warns_that_a_distilled_model_was_never_measured() {
    let cases = [
        ("bk-sdm-base", "layers"),
        ("bk-sdm-small", "layers"),
        ("bk-sdm-tiny", "layers"),
        ("bk-sdm-v2-tiny", "layers"),
        ("ssd-1b", "layers"),
        ("segmind-vega", "layers"),
        ("koala-700m", "layers"),
        ("sd-turbo", "steps"),
        ("sdxl-turbo", "steps"),
        ("lcm", "steps"),
    ];
    for (name, fewer) in cases {
        let reference = Reference::open(&format!("unets/{name}"));
        let found = Inspection::of(&reference.model, &format!("somebody/{name}"));
        assert!(found.ok, "{name}: {:?}", found.problems);
        let [note] = found.notes.as_slice() else { panic!("{name}: {:?}", found.notes) };
        assert!(note.contains(&format!("fewer {fewer}")) && note.contains("never measured for labelling"), "{note}");
    }
    for plain in ["sd15", "sd2-v", "sdxl", "sd35", "digits-dit", "unets/only-cross"] {
        assert_eq!(Inspection::of(&Reference::open(plain).model, plain).notes, Vec::<String>::new(), "{plain}");
    }
}
