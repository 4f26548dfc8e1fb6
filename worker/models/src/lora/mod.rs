//! LoRA adapters (Hu et al., 2021), merged into the weights when they are loaded.
//!
//! A module's weight becomes `W + scale * alpha / r * B A` (`alpha / sqrt(r)` for rank-stabilised adapters), computed
//! in f32 before the weight is rounded. Formats: diffusers (old and new), peft and kohya. Every key of a file must be
//! understood and must fit a weight, since a half-applied adapter would look like one that works badly.

mod alpha;
mod key;
mod kohya;
mod pattern;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use elbo_hub::model_files::adapter_file;

use self::alpha::{AdapterConfig, Alphas};
use self::key::{Key, Role};
use self::kohya::Kohya;
use super::error::ModelError;
use super::file::WeightsFile;
use super::names;

/// An adapter and its scale.
#[derive(Debug)]
pub struct Lora {
    file: WeightsFile,
    /// The changes, by component (a directory of the model) and module.
    components: BTreeMap<String, BTreeMap<String, Change>>,
}

/// `factor * up down`.
#[derive(Debug)]
struct Change {
    down: String,
    up: String,
    factor: f64,
}

/// A file's weights for one module.
#[derive(Debug, Default)]
struct Parts {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

impl Lora {
    /// Opens an adapter (a file or its directory) for the model in the directory `model`.
    pub fn open(path: &Path, scale: f64, model: &Path) -> Result<Self, ModelError> {
        let adapter = adapter_file(path);
        let file = WeightsFile::open(&adapter).map_err(|error| not_an_adapter(path, error))?;
        let path = adapter.as_path();
        let mut kohya = Kohya::new(path, model);
        let mut modules: BTreeMap<(String, String), Parts> = BTreeMap::new();
        for key in file.keys() {
            let parsed = match kohya.parse(key)? {
                Some(parsed) => parsed,
                None => Key::parse(key).map_err(|message| wrong(path, message))?,
            };
            let component = parsed.component.unwrap_or_else(|| default_component(&parsed.module, model)).to_owned();
            if !model.join(&component).is_dir() {
                return Err(wrong(path, format!("{key}: the model has no {component}; use an adapter made for it")));
            }
            let module = names::of_component(&component)(&parsed.module).into_owned();
            let parts = modules.entry((component, module)).or_default();
            let slot = match parsed.role {
                Role::Down => &mut parts.down,
                Role::Up => &mut parts.up,
                Role::Alpha => &mut parts.alpha,
            };
            if let Some(twice) = slot.replace(key.clone()) {
                return Err(wrong(path, format!("{key} and {twice} stand for the same weight")));
            }
        }
        if modules.is_empty() {
            return Err(wrong(path, "it holds no weights".into()));
        }
        let alphas = Alphas { config: AdapterConfig::beside(path)?, file: &file };
        let mut components: BTreeMap<String, BTreeMap<String, Change>> = BTreeMap::new();
        for ((component, module), parts) in modules {
            let change = Change::new(&file, &alphas, &component, &module, parts, scale)?;
            components.entry(component).or_default().insert(module, change);
        }
        Ok(Self { file, components })
    }

    /// Checks that every change to a component fits its weight, given the weights' shapes.
    pub(crate) fn check<'a>(
        &self,
        component: &str,
        shape: impl Fn(&str) -> Option<&'a [usize]>,
    ) -> Result<(), ModelError> {
        for (module, change) in self.components.get(component).into_iter().flatten() {
            let key = format!("{module}.weight");
            let [down, up] = [&change.down, &change.up].map(|k| self.file.shape(k).unwrap_or_default());
            let Some(weight) = shape(&key) else {
                let message = format!("{} has shape {down:?}, and {component} has no weight {key}", change.down);
                return Err(wrong(self.file.path(), message));
            };
            let fits = weight.first() == up.first() && inner(weight) == inner(down);
            if !fits {
                let message = format!(
                    "{} {down:?} and {} {up:?} do not fit the weight {key} {weight:?} of {component}",
                    change.down, change.up
                );
                return Err(wrong(self.file.path(), message));
            }
        }
        Ok(())
    }

    /// The change to add to a weight, in f32 with as many elements as the weight; `None` for most weights.
    pub(crate) fn change(&self, component: &str, key: &str) -> Result<Option<Tensor>, ModelError> {
        let module = key.strip_suffix(".weight").unwrap_or_default();
        let Some(change) = self.components.get(component).and_then(|modules| modules.get(module)) else {
            return Ok(None);
        };
        let [down, up] = [&change.down, &change.up].map(|key| {
            let matrix = self.file.tensor(key)?.to_dtype(DType::F32)?;
            Ok::<_, ModelError>(matrix.flatten_from(1)?)
        });
        Ok(Some((up?.matmul(&down?)? * change.factor)?))
    }
}

impl Change {
    fn new(
        file: &WeightsFile,
        alphas: &Alphas<'_>,
        component: &str,
        module: &str,
        parts: Parts,
        scale: f64,
    ) -> Result<Self, ModelError> {
        let lone = |key: Option<String>| {
            wrong(file.path(), format!("{}: the other half of the pair is missing", key.unwrap_or_default()))
        };
        let (down, up) = match (parts.down, parts.up) {
            (Some(down), Some(up)) => (down, up),
            (down, up) => return Err(lone(down.or(up).or(parts.alpha))),
        };
        let shapes = [&down, &up].map(|key| file.shape(key).unwrap_or_default());
        // down is [r, in] or [r, in, kh, kw], up is [out, r] or [out, r, 1, 1].
        let rank = match shapes {
            [[rank, _, ..], up] if inner(up) == [*rank] && *rank > 0 => *rank,
            [a, b] => return Err(wrong(file.path(), format!("{down} {a:?} and {up} {b:?} do not fit each other"))),
        };
        let factor = scale * alphas.over_rank(component, module, parts.alpha.as_deref(), rank)?;
        Ok(Self { down, up, factor })
    }
}

/// A shape without its first dimension and without a 1x1 kernel, since some files store linear layers as 1x1
/// convolutions.
fn inner(shape: &[usize]) -> &[usize] {
    match shape {
        [_, inner, 1, 1] => std::slice::from_ref(inner),
        [_, inner @ ..] => inner,
        [] => &[],
    }
}

/// Files of peft and of old versions of diffusers hold one component without naming it.
fn default_component(module: &str, model: &Path) -> &'static str {
    if module.starts_with("text_model.") || module.starts_with("encoder.layers.") {
        "text_encoder"
    } else if model.join("transformer").is_dir() {
        "transformer"
    } else {
        "unet"
    }
}

/// Adds a remedy to the error for a file that could not be opened as an adapter.
fn not_an_adapter(given: &Path, error: ModelError) -> ModelError {
    match error {
        ModelError::MissingFile(_) if given.is_dir() => {
            let message = "the directory has no adapter_model.safetensors (peft) or pytorch_lora_weights.safetensors \
                           (diffusers): give the adapter's file";
            wrong(given, message.into())
        }
        ModelError::MissingFile(_) => wrong(given, "there is no such adapter: give a file, or peft's directory".into()),
        // Reading a pickle can run code. candle's reader doesn't, but it skips what it can't read.
        ModelError::Pickle(path) => {
            let message = "it is a pickle, which is not supported: convert it, alphas included, with `python -c \"import sys, \
                           torch, safetensors.torch as s; a, b = sys.argv[1:]; s.save_file({k: \
                           torch.as_tensor(v).clone().contiguous() \
                           for k, v in torch.load(a, map_location='cpu', weights_only=True).items()}, b)\" IN.bin \
                           OUT.safetensors`, and keep peft's adapter_config.json beside it";
            wrong(&path, message.into())
        }
        other => other,
    }
}

fn wrong(path: &Path, message: String) -> ModelError {
    ModelError::Lora { path: PathBuf::from(path), message }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{Device, safetensors};

    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    fn fixture(name: &str) -> PathBuf {
        root().join("tests/fixtures/lora").join(name)
    }

    fn digits() -> PathBuf {
        root().join("cli/demo/model")
    }

    /// Compares the changes to weights with those of diffusers and peft (`tests/fixtures/lora/make_kinds.py`).
    fn check(name: &str, adapter: &Path, model: &Path) {
        let lora = Lora::open(adapter, 1.0, model).unwrap();
        let deltas = safetensors::load(fixture("deltas.safetensors"), &Device::Cpu).unwrap();
        let prefix = format!("{name}/");
        let mut checked = 0;
        for (key, expected) in deltas.iter().filter_map(|(key, delta)| Some((key.strip_prefix(&prefix)?, delta))) {
            let (component, module) = key.split_once('.').unwrap();
            let found = lora.change(component, &format!("{module}.weight")).unwrap().unwrap();
            let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(found.len(), expected.len());
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference < 1e-5, "{key}: {difference}");
            checked += 1;
        }
        assert!(checked > 4, "{checked}");
    }

    #[test]
    fn kohya_names_are_found_in_the_model_and_alpha_is_applied() {
        check("kohya", &fixture("kohya.safetensors"), &digits());
        check("kohya_xl", &fixture("kohya_xl.safetensors"), &root().join("tests/fixtures/sdxl/model"));
    }

    #[test]
    fn a_peft_directory_is_read_with_its_patterns() {
        check("patterns", &fixture("patterns"), &digits());
        check("patterns", &fixture("patterns/adapter_model.safetensors"), &digits());
    }

    /// Copies an adapter file with its keys renamed.
    fn renamed(from: &Path, to: &Path, name: impl Fn(&str) -> String) {
        let tensors = safetensors::load(from, &Device::Cpu).unwrap();
        let tensors: HashMap<String, Tensor> = tensors.into_iter().map(|(key, tensor)| (name(&key), tensor)).collect();
        safetensors::save(&tensors, to).unwrap();
    }

    #[test]
    fn an_adapter_may_have_its_own_name() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("patterns/adapter_config.json"), directory.path().join("adapter_config.json")).unwrap();
        let named = directory.path().join("adapter_model.safetensors");
        let from = fixture("patterns/adapter_model.safetensors");
        renamed(&from, &named, |key| key.replace(".weight", ".default_0.weight"));
        check("patterns", directory.path(), &digits());
    }

    #[test]
    fn an_adapter_made_with_another_version_of_transformers_fits() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kohya.safetensors");
        renamed(&fixture("kohya.safetensors"), &file, |key| {
            // As peft writes it for a text encoder without the prefix.
            let plain = key
                .replace("lora_te_text_model_encoder_layers_0_self_attn_", "text_encoder.encoder.layers.0.self_attn.");
            let plain = plain.replace("lora_te_text_model_encoder_layers_0_mlp_", "text_encoder.encoder.layers.0.mlp.");
            if plain == key { plain } else { plain.replace("lora_down", "lora_A").replace("lora_up", "lora_B") }
        });
        check("kohya", &file, &digits());
    }

    fn open_error(path: &Path) -> String {
        Lora::open(path, 1.0, &digits()).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn unsupported_keys_are_refused_with_a_remedy_that_keeps_alpha() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("made.safetensors");
        for (part, kind) in
            [("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lora_mid.weight", "Tucker")]
        {
            let key = format!("lora_unet_mid_block_attentions_0_proj_in.{part}");
            renamed(&fixture("kohya.safetensors"), &file, |other| format!("{key}{}", &other[other.len() - 1..]));
            let error = open_error(&file);
            assert!(error.contains(&key) && error.contains(kind) && error.contains("keeps alpha"), "{error}");
        }
        let key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight";
        renamed(&fixture("kohya.safetensors"), &file, |_| key.to_owned());
        let error = open_error(&file);
        assert!(error.contains(key) && error.contains("no module of this name"), "{error}");
        renamed(&fixture("kohya.safetensors"), &file, |_| "lora_te2_x.alpha".to_owned());
        assert!(open_error(&file).contains("the model has no text_encoder_2"));
    }

    #[test]
    fn pickles_and_empty_directories_are_refused_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        assert!(open_error(directory.path()).contains("adapter_model.safetensors"));
        std::fs::write(directory.path().join("adapter_model.bin"), b"PK\x03\x04 archive/data.pkl").unwrap();
        let error = open_error(directory.path());
        assert!(error.contains("adapter_model.bin") && error.contains("alphas included"), "{error}");
        assert!(open_error(&directory.path().join("none.safetensors")).contains("no such adapter"));
    }

    #[test]
    fn unsupported_peft_settings_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let from = fixture("patterns/adapter_model.safetensors");
        std::fs::copy(from, directory.path().join("adapter_model.safetensors")).unwrap();
        let config = directory.path().join("adapter_config.json");
        let text = std::fs::read_to_string(fixture("patterns/adapter_config.json")).unwrap();
        let settings: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (key, value) in [
            ("use_dora", serde_json::json!(true)),
            ("init_lora_weights", "pissa_niter_4".into()),
            ("alpha_pattern", serde_json::json!({ "(": 1 })),
            ("peft_type", "LOHA".into()),
            ("lora_alpha", "much".into()),
        ] {
            let mut changed = settings.clone();
            changed[key] = value;
            std::fs::write(&config, changed.to_string()).unwrap();
            let error = open_error(directory.path());
            assert!(error.contains("adapter_config.json") && error.contains(key), "{error}");
        }
        let mut changed = settings;
        changed["rank_pattern"] = serde_json::json!({ ".*to_q": 3 });
        std::fs::write(&config, changed.to_string()).unwrap();
        assert!(open_error(directory.path()).contains("its configuration says 3"));
    }
}
