//! Model directories that are damaged, incomplete, sharded or in half precision.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_models::{DiffusionModel, ModelError, Pass};
use elbo_tests::copy_tree;
use elbo_tests::numbers::assert_close;

use crate::reference::{Reference, times};

/// A copy of a directory that a test may damage.
pub(crate) fn copied(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy_tree(from, to.path());
    to
}

#[test]
fn a_missing_file_is_named() {
    let model = copied(&Reference::open("digits-sd").model);
    let weights = model.path().join("unet/diffusion_pytorch_model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    match DiffusionModel::load(model.path()) {
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
    let model = copied(&Reference::open("digits-sd").model);
    let weights = model.path().join("vae/diffusion_pytorch_model.safetensors");
    rewrite(&weights, |tensors| drop(tensors.remove("encoder.conv_out.bias")));
    match DiffusionModel::load(model.path()) {
        Err(ModelError::MissingKey { path, key }) => {
            assert_eq!((path, key.as_str()), (weights, "encoder.conv_out.bias"));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn a_weight_of_another_shape_is_named() {
    let model = copied(&Reference::open("digits-sd").model);
    let weights = model.path().join("unet/diffusion_pytorch_model.safetensors");
    let key = "mid_block.resnets.0.conv1.weight";
    rewrite(&weights, |tensors| {
        tensors.insert(key.to_owned(), Tensor::zeros((48, 47, 3, 3), DType::F32, &Device::Cpu).unwrap());
    });
    match DiffusionModel::load(model.path()) {
        Err(ModelError::WrongShape { path, key: found, expected, found: shape }) => {
            assert_eq!((path, found.as_str()), (weights, key));
            assert_eq!((expected, shape), (vec![48, 48, 3, 3], vec![48, 47, 3, 3]));
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn an_unsupported_setting_is_named() {
    let model = copied(&Reference::open("digits-sd").model);
    let config = model.path().join("unet/config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["class_embed_type"] = "timestep".into();
    std::fs::write(&config, json.to_string()).unwrap();
    let error = DiffusionModel::load(model.path()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("class_embed_type"), "{error}");
}

#[test]
fn half_precision_shards_give_the_same_model() {
    let reference = Reference::open("digits-sd");
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

    let rounded = DiffusionModel::load(model.path()).unwrap();
    let (schedule, timesteps) = (reference.schedule(), [reference.timesteps()[9]]);
    let latents = reference.noisy(&schedule, 0, 9);
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 7)] };
    let cache = rounded.network().time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let output = rounded.network().forward(&pass, &cache, &reference.conditions(&rounded)).unwrap();
    assert_close("rounded weights", &output, &reference.channels_last("unet.conv_out"), 5e-3);
}

fn load_error(model: &Path) -> ModelError {
    DiffusionModel::load(model).map(|_| ()).unwrap_err()
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn a_truncated_file_is_named() {
    let model = copied(&Reference::open("digits-sd").model);
    let path = model.path().join(UNET);
    let bytes = std::fs::read(&path).unwrap();
    for len in [0, 5, 1000, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let error = load_error(model.path()).to_string();
        assert!(error.contains(UNET) && error.contains("truncated or damaged; download it again"), "{error}");
    }
}

#[test]
fn files_that_only_look_like_weights_are_refused_with_a_remedy() {
    let model = copied(&Reference::open("digits-sd").model);
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
    let model = copied(&Reference::open("digits-sd").model);
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
    // Such a file would be read from outside the model, and no fingerprint would cover it.
    std::fs::copy(dir.join("part-1.safetensors"), model.path().join("part-2.safetensors")).unwrap();
    let elsewhere = model.path().join("part-2.safetensors");
    for shard in ["../part-2.safetensors", elsewhere.to_str().unwrap(), ".."] {
        write(("conv_in.weight", shard));
        match load_error(model.path()) {
            ModelError::ShardName { shard: named, .. } => assert_eq!(named, shard),
            other => panic!("{other}"),
        }
    }
    write(("conv_in.weight", "part-1.safetensors"));
    assert!(DiffusionModel::load(model.path()).is_ok());
}

#[test]
fn old_names_and_shapes_of_the_autoencoder_attention_are_understood() {
    let reference = Reference::open("digits-sd");
    let model = copied(&reference.model);
    rewrite(&model.path().join("vae/diffusion_pytorch_model.safetensors"), |tensors| {
        for (new, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
            for part in ["weight", "bias"] {
                let prefix = "encoder.mid_block.attentions.0";
                let tensor = tensors.remove(&format!("{prefix}.{new}.{part}")).unwrap();
                let (rows, tensor) = (tensor.dim(0).unwrap(), tensor);
                let tensor = if part == "weight" { tensor.reshape((rows, rows, 1, 1)).unwrap() } else { tensor };
                tensors.insert(format!("{prefix}.{old}.{part}"), tensor);
            }
        }
    });
    // Some checkpoints contain position ids, which are not weights.
    rewrite(&model.path().join("text_encoder/model.safetensors"), |tensors| {
        let ids = Tensor::arange(0i64, 77, &Device::Cpu).unwrap().reshape((1, 77)).unwrap();
        tensors.insert("text_model.embeddings.position_ids".into(), ids);
    });
    let old = DiffusionModel::load(model.path()).unwrap();
    let found = old.encode_images(&reference.pixels()).unwrap();
    assert_close("latents", &found, &reference.channels_last("latents_mean"), 1e-5);
}
