//! What a job needs to know about a model before loading it: its noise schedule and, if it is class-conditional, its classes.

use std::collections::BTreeMap;
use std::path::Path;

use elbo_core::class::{ClassError, ModelLabels};
use elbo_core::schedule::{NoiseSchedule, ScheduleError};
use elbo_store::files;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::model_files::{MODEL_INDEX, is_contrastive};

/// The noise schedule of the model in `directory`, in diffusers layout.
pub fn schedule(directory: &Path) -> Result<NoiseSchedule, ScheduleError> {
    let path = directory.join("scheduler/scheduler_config.json");
    let config = files::read_to_string(&path).map_err(|source| ScheduleError::Read { path, source })?;
    NoiseSchedule::of_configs(&config, files::read(&directory.join(MODEL_INDEX)).ok().as_deref())
}

/// The number of timesteps of the model in `directory`; 1 for a contrastive model.
pub fn timesteps(directory: &Path) -> Result<u32, ScheduleError> {
    if is_contrastive(directory) { Ok(1) } else { Ok(schedule(directory)?.timesteps()) }
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name", default)]
    class: String,
    #[serde(default)]
    id2label: BTreeMap<u32, String>,
}

#[derive(Deserialize)]
struct TransformerConfig {
    num_embeds_ada_norm: u32,
}

/// The labels of the model in `directory`; `None` for a model that takes prompts.
pub fn labels(directory: &Path) -> Result<Option<ModelLabels>, ClassError> {
    if is_contrastive(directory) {
        return Ok(None);
    }
    let index: ModelIndex = read_json(&directory.join(MODEL_INDEX))?;
    if index.class != "DiTPipeline" {
        return Ok(None);
    }
    let config: TransformerConfig = read_json(&directory.join("transformer/config.json"))?;
    Ok(Some(ModelLabels { count: config.num_embeds_ada_norm, names: index.id2label }))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ClassError> {
    let bytes = files::read(path).map_err(|source| ClassError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| ClassError::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with these files.
    fn model(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        directory
    }

    #[test]
    fn the_index_names_the_scheduler_if_its_configuration_does_not() {
        let (config, index) = ("scheduler/scheduler_config.json", r#"{"scheduler": ["diffusers", "LCMScheduler"]}"#);
        let found = schedule(model(&[(config, "{}"), (MODEL_INDEX, index)]).path()).unwrap();
        assert_eq!(found, NoiseSchedule::from_json(r#"{"_class_name": "LCMScheduler"}"#).unwrap());
        let alone = schedule(model(&[(config, "{}")]).path()).unwrap_err().to_string();
        assert!(alone.contains("_class_name"), "{alone}");
        let missing = schedule(model(&[(MODEL_INDEX, index)]).path()).unwrap_err().to_string();
        assert!(missing.contains(config) && missing.contains("a model is a directory"), "{missing}");
    }

    #[test]
    fn only_class_conditional_models_have_labels() {
        let dit = r#"{"_class_name": "DiTPipeline", "id2label": {"0": "tench"}}"#;
        let files = [(MODEL_INDEX, dit), ("transformer/config.json", r#"{"num_embeds_ada_norm": 7}"#)];
        let found = labels(model(&files).path()).unwrap().unwrap();
        assert_eq!((found.count, found.names[&0].as_str()), (7, "tench"));
        let prompts = [(MODEL_INDEX, r#"{"_class_name": "StableDiffusionPipeline"}"#)];
        assert_eq!(labels(model(&prompts).path()).unwrap(), None);
        let contrastive = [("config.json", "{}")];
        assert_eq!(
            (labels(model(&contrastive).path()).unwrap(), timesteps(model(&contrastive).path()).unwrap()),
            (None, 1)
        );
        let error = labels(model(&files[..1]).path()).unwrap_err().to_string();
        assert!(error.contains("transformer/config.json"), "{error}");
    }
}
