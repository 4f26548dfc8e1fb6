//! LoRA adapters (Hu et al., 2021), merged into the weights when they are loaded.
//!
//! A module's weight becomes `W + scale * alpha / r * B A` (`alpha / sqrt(r)` for rank-stabilised adapters), computed in
//! f32 before the weight is rounded. Formats: diffusers, old and new, and peft. Every key of a file must be understood and
//! must fit a weight: an adapter that is half applied looks like one that works badly.

mod alpha;
mod key;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use self::alpha::{AdapterConfig, Alphas};
use self::key::{Key, Role};
use super::checkpoint::ModelError;
use super::file::WeightsFile;

/// An adapter and how strongly it is merged.
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

/// What a file holds for one module.
#[derive(Debug, Default)]
struct Parts {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<String>,
}

impl Lora {
    /// Opens an adapter for the model in the directory `model`.
    pub fn open(path: &Path, scale: f64, model: &Path) -> Result<Self, ModelError> {
        let file = WeightsFile::open(path)?;
        let mut modules: BTreeMap<(String, String), Parts> = BTreeMap::new();
        for key in file.keys() {
            let parsed = Key::parse(key).map_err(|message| wrong(path, message))?;
            let component = parsed.component.unwrap_or_else(|| default_component(&parsed.module, model)).to_owned();
            if !model.join(&component).is_dir() {
                return Err(wrong(path, format!("{key}: the model has no {component}; use an adapter made for it")));
            }
            let parts = modules.entry((component, parsed.module)).or_default();
            let slot = match parsed.role {
                Role::Down => &mut parts.down,
                Role::Up => &mut parts.up,
                Role::Alpha => &mut parts.alpha,
            };
            if let Some(twice) = slot.replace(key.clone()) {
                return Err(wrong(path, format!("{key} and {twice} mean the same weight")));
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

    /// What is added to a weight, in f32 with as many elements as the weight has; nothing for most weights.
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

/// A shape without its first dimension and without a 1x1 kernel: linear layers are also stored as 1x1 convolutions.
fn inner(shape: &[usize]) -> &[usize] {
    match shape {
        [_, inner, 1, 1] => std::slice::from_ref(inner),
        [_, inner @ ..] => inner,
        [] => &[],
    }
}

/// Files of peft and of old versions of diffusers hold one component and do not say which.
fn default_component(module: &str, model: &Path) -> &'static str {
    if module.starts_with("text_model.") {
        "text_encoder"
    } else if model.join("transformer").is_dir() {
        "transformer"
    } else {
        "unet"
    }
}

fn wrong(path: &Path, message: String) -> ModelError {
    ModelError::Lora { path: PathBuf::from(path), message }
}
