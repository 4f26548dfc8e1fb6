//! The fingerprint of a job, which prevents mixing the results of two jobs in one output.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use elbo_core::job::{JobSpec, Lora};
use elbo_store::files;
use serde::{Deserialize, Serialize};

use crate::model_files;
use crate::model_files::adapter_file;
use crate::model_source::JobModels;

/// Everything that decides a job's predictions, by content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobIdentity {
    /// The specification.
    pub spec: JobSpec,
    /// BLAKE3 of every model file the job reads, by its path in the model directory.
    pub model_files: BTreeMap<String, String>,
    /// BLAKE3 of every file of the shortlist's model.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub shortlist_files: BTreeMap<String, String>,
    /// BLAKE3 of every adapter, including peft's configuration beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora_files: Vec<String>,
    /// BLAKE3 of the noise file.
    pub noise_file: Option<String>,
}

/// A file that could not be hashed.
#[derive(Debug, thiserror::Error)]
#[error("reading {path}: {source}")]
pub struct HashError {
    /// The file.
    pub path: PathBuf,
    /// The reason.
    pub source: io::Error,
}

impl JobIdentity {
    /// Hashes the files that a specification names. `models` are the local directories of its models.
    pub fn new(spec: JobSpec, models: &JobModels) -> Result<Self, HashError> {
        let model_files = hash_model(&models.model)?;
        let shortlist_files = models.shortlist.as_deref().map(hash_model).transpose()?.unwrap_or_default();
        let lora_files = spec.lora.iter().map(hash_lora).collect::<Result<_, _>>()?;
        let noise_file = spec.noise.as_deref().map(|path| hash_file(Path::new(path))).transpose()?;
        Ok(Self { spec, model_files, shortlist_files, lora_files, noise_file })
    }

    /// The hash of everything but the dataset. It is equal for equal predictions on equal images, wherever the files are.
    pub fn digest(&self) -> String {
        let mut identity = self.clone();
        for path in [&mut identity.spec.images, &mut identity.spec.model] {
            path.clear();
        }
        identity.spec.noise = None;
        identity.spec.lora.iter_mut().for_each(|lora| lora.path.clear());
        identity.spec.shortlist.iter_mut().for_each(|shortlist| shortlist.model.clear());
        // Serialising plain data with string keys can't fail.
        let json = serde_json::to_vec(&identity).unwrap_or_default();
        blake3::hash(&json).to_hex().to_string()
    }

    /// The job's fingerprint: the hash of spec, model files and manifest.
    pub fn fingerprint(&self, manifest_digest: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.digest().as_bytes());
        hasher.update(manifest_digest.as_bytes());
        hasher.finalize().to_hex().to_string()
    }

    /// The differences from an `earlier` job, one per line: `loss: l2 -> l1`.
    pub fn differences(&self, earlier: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let (new, old) = (to_map(&self.spec), to_map(&earlier.spec));
        // A key may be in only one of them, because defaults are not written.
        for key in new.keys().chain(old.keys().filter(|key| !new.contains_key(*key))) {
            let of = |spec: &serde_json::Map<_, _>| spec.get(key).cloned().unwrap_or_default();
            let (before, value) = (of(&old), of(&new));
            // The locations of model, adapters and noise may change, but not their content.
            if value != before && !["model", "lora", "noise"].contains(&key.as_str()) {
                lines.push(describe(key, &before, &value));
            }
        }
        lines.extend(file_differences("model file", &earlier.model_files, &self.model_files));
        lines.extend(file_differences("shortlist's model file", &earlier.shortlist_files, &self.shortlist_files));
        lines.extend(self.lora_differences(earlier));
        if self.noise_file != earlier.noise_file {
            lines.push("noise file: content changed".into());
        }
        lines
    }

    fn lora_differences(&self, earlier: &Self) -> Vec<String> {
        let (new, old) = (self.spec.lora.len(), earlier.spec.lora.len());
        if new != old {
            return vec![format!("lora: {old} adapters -> {new}")];
        }
        let loras = self.spec.lora.iter().zip(&earlier.spec.lora);
        let files = self.lora_files.iter().zip(&earlier.lora_files);
        let mut lines = Vec::new();
        for ((new, old), (hash, before)) in loras.zip(files) {
            if hash != before {
                lines.push(format!("lora {}: content changed", new.path));
            }
            if new.scale != old.scale {
                lines.push(format!("lora {}: scale {} -> {}", new.path, old.scale, new.scale));
            }
        }
        lines
    }
}

/// The differences between two sets of hashed files.
fn file_differences(what: &str, old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let describe = |name: &String| match (old.get(name), new.get(name)) {
        (Some(a), Some(b)) if a == b => None,
        (Some(_), Some(_)) => Some(format!("{what} {name}: content changed")),
        (Some(_), None) => Some(format!("{what} {name}: gone")),
        (None, _) => Some(format!("{what} {name}: new")),
    };
    names.into_iter().filter_map(describe).collect()
}

fn to_map(spec: &JobSpec) -> serde_json::Map<String, serde_json::Value> {
    let mut spec = spec.clone();
    // The location of the shortlist's model may change too.
    spec.shortlist.iter_mut().for_each(|shortlist| shortlist.model.clear());
    match serde_json::to_value(&spec) {
        Ok(serde_json::Value::Object(map)) => map,
        _ => serde_json::Map::new(),
    }
}

fn describe(key: &str, before: &serde_json::Value, after: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| if value.is_null() { "the default".to_owned() } else { value.to_string() };
    let (before, after) = (text(before), text(after));
    if before.len() + after.len() > 200 { format!("{key}: changed") } else { format!("{key}: {before} -> {after}") }
}

/// The BLAKE3 hash of a file, in hexadecimal.
fn hash_file(path: &Path) -> Result<String, HashError> {
    let mut hasher = blake3::Hasher::new();
    let failed = |source| HashError { path: path.to_owned(), source };
    io::copy(&mut files::open(path).map_err(failed)?, &mut hasher).map_err(failed)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hashes an adapter and the configuration that sets its strength.
fn hash_lora(lora: &Lora) -> Result<String, HashError> {
    let path = adapter_file(Path::new(&lora.path));
    let (hash, config) = (hash_file(&path)?, path.with_file_name("adapter_config.json"));
    if !config.is_file() {
        return Ok(hash);
    }
    Ok(blake3::hash(format!("{hash}{}", hash_file(&config)?).as_bytes()).to_hex().to_string())
}

/// Hashes the files of a model directory that affect its results.
fn hash_model(root: &Path) -> Result<BTreeMap<String, String>, HashError> {
    let failed = |(path, source)| HashError { path, source };
    let files = model_files::of_directory(root).map_err(failed)?;
    files.into_iter().map(|file| Ok((file.clone(), hash_file(&root.join(&file))?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(scale: f64, hash: &str) -> JobIdentity {
        let spec = serde_json::json!({
            "images": "i", "model": "m", "classes": {"names": [], "prompts": []},
            "policy": {"name": "exhaustive", "samples": 1, "trials": 1},
            "loss": "l2", "dtype": "f32", "size": null, "seed": 0, "noise_scope": "sample", "noise": null,
            "write_errors": false, "label_from": null, "limit": null, "shard_size": 1,
            "lora": [{"path": format!("/somewhere/{hash}"), "scale": scale}],
        });
        let spec = serde_json::from_value(spec).unwrap();
        JobIdentity {
            spec,
            model_files: BTreeMap::new(),
            shortlist_files: BTreeMap::new(),
            lora_files: vec![hash.into()],
            noise_file: None,
        }
    }

    #[test]
    fn a_directory_hashes_as_the_adapter_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let of = |path: &Path| hash_lora(&Lora { path: path.to_string_lossy().into_owned(), scale: 1.0 });
        assert!(of(directory.path()).unwrap_err().to_string().contains("adapter_model.safetensors"));
        let file = directory.path().join("adapter_model.safetensors");
        std::fs::write(&file, "weights").unwrap();
        let plain = of(directory.path()).unwrap();
        std::fs::write(directory.path().join("adapter_config.json"), "{}").unwrap();
        assert_eq!(of(directory.path()).unwrap(), of(&file).unwrap());
        assert_ne!(of(&file).unwrap(), plain);
    }

    #[test]
    fn an_adapter_is_identified_by_content_and_scale() {
        let first = identity(1.0, "a");
        let mut moved = first.clone();
        moved.spec.lora[0].path = "/elsewhere".into();
        assert_eq!(moved.digest(), first.digest());
        assert!(moved.differences(&first).is_empty());
        let (weaker, other) = (identity(0.5, "a"), identity(1.0, "b"));
        assert!(weaker.differences(&first)[0].ends_with("scale 1 -> 0.5"));
        assert!(other.differences(&first)[0].ends_with("content changed"));
        let mut none = first.clone();
        (none.spec.lora, none.lora_files) = (vec![], vec![]);
        assert_eq!(none.differences(&first), ["lora: 1 adapters -> 0"]);
        assert!(!serde_json::to_string(&none).unwrap().contains("lora"));
        assert!([weaker, other, none].iter().all(|identity| identity.digest() != first.digest()));
    }
}
