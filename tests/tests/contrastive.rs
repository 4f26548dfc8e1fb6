//! Contrastive models compared with transformers and open_clip in double precision (`fixtures/contrastive/make.py`).

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_hub::model_files::is_contrastive;
use elbo_models::{ContrastiveModel, LoadOptions, ModelError, Precision};
use elbo_tests::copy_tree;
use elbo_tests::numbers::assert_close;
use serde_json::{Value, json};

const KINDS: [&str; 3] = ["clip", "siglip", "open_clip"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/contrastive")
}

/// Double precision, so that no difference can be blamed on rounding.
fn double() -> LoadOptions {
    LoadOptions { precision: Precision { weights: DType::F64, compute: DType::F64 }, ..LoadOptions::default() }
}

fn load(dir: &Path) -> Result<ContrastiveModel, ModelError> {
    ContrastiveModel::load(dir, &LoadOptions::default())
}

fn reference(kind: &str) -> (HashMap<String, Tensor>, Vec<String>) {
    let dir = fixtures().join(kind);
    let json: Value = serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let texts = json["texts"].as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect();
    (safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap(), texts)
}

/// The three images, preprocessed for the model, `[3, S, S, 3]`.
fn pixels(model: &ContrastiveModel) -> Tensor {
    let preprocessing = model.preprocessing();
    let side = preprocessing.size as usize;
    let image = |i: usize| preprocessing.apply(&std::fs::read(fixtures().join(format!("{i}.png"))).unwrap()).unwrap();
    let values: Vec<f32> = (0..3).flat_map(image).collect();
    Tensor::from_vec(values, (3, side, side, 3), &Device::Cpu).unwrap()
}

/// A copy of a model that a test may damage.
fn copied(kind: &str) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    copy_tree(&fixtures().join(kind), to.path());
    to
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn texts_become_the_reference_token_ids() {
    for kind in KINDS {
        let (tensors, texts) = reference(kind);
        let model = load(&fixtures().join(kind)).unwrap();
        let ids = tensors["ids"].to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
        for (text, expected) in texts.iter().zip(ids) {
            let found: Vec<i64> = model.tokenize(text).unwrap().into_iter().map(i64::from).collect();
            assert_eq!(found, expected, "{kind}: {text:?}");
        }
    }
}

#[test]
fn embeddings_and_logits_match_the_reference() {
    for kind in KINDS {
        let (tensors, texts) = reference(kind);
        let model = load(&fixtures().join(kind)).unwrap();
        let images = model.encode_images(&pixels(&model)).unwrap();
        let texts = model.encode_texts(&texts).unwrap();
        assert_eq!(images.dim(1).unwrap(), model.width());
        assert_close(&format!("{kind} images"), &images, &tensors["images"], 1e-5);
        assert_close(&format!("{kind} texts"), &texts, &tensors["texts"], 1e-5);
        let products = images.matmul(&texts.t().unwrap()).unwrap();
        let logits = products.affine(model.logit_scale().into(), model.logit_bias().into()).unwrap();
        assert_close(&format!("{kind} logits"), &logits, &tensors["logits"], 1e-5);
        assert_eq!(model.logit_bias() != 0.0, kind == "siglip");
    }
}

#[test]
fn plain_operations_give_the_same_embeddings() {
    for kind in KINDS {
        let (tensors, texts) = reference(kind);
        let model = ContrastiveModel::load(&fixtures().join(kind), &double()).unwrap();
        let images = model.encode_images(&pixels(&model)).unwrap();
        assert_close(&format!("{kind} images"), &images, &tensors["images"], 1e-6);
        assert_close(&format!("{kind} texts"), &model.encode_texts(&texts).unwrap(), &tensors["texts"], 1e-6);
    }
}

#[test]
fn an_embedding_has_the_same_bits_in_every_batch() {
    for kind in KINDS {
        let model = load(&fixtures().join(kind)).unwrap();
        let bits = |t: Tensor| t.to_vec2::<f32>().unwrap().concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let pixels = pixels(&model);
        let all = bits(model.encode_images(&pixels).unwrap());
        let alone = bits(model.encode_images(&pixels.narrow(0, 1, 1).unwrap()).unwrap());
        assert_eq!(alone, all[model.width()..2 * model.width()], "{kind}");
        // More texts than fit into one encoder batch.
        let texts: Vec<String> = (0..40).map(|i| format!("number {i}")).collect();
        let all = bits(model.encode_texts(&texts).unwrap());
        let alone = bits(model.encode_texts(&texts[33..34]).unwrap());
        assert_eq!(alone, all[33 * model.width()..34 * model.width()], "{kind}");
        assert_eq!(model.encode_texts(&[]).unwrap().dims(), [0, model.width()]);
    }
}

#[test]
fn the_end_of_a_text_is_found_as_transformers_finds_it() {
    let (tensors, texts) = reference("clip");
    let model = copied("clip");
    // The largest id: in CLIP's vocabulary, that of the end of text.
    edit(&model.path().join("config.json"), |json| json["text_config"]["eos_token_id"] = 2.into());
    let found = load(model.path()).unwrap().encode_texts(&texts).unwrap();
    assert_close("largest id", &found, &tensors["texts"], 1e-5);
    // If the id never occurs: the first position.
    edit(&model.path().join("config.json"), |json| json["text_config"]["eos_token_id"] = 7000.into());
    let found = load(model.path()).unwrap().encode_texts(&texts).unwrap().to_vec2::<f32>().unwrap();
    assert!(found.iter().all(|row| *row == found[0]));
}

#[test]
fn padding_and_truncation_of_a_tokenizer_file_are_ignored() {
    let (tensors, texts) = reference("siglip");
    let padding = json!({"strategy": {"Fixed": 77}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "!"});
    let truncation = json!({"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0});
    for (key, value) in [("padding", padding), ("truncation", truncation)] {
        let model = copied("siglip");
        edit(&model.path().join("tokenizer.json"), |file| file[key] = value);
        let found = load(model.path()).unwrap().encode_texts(&texts).unwrap();
        assert_close(key, &found, &tensors["texts"], 1e-5);
    }
}

#[test]
fn a_processor_file_of_transformers_5_is_read() {
    let (tensors, _) = reference("clip");
    let model = copied("clip");
    let old = model.path().join("preprocessor_config.json");
    let settings: Value = serde_json::from_slice(&std::fs::read(&old).unwrap()).unwrap();
    std::fs::remove_file(&old).unwrap();
    // The format of CLIPProcessor.save_pretrained in transformers 5.
    let whole = model.path().join("processor_config.json");
    let file = json!({ "image_processor": settings, "processor_class": "CLIPProcessor" });
    std::fs::write(&whole, file.to_string()).unwrap();
    let loaded = load(model.path()).unwrap();
    assert_close("images", &loaded.encode_images(&pixels(&loaded)).unwrap(), &tensors["images"], 1e-5);
    edit(&whole, |file| file["image_processor"]["resample"] = 1.into());
    let error = load(model.path()).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("processor_config.json") && error.contains("resample"), "{error}");
    std::fs::write(&whole, r#"{"processor_class": "CLIPProcessor"}"#).unwrap();
    assert!(load(model.path()).map(|_| ()).unwrap_err().to_string().contains("preprocessor_config.json"));
}

#[test]
fn towers_inside_models_and_weight_variants_are_found() {
    for kind in ["clip", "siglip"] {
        let (tensors, texts) = reference(kind);
        let model = copied(kind);
        let old = model.path().join("model.safetensors");
        let weights = safetensors::load(&old, &Device::Cpu).unwrap();
        let nested = |key: String| match key.split_once('.') {
            Some((tower @ ("text_model" | "vision_model"), rest)) => format!("{tower}.{tower}.{rest}"),
            _ => key,
        };
        let weights: HashMap<String, Tensor> = weights.into_iter().map(|(key, value)| (nested(key), value)).collect();
        safetensors::save(&weights, model.path().join("model.fp32.safetensors")).unwrap();
        std::fs::remove_file(&old).unwrap();
        let loaded = load(model.path()).unwrap();
        assert_close(kind, &loaded.encode_texts(&texts).unwrap(), &tensors["texts"], 1e-5);
        assert_close(kind, &loaded.encode_images(&pixels(&loaded)).unwrap(), &tensors["images"], 1e-5);
    }
}

#[test]
fn openclip_weights_are_found_beside_a_transformers_configuration() {
    let model = copied("open_clip");
    std::fs::write(model.path().join("config.json"), r#"{"model_type": "clip"}"#).unwrap();
    let old = model.path().join("open_clip_model.safetensors");
    std::fs::rename(&old, model.path().join("open_clip_pytorch_model.safetensors")).unwrap();
    assert!(load(model.path()).is_ok());
    std::fs::remove_file(model.path().join("open_clip_pytorch_model.safetensors")).unwrap();
    match load(model.path()) {
        Err(ModelError::MissingFile(path)) => assert_eq!(path, old),
        other => panic!("{:?}", other.map(|_| ())),
    }
}

#[test]
fn contrastive_models_are_recognised() {
    assert!(KINDS.iter().all(|kind| is_contrastive(&fixtures().join(kind))));
    let diffusion = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/demo/model");
    assert!(!is_contrastive(&diffusion));
    // A component of a diffusion model looks like a contrastive model at first; the error names it.
    let error = load(&diffusion.join("text_encoder")).unwrap_err().to_string();
    assert!(error.contains("model_type") && error.contains("clip_text_model"), "{error}");
    assert!(!is_contrastive(Path::new("nowhere")));
}

#[test]
fn unsupported_settings_are_named() {
    let cases: [(&str, &str, &[&str], Value); 15] = [
        ("clip", "config.json", &["model_type"], json!("blip")),
        ("clip", "config.json", &["text_config", "hidden_act"], json!("relu")),
        ("clip", "config.json", &["text_config", "num_attention_heads"], json!(7)),
        ("clip", "config.json", &["vision_config", "patch_size"], json!(0)),
        ("clip", "preprocessor_config.json", &["resample"], json!(1)),
        ("clip", "preprocessor_config.json", &["size"], json!({"shortest_edge": 48})),
        ("clip", "preprocessor_config.json", &["image_std"], json!([1, 0, 1])),
        ("siglip", "config.json", &["vision_config", "vision_use_head"], json!(false)),
        ("siglip", "preprocessor_config.json", &["do_rescale"], json!(false)),
        ("siglip", "tokenizer_config.json", &["tokenizer_class"], json!("GemmaTokenizer")),
        ("open_clip", "open_clip_config.json", &["model_cfg", "custom_text"], json!(true)),
        ("open_clip", "open_clip_config.json", &["model_cfg", "vision_cfg", "layers"], json!([3, 4, 6, 3])),
        ("open_clip", "open_clip_config.json", &["model_cfg", "vision_cfg", "timm_model_name"], json!("vit")),
        ("open_clip", "open_clip_config.json", &["model_cfg", "text_cfg", "pool_type"], json!("last")),
        ("open_clip", "open_clip_config.json", &["preprocess_cfg", "resize_mode"], json!("longest")),
    ];
    for (kind, file, keys, value) in cases {
        let model = copied(kind);
        edit(&model.path().join(file), |json| {
            let slot = keys.iter().fold(json, |json, key| &mut json[*key]);
            *slot = value;
        });
        let error = load(model.path()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(keys[keys.len() - 1]), "{error}");
    }
}

#[test]
fn a_sentencepiece_model_without_tokenizer_json_is_refused_with_a_remedy() {
    let model = copied("siglip");
    std::fs::rename(model.path().join("tokenizer.json"), model.path().join("spiece.model")).unwrap();
    let error = load(model.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("T5TokenizerFast"), "{error}");
}

#[test]
fn unusable_inputs_and_weights_are_errors() {
    let model = load(&fixtures().join("clip")).unwrap();
    let images = Tensor::zeros((1, 32, 31, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(model.encode_images(&images), Err(ModelError::Input(_))));
    let images = Tensor::full(f32::NAN, (1, 32, 32, 3), &Device::Cpu).unwrap();
    assert!(matches!(model.encode_images(&images), Err(ModelError::NotFinite)));

    let damaged = copied("clip");
    let path = damaged.path().join("model.safetensors");
    let mut weights = safetensors::load(&path, &Device::Cpu).unwrap();
    weights.remove("visual_projection.weight");
    safetensors::save(&weights, &path).unwrap();
    match load(damaged.path()) {
        Err(ModelError::MissingKey { key, .. }) => assert_eq!(key, "visual_projection.weight"),
        other => panic!("{:?}", other.map(|_| ())),
    }
}
