//! The fingerprint of a job: refuses to mix two jobs' results in one output.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::job::JobSpec;

/// What a job's predictions are a function of, by content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobIdentity {
    /// The specification.
    pub spec: JobSpec,
    /// BLAKE3 of every model file the job reads, by its path in the model directory.
    pub model_files: BTreeMap<String, String>,
    /// BLAKE3 of the noise file.
    pub noise_file: Option<String>,
}

/// A file that could not be hashed.
#[derive(Debug, thiserror::Error)]
#[error("reading {path}: {source}")]
pub struct HashError {
    /// The file.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

impl JobIdentity {
    /// Hashes the files a specification names.
    pub fn new(spec: JobSpec) -> Result<Self, HashError> {
        let model_files = hash_directory(Path::new(&spec.model))?;
        let noise_file = spec.noise.as_deref().map(|path| hash_file(Path::new(path))).transpose()?;
        Ok(Self { spec, model_files, noise_file })
    }

    /// The hash of everything but the dataset: equal for equal predictions of equal images, wherever files lie.
    pub fn digest(&self) -> String {
        let mut identity = self.clone();
        for path in [&mut identity.spec.images, &mut identity.spec.model] {
            path.clear();
        }
        identity.spec.noise = None;
        // Serialising plain data with string keys does not fail.
        let json = serde_json::to_vec(&identity).unwrap_or_default();
        blake3::hash(&json).to_hex().to_string()
    }

    /// The job's fingerprint: hash of spec, model files and manifest.
    pub fn fingerprint(&self, manifest_digest: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.digest().as_bytes());
        hasher.update(manifest_digest.as_bytes());
        hasher.finalize().to_hex().to_string()
    }

    /// What differs from an `earlier` job, one line each: `loss: l2 -> l1`.
    pub fn differences(&self, earlier: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let (new, old) = (to_map(&self.spec), to_map(&earlier.spec));
        // A key may be in one of them alone: defaults are not written down.
        for key in new.keys().chain(old.keys().filter(|key| !new.contains_key(*key))) {
            let of = |spec: &serde_json::Map<_, _>| spec.get(key).cloned().unwrap_or_default();
            let (before, value) = (of(&old), of(&new));
            // Where the model and noise lie may change; what they hold may not.
            if value != before && key != "model" && key != "noise" {
                lines.push(describe(key, &before, &value));
            }
        }
        for name in earlier.model_files.keys().chain(self.model_files.keys()).collect::<std::collections::BTreeSet<_>>()
        {
            match (earlier.model_files.get(name), self.model_files.get(name)) {
                (Some(a), Some(b)) if a == b => {}
                (Some(_), Some(_)) => lines.push(format!("model file {name}: content changed")),
                (Some(_), None) => lines.push(format!("model file {name}: gone")),
                (None, _) => lines.push(format!("model file {name}: new")),
            }
        }
        if self.noise_file != earlier.noise_file {
            lines.push("noise file: content changed".into());
        }
        lines
    }
}

fn to_map(spec: &JobSpec) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(spec) {
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
    io::copy(
        &mut std::fs::File::open(path).map_err(|source| HashError { path: path.to_owned(), source })?,
        &mut hasher,
    )
    .map_err(|source| HashError { path: path.to_owned(), source })?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hashes the files of a model directory that decide its numbers: configurations, tokenizers and safetensors.
fn hash_directory(root: &Path) -> Result<BTreeMap<String, String>, HashError> {
    let mut files = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        let failed = |source| HashError { path: directory.clone(), source };
        for entry in std::fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let relative = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !relative.starts_with('.') {
                    pending.push(path);
                }
            } else if ["json", "txt", "safetensors", "model"].contains(&extension.as_str()) {
                files.insert(relative, hash_file(&path)?);
            }
        }
    }
    Ok(files)
}
