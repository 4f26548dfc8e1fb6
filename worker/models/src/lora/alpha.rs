//! Finds an adapter's `alpha`, its strength in training, wherever its format stores it.

use std::path::Path;

use candle_core::DType;
use elbo_core::python_json;
use serde::Deserialize;
use serde_json::Value;

use super::super::error::ModelError;
use super::super::file::WeightsFile;
use super::super::settings::with_defaults;
use super::super::settings::{read_json, unsupported};
use super::pattern::Patterns;
use super::wrong;

/// The metadata entry in which diffusers' adapters store peft's configurations, with keys prefixed by the component.
const METADATA: &str = "lora_adapter_metadata";

/// peft's default for `lora_alpha`.
const DEFAULT_ALPHA: f64 = 8.0;

/// Unsupported settings that change what is added to a weight, or the weight itself. `null` and `false` have no effect.
const CHANGES: [&str; 10] = [
    "use_dora",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
];

/// The settings used from peft's `adapter_config.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AdapterConfig {
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    alpha_pattern: Patterns<f64>,
    rank_pattern: Patterns<usize>,
}

impl AdapterConfig {
    /// The configuration in the adapter's directory, if there is one.
    pub(super) fn beside(adapter: &Path) -> Result<Option<Self>, ModelError> {
        let path = adapter.with_file_name("adapter_config.json");
        if !path.is_file() {
            return Ok(None);
        }
        check(&path, &read_json(&path)?)?;
        // Read the file again, since the order of its patterns matters and `Value` does not keep it.
        read_json(&path).map(Some)
    }

    fn alpha(&self, module: &str) -> Result<f64, fancy_regex::Error> {
        Ok(self.alpha_pattern.of(module)?.or(self.lora_alpha).unwrap_or(DEFAULT_ALPHA))
    }

    fn rank(&self, module: &str) -> Result<Option<usize>, fancy_regex::Error> {
        Ok(self.rank_pattern.of(module)?.or(self.r))
    }
}

/// Refuses unsupported settings.
fn check(path: &Path, settings: &Value) -> Result<(), ModelError> {
    if let Some(other) = settings.get("peft_type").filter(|kind| !kind.is_null() && *kind != "LORA") {
        return Err(unsupported(path, "peft_type", other));
    }
    for key in CHANGES {
        let value = settings.get(key).unwrap_or(&Value::Null);
        if !value.is_null() && *value != Value::Bool(false) {
            return Err(unsupported(path, key, value));
        }
    }
    // Other initialisations change the base weights, so the adapter no longer fits the original model.
    match settings.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => Ok(()),
        Some(other) => Err(unsupported(path, "init_lora_weights", other)),
    }
}

/// The places where an adapter's alphas can be.
#[derive(Debug)]
pub(super) struct Alphas<'a> {
    pub(super) file: &'a WeightsFile,
    pub(super) config: Option<AdapterConfig>,
}

impl Alphas<'_> {
    /// `alpha / r` of a module (`alpha / sqrt(r)` if rank-stabilised), given the key of its alpha, if there is one.
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
        };
        let slow = |error: fancy_regex::Error| wrong(self.file.path(), format!("rank and alpha of {module}: {error}"));
        let expected = config.as_ref().map(|config| config.rank(module)).transpose().map_err(slow)?.flatten();
        if let Some(other) = expected.filter(|other| *other != rank) {
            let message = format!("{component}.{module} has rank {rank}, but its configuration says {other}");
            return Err(wrong(self.file.path(), message));
        }
        let alpha = match key {
            Some(key) => Some(self.scalar(key)?),
            None => config.as_ref().map(|config| config.alpha(module)).transpose().map_err(slow)?,
        };
        let rank = rank as f64;
        let is_stabilised = config.is_some_and(|config| config.use_rslora == Some(true));
        Ok(alpha.unwrap_or(rank) / if is_stabilised { rank.sqrt() } else { rank })
    }

    fn scalar(&self, key: &str) -> Result<f64, ModelError> {
        let values = self.file.tensor(key)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        match values[..] {
            [alpha] => Ok(alpha),
            _ => Err(wrong(self.file.path(), format!("{key} holds {} values instead of one", values.len()))),
        }
    }

    /// The configuration in the file's header, as newer versions of diffusers write it.
    fn embedded(&self, component: &str) -> Result<Option<AdapterConfig>, ModelError> {
        let Some(text) = self.file.metadata(METADATA) else { return Ok(None) };
        let path = self.file.path();
        let failed = |source| ModelError::Json { path: path.to_owned(), source };
        let all: serde_json::Map<String, Value> = python_json::parse(text.as_bytes()).map_err(failed)?;
        let prefix = format!("{component}.");
        let own = all.into_iter().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value)));
        let own: serde_json::Map<String, Value> = own.collect();
        if own.is_empty() {
            return Ok(None);
        }
        let own = Value::Object(own);
        check(path, &own)?;
        // diffusers writes and reads patterns sorted by name, and `Value` keeps that order.
        with_defaults(path, own).map(Some)
    }
}
