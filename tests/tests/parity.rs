//! The models against reference numbers of PyTorch, diffusers and transformers, computed in double precision.
//!
//! `fixtures/digits-sd/reference.json` gives the formula of every tensor and what f32 itself loses; the tolerances here
//! are a few times that.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_worker::models::{
    ClipTextModel, ClipTokenizer, LoadOptions, ModelError, Probe, StableDiffusion, UnetInput, VaeEncoder,
};

/// Classes in the table of errors.
const CLASSES: usize = 10;

struct Reference {
    tensors: HashMap<String, Tensor>,
    json: serde_json::Value,
    model: PathBuf,
}

impl Reference {
    fn open() -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = manifest.join("fixtures/digits-sd");
        Self {
            tensors: safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap(),
            json: serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap(),
            model: manifest.join("../cli/demo/model"),
        }
    }

    fn model(&self) -> StableDiffusion {
        StableDiffusion::load(&self.model).unwrap()
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }

    /// A tensor stored `[.., C, H, W]`, as `[.., H, W, C]`.
    fn channels_last(&self, name: &str) -> Tensor {
        channels_last(self.get(name))
    }

    fn strings(&self, name: &str) -> Vec<String> {
        self.json[name].as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
    }

    fn integers(&self, name: &str) -> Vec<u32> {
        let wide = self.get(name).to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1::<i64>().unwrap();
        wide.into_iter().map(|v| v as u32).collect()
    }

    /// Pixels `[B, H, W, 3]` in [-1, 1].
    fn pixels(&self) -> Tensor {
        let pixels = self.get("images_u8").to_dtype(DType::F64).unwrap();
        let pixels = pixels.affine(2.0 / 255.0, -1.0).unwrap();
        let upscale = self.json["image_upscale"].as_u64().unwrap() as usize;
        let (b, h, w, c) = pixels.dims4().unwrap();
        let repeated = pixels.reshape((b, h, 1, w, 1, c)).unwrap();
        let repeated = repeated.broadcast_as((b, h, upscale, w, upscale, c)).unwrap().contiguous().unwrap();
        repeated.reshape((b, h * upscale, w * upscale, c)).unwrap().to_dtype(DType::F32).unwrap()
    }

    /// x_t of image `i` at timestep `k`, `[1, H, W, C]`.
    fn noisy(&self, i: usize, k: usize) -> Tensor {
        let t = self.integers("timesteps")[k] as usize;
        let abar = f64::from(self.get("alphas_cumprod").get(t).unwrap().to_scalar::<f32>().unwrap());
        let part = |name: &str, at: usize, factor: f64| {
            (self.channels_last(name).narrow(0, at, 1).unwrap().to_dtype(DType::F64).unwrap() * factor).unwrap()
        };
        let noisy = (part("latents_mean", i, abar.sqrt()) + part("noise", k, (1.0 - abar).sqrt())).unwrap();
        noisy.to_dtype(DType::F32).unwrap()
    }
}

fn channels_last(tensor: &Tensor) -> Tensor {
    let rank = tensor.rank();
    let mut order: Vec<usize> = (0..rank).collect();
    order[rank - 3..].rotate_left(1);
    tensor.permute(order).unwrap().contiguous().unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts that the largest difference is at most `tolerance` times the largest magnitude.
fn assert_close(name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let (found, expected) = (flat(found), flat(expected));
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let difference = found.iter().zip(&expected).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    println!("{name}: {:.2e}", difference / scale);
    assert!(difference <= tolerance * scale, "{name}: {difference} against a scale of {scale}");
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A copy of a model directory that a test may damage.
fn copied(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy(from, to.path());
    to
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::write(target, std::fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

#[test]
fn prompts_become_the_reference_token_ids() {
    let reference = Reference::open();
    let bare = copied(&reference.model.join("tokenizer"));
    std::fs::remove_file(bare.path().join("tokenizer.json")).unwrap();
    for dir in [&reference.model.join("tokenizer"), bare.path()] {
        let tokenizer = ClipTokenizer::open(dir, 77).unwrap();
        for (texts, ids) in [("prompts", "input_ids"), ("weird_prompts", "weird_input_ids")] {
            let expected = reference.integers(&format!("text_encoder.{ids}"));
            for (text, expected) in reference.strings(texts).iter().zip(expected.chunks(77)) {
                assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
            }
        }
    }
}

#[test]
fn text_embeddings_match_transformers() {
    let reference = Reference::open();
    let tokenizer = ClipTokenizer::open(&reference.model.join("tokenizer"), 77).unwrap();
    let encoder = ClipTextModel::load(&reference.model.join("text_encoder"), &LoadOptions::default()).unwrap();
    let ids: Vec<_> = reference.strings("prompts").iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    let mut states = Vec::new();
    let mut watch = |_: &str, state: &Tensor| states.push(state.get(0).unwrap());
    let embeds = encoder.forward(&ids, &mut Probe::new(&mut watch)).unwrap();
    let states = Tensor::stack(&states, 0).unwrap();
    assert_close("hidden states", &states, reference.get("text_encoder.hidden_states_prompt0"), 2e-6);
    assert_close("last hidden state", &embeds, reference.get("text_encoder.last_hidden_state"), 2e-6);
    assert_close("prompt embeds", &embeds, reference.get("prompt_embeds"), 2e-6);
}

#[test]
fn latents_match_diffusers_stage_by_stage() {
    let reference = Reference::open();
    let vae = VaeEncoder::load(&reference.model.join("vae"), &LoadOptions::default()).unwrap();
    let mut seen = 0;
    let mut watch = |name: &str, tensor: &Tensor| {
        let name = format!("vae.{name}");
        if reference.tensors.contains_key(&name) {
            let first = tensor.narrow(0, 0, 1).unwrap();
            assert_close(&name, &first, &reference.channels_last(&name), 5e-6);
            seen += 1;
        }
    };
    let pixels = reference.pixels();
    let latents = vae.encode(&pixels, &mut Probe::new(&mut watch)).unwrap();
    assert_eq!(seen, reference.tensors.keys().filter(|k| k.starts_with("vae.")).count());
    assert_close("latents", &latents, &reference.channels_last("latents_mean"), 5e-6);
    let alone = vae.encode(&pixels.narrow(0, 5, 1).unwrap(), &mut Probe::none()).unwrap();
    assert_eq!(bits(&alone), bits(&latents.narrow(0, 5, 1).unwrap()));
}

#[test]
fn unet_matches_diffusers_stage_by_stage() {
    let reference = Reference::open();
    let model = reference.model();
    let unet = model.unet();
    let timesteps = [reference.integers("timesteps")[9]];
    let times = unet.time_cache(&timesteps).unwrap();
    let prompts = unet.prompt_cache(reference.get("prompt_embeds")).unwrap();
    let embedding = unet.time_embedding(&timesteps).unwrap();
    assert_close("time embedding", &embedding, reference.get("unet.time_embedding"), 2e-6);

    let latents = reference.noisy(0, 9);
    assert_close("x_t", &latents, &reference.channels_last("x_t_0_9"), 1e-6);
    let mut seen = 1;
    let mut watch = |name: &str, tensor: &Tensor| {
        let name = format!("unet.{name}");
        if reference.tensors.contains_key(&name) {
            assert_close(&name, tensor, &reference.channels_last(&name), 5e-6);
            seen += 1;
        }
    };
    let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 7)] };
    unet.forward_probed(&input, &times, &prompts, &mut Probe::new(&mut watch)).unwrap();
    assert_eq!(seen, reference.tensors.keys().filter(|k| k.starts_with("unet.")).count());

    let input = UnetInput { evaluations: &[(0, 10)], ..input };
    let empty = unet.forward(&input, &times, &prompts).unwrap();
    assert_close("empty prompt", &empty, &reference.channels_last("model_output_uncond_0_9"), 5e-6);
}

#[test]
fn latents_need_not_be_square() {
    let reference = Reference::open();
    let model = reference.model();
    let timesteps = reference.integers("nonsquare_timesteps");
    let times = model.unet().time_cache(&timesteps).unwrap();
    let prompts = model.unet().prompt_cache(reference.get("prompt_embeds")).unwrap();
    let latents = reference.channels_last("nonsquare_in");
    let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 3), (1, 3)] };
    let output = model.unet().forward(&input, &times, &prompts).unwrap();
    assert_close("output", &output, &reference.channels_last("nonsquare_out"), 5e-6);
}

/// Losses of a prediction against the noise: l2, l1 and huber (delta 1), each a mean over all elements.
fn losses(predicted: &Tensor, noise: &Tensor) -> [f64; 3] {
    let (predicted, noise) = (flat(predicted), flat(noise));
    let mean = |loss: fn(f64) -> f64| {
        predicted.iter().zip(&noise).map(|(p, n)| loss((p - n).abs())).sum::<f64>() / noise.len() as f64
    };
    [mean(|d| d * d), mean(|d| d), mean(|d| if d < 1.0 { 0.5 * d * d } else { d - 0.5 })]
}

#[test]
fn every_error_of_the_reference_table_is_reproduced() {
    let reference = Reference::open();
    let model = reference.model();
    let unet = model.unet();
    let timesteps = reference.integers("timesteps");
    let times = unet.time_cache(&timesteps).unwrap();
    let prompts = unet.prompt_cache(&model.encode_prompts(&reference.strings("prompts")).unwrap()).unwrap();
    let noise = reference.channels_last("noise");
    let expected = ["mse", "l1", "huber"].map(|name| flat(reference.get(name)));
    let outputs = reference.channels_last("model_output");
    let images = reference.get("images_u8").dim(0).unwrap();
    let mut worst = [0.0f64; 3];
    for image in 0..images {
        let latents: Vec<Tensor> = (0..timesteps.len()).map(|k| reference.noisy(image, k)).collect();
        let latents = Tensor::cat(&latents, 0).unwrap();
        let points = 0..timesteps.len() as u32;
        let evaluations: Vec<_> = points.flat_map(|k| (0..CLASSES as u32).map(move |c| (k, c))).collect();
        let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
        let predicted = unet.forward(&input, &times, &prompts).unwrap();
        for (i, &(k, class)) in evaluations.iter().enumerate() {
            let (k, class) = (k as usize, class as usize);
            let predicted = predicted.get(i).unwrap();
            let found = losses(&predicted, &noise.get(k).unwrap());
            let at = (image * CLASSES + class) * timesteps.len() + k;
            for ((worst, found), expected) in worst.iter_mut().zip(found).zip(&expected) {
                *worst = worst.max((found / expected[at] - 1.0).abs());
            }
            let find = |all: &[usize], one: usize| all.iter().position(|&x| x == one);
            if let (Some(i), Some(c), Some(k)) = (find(&[0, 5], image), find(&[0, 7], class), find(&[0, 9, 19], k)) {
                let expected = outputs.get(i).unwrap().get(c).unwrap().get(k).unwrap();
                assert_close("model output", &predicted, &expected, 1e-5);
            }
        }
    }
    println!("largest relative errors of l2, l1, huber: {worst:?}");
    assert!(worst.iter().all(|w| *w < 2e-5), "largest relative errors of l2, l1, huber: {worst:?}");
}

#[test]
fn an_evaluation_has_the_same_bits_in_any_batch() {
    let reference = Reference::open();
    let model = reference.model();
    let unet = model.unet();
    let timesteps = reference.integers("timesteps");
    let times = unet.time_cache(&timesteps).unwrap();
    let prompts = unet.prompt_cache(reference.get("prompt_embeds")).unwrap();
    let latents = Tensor::cat(&[reference.noisy(0, 0), reference.noisy(3, 9), reference.noisy(5, 19)], 0).unwrap();
    let timesteps = [timesteps[0], timesteps[9], timesteps[19]];
    let evaluations = [(0, 4), (0, 0), (0, 7), (1, 7), (2, 3), (2, 10), (2, 1)];
    let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
    let batch = unet.forward(&input, &times, &prompts).unwrap();
    for (i, &(point, prompt)) in evaluations.iter().enumerate() {
        let p = point as usize;
        let alone = UnetInput {
            latents: &latents.narrow(0, p, 1).unwrap(),
            timesteps: &timesteps[p..=p],
            evaluations: &[(0, prompt)],
        };
        let alone = unet.forward(&alone, &times, &prompts).unwrap();
        assert_eq!(bits(&alone), bits(&batch.narrow(0, i, 1).unwrap()), "evaluation {i}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let model = copied(&Reference::open().model);
    let weights = model.path().join("unet/diffusion_pytorch_model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    match StableDiffusion::load(model.path()) {
        Err(ModelError::MissingFile(path)) => assert_eq!(path, weights),
        other => panic!("{:?}", other.map(|_| ())),
    }
}

/// Rewrites a weights file with one of its tensors changed.
fn rewrite(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    safetensors::save(&tensors, path).unwrap();
}

#[test]
fn a_missing_weight_is_named() {
    let model = copied(&Reference::open().model);
    let weights = model.path().join("vae/diffusion_pytorch_model.safetensors");
    rewrite(&weights, |tensors| drop(tensors.remove("encoder.conv_out.bias")));
    match StableDiffusion::load(model.path()) {
        Err(ModelError::MissingKey { path, key }) => {
            assert_eq!((path, key.as_str()), (weights, "encoder.conv_out.bias"));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn a_weight_of_another_shape_is_named() {
    let model = copied(&Reference::open().model);
    let weights = model.path().join("unet/diffusion_pytorch_model.safetensors");
    let key = "mid_block.resnets.0.conv1.weight";
    rewrite(&weights, |tensors| {
        tensors.insert(key.to_owned(), Tensor::zeros((48, 47, 3, 3), DType::F32, &Device::Cpu).unwrap());
    });
    match StableDiffusion::load(model.path()) {
        Err(ModelError::WrongShape { path, key: found, expected, found: shape }) => {
            assert_eq!((path, found.as_str()), (weights, key));
            assert_eq!((expected, shape), (vec![48, 48, 3, 3], vec![48, 47, 3, 3]));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn an_unsupported_setting_is_named() {
    let model = copied(&Reference::open().model);
    let config = model.path().join("unet/config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["class_embed_type"] = "timestep".into();
    std::fs::write(&config, json.to_string()).unwrap();
    let error = StableDiffusion::load(model.path()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("class_embed_type"), "{error}");
}

#[test]
fn half_precision_shards_give_the_same_model() {
    let reference = Reference::open();
    let model = copied(&reference.model);
    let dir = model.path().join("unet");
    let whole = dir.join("diffusion_pytorch_model.safetensors");
    let tensors = safetensors::load(&whole, &Device::Cpu).unwrap();
    std::fs::remove_file(&whole).unwrap();
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut map = serde_json::Map::new();
    for (i, (key, tensor)) in tensors.iter().enumerate() {
        shards[i % 2].insert(key.clone(), tensor.to_dtype(DType::F16).unwrap());
        map.insert(key.clone(), format!("part-{}.fp16.safetensors", i % 2).into());
    }
    for (i, shard) in shards.iter().enumerate() {
        safetensors::save(shard, dir.join(format!("part-{i}.fp16.safetensors"))).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(dir.join("diffusion_pytorch_model.safetensors.index.fp16.json"), index).unwrap();

    let rounded = StableDiffusion::load(model.path()).unwrap();
    let timesteps = [reference.integers("timesteps")[9]];
    let latents = reference.noisy(0, 9);
    let input = UnetInput { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 7)] };
    let times = rounded.unet().time_cache(&timesteps).unwrap();
    let prompts = rounded.unet().prompt_cache(reference.get("prompt_embeds")).unwrap();
    let output = rounded.unet().forward(&input, &times, &prompts).unwrap();
    assert_close("rounded weights", &output, &reference.channels_last("unet.conv_out"), 5e-3);
}
