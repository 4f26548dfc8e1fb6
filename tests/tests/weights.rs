//! How weights get into a model: damaged files, half precision and adapters.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_common::job::ModelDtype;
use elbo_tests::{copy_tree, model};
use elbo_worker::models::{LoadOptions, Lora, ModelError, StableDiffusion, UnetInput};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The digits model, to be damaged.
fn copied() -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy_tree(&model(), to.path());
    to
}

fn load_error(model: &Path) -> ModelError {
    StableDiffusion::load(model).map(|_| ()).unwrap_err()
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn a_truncated_file_is_named() {
    let model = copied();
    let path = model.path().join(UNET);
    let bytes = std::fs::read(&path).unwrap();
    for len in [0, 5, 1000, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = load_error(model.path()).to_string();
        assert!(error.contains(UNET) && error.contains("truncated or damaged; download it again"), "{error}");
    }
}

#[test]
fn what_only_looks_like_weights_is_told_apart() {
    let model = copied();
    let path = model.path().join(UNET);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    for (content, remedy) in [(pointer, "git lfs pull"), ("\n<!DOCTYPE html><html></html>", "a web page")] {
        std::fs::write(&path, content).unwrap();
        let error = load_error(model.path()).to_string();
        assert!(error.contains(UNET) && error.contains(remedy), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::write(path.with_extension("bin"), "PK").unwrap();
    let error = load_error(model.path()).to_string();
    assert!(error.contains("diffusion_pytorch_model.bin") && error.contains("safe_serialization=True"), "{error}");
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_named() {
    let model = copied();
    let whole = model.path().join(UNET);
    let dir = whole.parent().unwrap();
    let tensors = safetensors::load(&whole, &Device::Cpu).unwrap();
    std::fs::rename(&whole, dir.join("part-1.safetensors")).unwrap();
    let write = |extra: (&str, &str)| {
        let mut map: HashMap<&str, &str> = tensors.keys().map(|key| (key.as_str(), "part-1.safetensors")).collect();
        map.insert(extra.0, extra.1);
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(dir.join("diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
    };
    write(("conv_in.weight", "part-2.safetensors"));
    match load_error(model.path()) {
        ModelError::MissingShard { index, shard, key } => {
            assert!(index.ends_with("diffusion_pytorch_model.safetensors.index.json"));
            assert_eq!((shard.as_str(), key.as_str()), ("part-2.safetensors", "conv_in.weight"));
        }
        other => panic!("{other}"),
    }
    write(("no.such.weight", "part-1.safetensors"));
    match load_error(model.path()) {
        ModelError::MissingKey { path, key } => {
            assert!(path.ends_with("part-1.safetensors"));
            assert_eq!(key, "no.such.weight");
        }
        other => panic!("{other}"),
    }
    write(("conv_in.weight", "part-1.safetensors"));
    assert!(StableDiffusion::load(model.path()).is_ok());
}

/// Inputs and outputs of the digits model, computed by PyTorch.
struct Digits {
    tensors: HashMap<String, Tensor>,
    prompts: Vec<String>,
    timesteps: Vec<u32>,
}

impl Digits {
    fn open() -> Self {
        let dir = fixtures().join("digits-sd");
        let tensors = safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
        let prompts = json["prompts"].as_array().unwrap().iter().take(10).map(|p| p.as_str().unwrap().to_owned());
        let timesteps = tensors["timesteps"].to_dtype(DType::I64).unwrap().to_vec1::<i64>().unwrap();
        Self { prompts: prompts.collect(), timesteps: timesteps.into_iter().map(|t| t as u32).collect(), tensors }
    }

    /// A tensor `[N, C, H, W]` as `[N, H, W, C]`.
    fn channels_last(&self, name: &str) -> Tensor {
        channels_last(&self.tensors[name])
    }

    /// x_t of an image at all timesteps.
    fn noisy(&self, image: usize) -> Tensor {
        let abar = self.tensors["alphas_cumprod"].to_vec1::<f32>().unwrap();
        let part =
            |name: &str, at: usize| self.channels_last(name).narrow(0, at, 1).unwrap().to_dtype(DType::F64).unwrap();
        let at = |(k, &t): (usize, &u32)| {
            let abar = f64::from(abar[t as usize]);
            let latent = (part("latents_mean", image) * abar.sqrt()).unwrap();
            (latent + (part("noise", k) * (1.0 - abar).sqrt()).unwrap()).unwrap().to_dtype(DType::F32).unwrap()
        };
        let all: Vec<Tensor> = self.timesteps.iter().enumerate().map(at).collect();
        Tensor::cat(&all, 0).unwrap()
    }

    /// What a model predicts of an image at timestep index `k`, or at all of them: `[K * 10, H, W, C]`.
    fn predict(&self, model: &StableDiffusion, image: usize, k: Option<usize>) -> Tensor {
        let timesteps = k.map_or(self.timesteps.clone(), |k| vec![self.timesteps[k]]);
        let latents = self.noisy(image);
        let latents = k.map_or(latents.clone(), |k| latents.narrow(0, k, 1).unwrap());
        let times = model.unet().time_cache(&timesteps).unwrap();
        let prompts = model.unet().prompt_cache(&model.encode_prompts(&self.prompts).unwrap()).unwrap();
        let points = 0..timesteps.len() as u32;
        let evaluations: Vec<_> = points.flat_map(|p| (0..self.prompts.len() as u32).map(move |c| (p, c))).collect();
        let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
        model.unet().forward(&input, &times, &prompts).unwrap()
    }
}

fn channels_last(tensor: &Tensor) -> Tensor {
    tensor.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest magnitude.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (flat(found), flat(expected));
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    found.iter().zip(&expected).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// Mean and largest relative difference of two tables.
fn relative(found: &[f64], expected: &[f64]) -> (f64, f64) {
    assert_eq!(found.len(), expected.len());
    let all: Vec<f64> = found.iter().zip(expected).map(|(a, b)| (a / b - 1.0).abs()).collect();
    (all.iter().sum::<f64>() / all.len() as f64, all.iter().fold(0.0, |m, v| m.max(*v)))
}

#[test]
fn half_precision_loses_no_more_than_twice_what_pytorch_loses() {
    let digits = Digits::open();
    let theirs = safetensors::load(fixtures().join("digits-sd/precision.safetensors"), &Device::Cpu).unwrap();
    let exact = flat(&digits.tensors["mse"]);
    let noise = digits.channels_last("noise");
    let (slots, classes) = (digits.timesteps.len(), digits.prompts.len());
    for (dtype, name) in [(ModelDtype::F16, "mse.float16"), (ModelDtype::Bf16, "mse.bfloat16")] {
        let model = StableDiffusion::load_with(&model(), &LoadOptions::new(Device::Cpu, dtype)).unwrap();
        let mut table = vec![0.0; exact.len()];
        for image in 0..exact.len() / (slots * classes) {
            let predicted = digits.predict(&model, image, None);
            for (k, class) in (0..slots).flat_map(|k| (0..classes).map(move |class| (k, class))) {
                let (a, b) = (predicted.get(k * classes + class).unwrap(), noise.get(k).unwrap());
                let (a, b) = (flat(&a), flat(&b));
                let error = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / a.len() as f64;
                table[(image * classes + class) * slots + k] = error;
            }
        }
        let (ours, theirs) = (relative(&table, &exact), relative(&flat(&theirs[name]), &exact));
        println!("{name}: mean {:.2e}, largest {:.2e}; PyTorch's {:.2e}, {:.2e}", ours.0, ours.1, theirs.0, theirs.1);
        assert!(ours.0 > 0.0 && ours.0 < 2.0 * theirs.0 && ours.1 < 2.0 * theirs.1);
    }
}

fn with_loras(loras: &[(&str, f64)]) -> Result<StableDiffusion, ModelError> {
    let mut options = LoadOptions::default();
    for (name, scale) in loras {
        let path = fixtures().join("lora").join(name);
        options.loras.push(Arc::new(Lora::open(&path, *scale, &model())?));
    }
    StableDiffusion::load_with(&model(), &options)
}

#[test]
fn adapters_of_all_formats_match_diffusers_and_peft() {
    let (digits, lora) = (Digits::open(), fixtures().join("lora"));
    let expected = safetensors::load(lora.join("reference.safetensors"), &Device::Cpu).unwrap();
    let (diffusers, peft) = ("diffusers.safetensors", "peft/adapter_model.safetensors");
    let cases: [(&str, &[(&str, f64)]); 5] = [
        ("diffusers", &[(diffusers, 1.0)]),
        ("diffusers_half", &[(diffusers, 0.5)]),
        ("peft", &[(peft, 1.0)]),
        ("both", &[(diffusers, 0.5), (peft, 1.0)]),
        ("processors", &[("processors.safetensors", 1.0)]),
    ];
    let plain = digits.predict(&with_loras(&[]).unwrap(), 0, Some(9));
    for (name, loras) in cases {
        let model = with_loras(loras).unwrap();
        let found = digits.predict(&model, 0, Some(9));
        let expected_output = channels_last(&expected[name]);
        let (error, effect) = (difference(&found, &expected_output), difference(&plain, &expected_output));
        println!("{name}: {error:.2e}, where the adapter changes {effect:.2}");
        assert!(error < 2e-5 && effect > 0.01, "{name}: {error}");
        if name == "diffusers" {
            let text = model.encode_prompts(&digits.prompts).unwrap();
            assert!(difference(&text, &expected["text"]) < 2e-5);
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
        StableDiffusion::load_with(&model(), &options)
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
    assert!(error.contains("kohya"), "{error}");
    assert!(lora_error(&[("unet.x.dora_scale", &[4])]).contains("unet.x.dora_scale"));
}
