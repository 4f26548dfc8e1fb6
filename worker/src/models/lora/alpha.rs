//! How strong an adapter was trained to be: `alpha`, from wherever its format keeps it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use serde::Deserialize;

use super::super::checkpoint::{ModelError, read_json, unsupported};
use super::super::file::WeightsFile;
use super::wrong;

/// The entry of diffusers' adapters that holds peft's configurations, their keys prefixed by the component.
const METADATA: &str = "lora_adapter_metadata";

/// What this needs of peft's `adapter_config.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AdapterConfig {
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: bool,
    alpha_pattern: BTreeMap<String, f64>,
    rank_pattern: BTreeMap<String, usize>,
    peft_type: Option<String>,
    use_dora: bool,
    fan_in_fan_out: bool,
}

impl AdapterConfig {
    /// The configuration in the adapter's directory, if there is one.
    pub(super) fn beside(adapter: &Path) -> Result<Option<Self>, ModelError> {
        let path = adapter.with_file_name("adapter_config.json");
        if !path.is_file() {
            return Ok(None);
        }
        let config: Self = read_json(&path)?;
        config.check(&path)?;
        Ok(Some(config))
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        if let Some(other) = self.peft_type.as_deref().filter(|t| *t != "LORA") {
            return Err(unsupported(path, "peft_type", other));
        }
        for (key, value) in [("use_dora", self.use_dora), ("fan_in_fan_out", self.fan_in_fan_out)] {
            if value {
                return Err(unsupported(path, key, value));
            }
        }
        let patterns = self.alpha_pattern.keys().chain(self.rank_pattern.keys());
        match patterns.into_iter().find(|pattern| pattern.contains(['*', '+', '?', '|', '(', '[', '^', '$', '\\'])) {
            Some(pattern) => Err(unsupported(path, "alpha_pattern or rank_pattern", pattern)),
            None => Ok(()),
        }
    }

    fn alpha(&self, module: &str) -> Option<f64> {
        of_module(&self.alpha_pattern, module).or(self.lora_alpha)
    }

    fn rank(&self, module: &str) -> Option<usize> {
        of_module(&self.rank_pattern, module).or(self.r)
    }
}

/// peft's rule: a pattern is a module's whole name or its last parts.
fn of_module<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Option<T> {
    let ends = |pattern: &str| module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    patterns.iter().find(|(pattern, _)| ends(pattern)).map(|(_, value)| *value)
}

/// Where an adapter's alphas are.
#[derive(Debug)]
pub(super) struct Alphas<'a> {
    pub(super) file: &'a WeightsFile,
    pub(super) config: Option<AdapterConfig>,
}

impl Alphas<'_> {
    /// `alpha / r` of a module (`alpha / sqrt(r)` if rank-stabilised), given the key of its alpha if it has one.
    pub(super) fn over_rank(
        &self,
        component: &str,
        module: &str,
        key: Option<&str>,
        rank: usize,
    ) -> Result<f64, ModelError> {
        let config = match &self.config {
            Some(config) => Some(config.clone()),
            None => self.embedded(component)?,
        }
        .unwrap_or_default();
        if let Some(other) = config.rank(module).filter(|other| *other != rank) {
            let message = format!("{component}.{module} has rank {rank}, and its configuration says {other}");
            return Err(wrong(self.file.path(), message));
        }
        let alpha = match key {
            Some(key) => Some(self.scalar(key)?),
            None => config.alpha(module),
        };
        let rank = rank as f64;
        Ok(alpha.unwrap_or(rank) / if config.use_rslora { rank.sqrt() } else { rank })
    }

    fn scalar(&self, key: &str) -> Result<f64, ModelError> {
        let values = self.file.tensor(key)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        match values[..] {
            [alpha] => Ok(alpha),
            _ => Err(wrong(self.file.path(), format!("{key} holds {} values, it should be one", values.len()))),
        }
    }

    /// The configuration that newer versions of diffusers write into the file's header.
    fn embedded(&self, component: &str) -> Result<Option<AdapterConfig>, ModelError> {
        let Some(text) = self.file.metadata(METADATA) else { return Ok(None) };
        let failed = |source| ModelError::Json { path: self.file.path().to_owned(), source };
        let all: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).map_err(failed)?;
        let prefix = format!("{component}.");
        let own = all.into_iter().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value)));
        let config: AdapterConfig = serde_json::from_value(own.collect()).map_err(failed)?;
        config.check(self.file.path())?;
        Ok(Some(config))
    }
}
