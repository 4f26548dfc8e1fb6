//! Which files of a model in diffusers layout a job reads. These files are fetched and determine its fingerprint.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::Error as _;

use crate::weight_files;

/// The file that names a model's components.
pub const MODEL_INDEX: &str = "model_index.json";

/// Whether an untrusted name is that of a single file or directory, without parts that lead elsewhere.
pub fn is_plain_name(name: &str) -> bool {
    let leads_elsewhere = |c: char| matches!(c, '/' | '\\' | ':') || c.is_control();
    !name.is_empty() && !name.chars().all(|c| c == '.') && !name.contains(leads_elsewhere)
}

/// Whether an untrusted path, with `/`, stays inside its directory.
pub fn is_plain_path(path: &str) -> bool {
    path.split('/').all(is_plain_name)
}

/// The files that identify a contrastive model, which has no components: the configurations of transformers and OpenCLIP.
pub const CONTRASTIVE: [&str; 2] = ["config.json", "open_clip_config.json"];

/// The names of a contrastive model's weights in transformers and OpenCLIP.
const CONTRASTIVE_STEMS: [&str; 3] = ["model", "open_clip_model", "open_clip_pytorch_model"];

/// Whether a directory holds a contrastive model rather than a diffusion model.
pub fn is_contrastive(root: &Path) -> bool {
    !root.join(MODEL_INDEX).is_file() && CONTRASTIVE.iter().any(|name| root.join(name).is_file())
}

/// The `files` of a contrastive model that a job reads, sorted.
pub fn needed_contrastive(files: &[String]) -> Vec<String> {
    let names: Vec<&str> = files.iter().filter(|file| !file.contains('/')).map(String::as_str).collect();
    let weights: Vec<&str> = CONTRASTIVE_STEMS.iter().flat_map(|stem| weight_files::files(&names, stem)).collect();
    let mut chosen: Vec<String> =
        names.iter().filter(|name| weights.contains(name) || is_text(name)).map(|name| (*name).to_owned()).collect();
    chosen.sort();
    chosen
}

/// Whether a file is a configuration or a part of a tokenizer.
fn is_text(name: &str) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    ["json", "txt", "model"].iter().any(|e| extension == *e) && !name.contains("safetensors.index.")
}

/// The names of a component's weights in diffusers and transformers.
pub(crate) const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// Components that evaluations don't use.
const UNUSED: [&str; 3] = ["safety_checker", "feature_extractor", "image_encoder"];

/// The components that a `model_index.json` names, in entries like `"unet": ["diffusers", "UNet2DConditionModel"]`. Each is a
/// directory, so a name that leads elsewhere is an error.
pub fn components(model_index: &[u8]) -> Result<BTreeSet<String>, serde_json::Error> {
    let index: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(model_index)?;
    let present = |value: &serde_json::Value| value.get(1).is_some_and(|class| !class.is_null());
    let names: BTreeSet<_> = index.into_iter().filter(|(_, value)| present(value)).map(|(name, _)| name).collect();
    match names.iter().find(|name| !is_plain_name(name)) {
        None => Ok(names),
        Some(name) => Err(serde_json::Error::custom(format!(
            "it names a component {name:?}, which could lie outside the model's directory: fetch the model from a source you trust"
        ))),
    }
}

/// The `files` of a model (paths with `/`) that a job reads, sorted: configurations, tokenizers, and one variant of each
/// component's weights (see [`weight_files`]).
pub fn needed(files: &[String], components: &BTreeSet<String>) -> Vec<String> {
    let mut chosen: Vec<String> = files.iter().filter(|file| *file == MODEL_INDEX).cloned().collect();
    for component in components.iter().filter(|component| !UNUSED.contains(&component.as_str())) {
        let inside: Vec<&str> = files.iter().filter_map(|file| plain_name(file, component)).collect();
        let weights: Vec<&str> = STEMS.iter().flat_map(|stem| weight_files::files(&inside, stem)).collect();
        let names = inside.iter().filter(|name| weights.contains(name) || is_text(name));
        chosen.extend(names.map(|name| format!("{component}/{name}")));
    }
    chosen.sort();
    chosen
}

/// The name of a file that is directly inside a component.
fn plain_name<'a>(file: &'a str, component: &str) -> Option<&'a str> {
    let name = file.strip_prefix(component)?.strip_prefix('/')?;
    is_plain_name(name).then_some(name)
}

/// The files of a local model that a job reads, relative to it. The error includes the path that could not be read.
pub fn of_directory(root: &Path) -> Result<Vec<String>, (PathBuf, io::Error)> {
    if is_contrastive(root) {
        let failed = |source| (root.to_owned(), source);
        let entries = std::fs::read_dir(root).map_err(failed)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        return Ok(needed_contrastive(&names.collect::<io::Result<Vec<_>>>().map_err(failed)?));
    }
    let index = root.join(MODEL_INDEX);
    let bytes = elbo_store::files::read(&index).map_err(|source| (index.clone(), source))?;
    let components = components(&bytes).map_err(|error| (index, io::Error::from(error)))?;
    let mut files = vec![MODEL_INDEX.to_owned()];
    for component in &components {
        let directory = root.join(component);
        let failed = |source| (directory.clone(), source);
        // A missing component is reported when it is loaded, if ever.
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries {
            files.push(format!("{component}/{}", entry.map_err(failed)?.file_name().to_string_lossy()));
        }
    }
    Ok(needed(&files, &components))
}

/// The names of adapter files in peft and diffusers. Pickles are listed so that they can be refused by name.
const ADAPTERS: [&str; 4] =
    ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin"];

/// The file of the adapter at `path`, which may be a directory.
pub fn adapter_file(path: &Path) -> PathBuf {
    if !path.is_dir() {
        return path.to_owned();
    }
    let found = ADAPTERS.iter().map(|name| path.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| path.join(ADAPTERS[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "...", "a/b", "/a", "a\\b", "C:", "a\0", "a\nb"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
        for name in ["unet", "a..b", ".gitattributes", "model-00001-of-00002.safetensors", "é 1"] {
            assert!(is_plain_name(name), "{name:?}");
        }
        for path in ["a/../../x", "/etc/x", "a//b", "a/", "../x", "a/./b", "a\\..\\b"] {
            assert!(!is_plain_path(path), "{path:?}");
        }
        assert!(is_plain_path("unet/config.json"));
        for name in ["../unet", "a/../../x", "/etc", ".."] {
            let index = serde_json::json!({ name: ["diffusers", "X"], "_class_name": "Y" }).to_string();
            let error = components(index.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")) && error.contains("outside"), "{error}");
        }
    }

    fn chosen(files: &[&str]) -> Vec<String> {
        let index = br#"{"_class_name": "X", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"],
            "scheduler": ["diffusers", "S"], "safety_checker": ["x", "y"], "image_encoder": [null, null]}"#;
        needed(&files.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>(), &components(index).unwrap())
    }

    #[test]
    fn only_files_that_are_read_are_chosen() {
        let found = chosen(&[
            "model_index.json",
            "README.md",
            "v1-5-pruned.safetensors",
            "v1-5-pruned.ckpt",
            "scheduler/scheduler_config.json",
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
            "vae_1_0/config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "unet/../escape.json",
            "text_encoder/model.fp16.safetensors",
            "text_encoder/model.onnx",
        ]);
        assert_eq!(
            found,
            [
                "model_index.json",
                "scheduler/scheduler_config.json",
                "text_encoder/model.fp16.safetensors",
                "unet/config.json",
                "unet/diffusion_pytorch_model.safetensors",
            ]
        );
    }

    #[test]
    fn shards_come_with_their_index_in_one_variant() {
        let (index, half) = (
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        );
        let (plain, fp16) = (
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        );
        assert_eq!(chosen(&[index, half, plain, fp16]), [plain, index]);
        assert_eq!(chosen(&[half, plain, fp16]), [fp16, half]);
    }

    #[test]
    fn a_variant_is_chosen_if_there_is_nothing_else() {
        let (fp32, bf16) = ("unet/diffusion_pytorch_model.fp32.safetensors", "text_encoder/model.bf16.safetensors");
        let found = chosen(&[fp32, bf16, "unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/model.bin"]);
        assert_eq!(found, [bf16, fp32]);
        let names = ["config.json", "open_clip_model.fp16.safetensors", "x.safetensors"].map(str::to_owned);
        assert_eq!(needed_contrastive(&names), names[..2]);
    }
}
