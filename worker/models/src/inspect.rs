//! Describes a model directory and whether a job can use it, for `elbo inspect`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use elbo_hub::model_files::is_contrastive;
use serde::Serialize;

use super::checkpoint::Weights;
use super::clip::ClipTextModel;
use super::contrastive::ContrastiveModel;
use super::distilled;
use super::error::ModelError;
use super::family::Family;
use super::network::Network;
use super::options::LoadOptions;
use super::t5::{T5Encoder, T5Tokenizer};
use super::tokenizer::ClipTokenizer;
use super::vae::VaeEncoder;

/// A model's properties, and the problems that would make a job fail.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Inspection {
    /// Whether a job could use it.
    pub ok: bool,
    /// Stable Diffusion, Stable Diffusion XL, Stable Diffusion 3, DiT, CLIP, SigLIP or OpenCLIP.
    pub family: Option<String>,
    /// Its components.
    pub components: Vec<Component>,
    /// Parameters that a job loads.
    pub parameters: u64,
    /// Bytes of those parameters at each element type.
    pub memory: Memory,
    /// Side of the images it was trained on, in pixels.
    pub native_size: Option<usize>,
    /// Channels, height and width of a latent.
    pub latent: Option<[usize; 3]>,
    /// epsilon, v_prediction or flow.
    pub prediction: Option<String>,
    /// The noise schedule.
    pub schedule: Option<String>,
    /// Training timesteps.
    pub timesteps: Option<u32>,
    /// Classes of a class-conditional model.
    pub classes: Option<u32>,
    /// Things to know before using it in a job.
    pub notes: Vec<String>,
    /// Problems that would make a job fail; each names its file.
    pub problems: Vec<String>,
}

/// Bytes at each element type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Single precision.
    pub f32: u64,
    /// Half precision.
    pub f16: u64,
    /// bfloat16.
    pub bf16: u64,
}

/// One directory of weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Component {
    /// The directory.
    pub name: String,
    /// Parameters that a job loads.
    pub parameters: u64,
    /// Element types they are stored in.
    pub stored: Vec<String>,
}

impl Inspection {
    /// Inspects the model in `dir`, whose user-visible name is `called`. It loads one component after the other, as a
    /// job would.
    pub fn of(dir: &Path, called: &str) -> Self {
        let mut inspection = Self::default();
        if is_contrastive(dir) {
            inspection.look_at_contrastive(dir);
        } else if let Some(family) = inspection.note(Family::of(dir)) {
            inspection.look(dir, family);
            inspection.notes = distilled::notes(dir, family, called);
        }
        inspection.parameters = inspection.components.iter().map(|c| c.parameters).sum();
        let half = 2 * inspection.parameters;
        inspection.memory = Memory { f32: 2 * half, f16: half, bf16: half };
        inspection.ok = inspection.problems.is_empty();
        inspection
    }

    fn look(&mut self, dir: &Path, family: Family) {
        self.family = Some(family.to_string());
        if let Some(schedule) = self.note(elbo_hub::model_config::schedule(dir)) {
            self.prediction = Some(schedule.prediction().to_string());
            self.schedule = Some(schedule.to_string());
            self.timesteps = Some(schedule.timesteps());
        }
        if let Some(Some(labels)) = self.note(elbo_hub::model_config::labels(dir)) {
            self.classes = Some(labels.count);
        }
        let options = LoadOptions::default();
        for (suffix, component) in family.text_encoders(dir) {
            self.count(&dir.join(&component), "model", &[""]);
            self.note(check_text_encoder(dir, suffix, &component, &options));
        }
        let network_dir = dir.join(family.network());
        self.count(&network_dir, "diffusion_pytorch_model", &[""]);
        self.count(&dir.join("vae"), "diffusion_pytorch_model", &["encoder.", "quant_conv."]);
        let network = self.note(Network::load(family, &network_dir, &options));
        let vae = self.note(VaeEncoder::of_family(family, &dir.join("vae"), &options));
        if let (Some(network), Some(vae)) = (network, vae) {
            let side = network.sample_size();
            self.native_size = Some(side * vae.factor());
            self.latent = Some([vae.latent_channels(), side, side]);
            if network.in_channels() != vae.latent_channels() {
                let (latent, input) = (vae.latent_channels(), network.in_channels());
                let message =
                    format!("the autoencoder's latents have {latent} channels, but the network takes {input}");
                self.problems.push(message);
            }
        }
    }

    fn look_at_contrastive(&mut self, dir: &Path) {
        if let Some(stem) = self.note(ContrastiveModel::weights(dir)) {
            self.count(dir, stem, &[""]);
        }
        if let Some(model) = self.note(ContrastiveModel::load(dir, &LoadOptions::default())) {
            self.family = Some(model.family().to_owned());
            self.native_size = Some(model.preprocessing().size as usize);
        }
    }

    /// The value of a result. An error is added to the problems, but only once per message.
    fn note<T, E: std::fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        let told = |error: E| {
            let problem = error.to_string();
            if !self.problems.contains(&problem) {
                self.problems.push(problem);
            }
        };
        result.map_err(told).ok()
    }

    /// Counts the parameters of a component's weights whose names start with one of `prefixes`.
    fn count(&mut self, dir: &Path, stem: &str, prefixes: &[&str]) {
        // Loading the component reports weights that can't be opened.
        let Ok(weights) = Weights::open(dir, stem, &LoadOptions::default()) else { return };
        let (mut parameters, mut stored) = (0, BTreeMap::new());
        for (key, shape, dtype) in weights.entries() {
            if prefixes.iter().any(|prefix| key.starts_with(prefix)) && !key.ends_with("position_ids") {
                let size = shape.iter().map(|side| *side as u64).product::<u64>();
                parameters += size;
                *stored.entry(dtype).or_insert(0) += size;
            }
        }
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.components.push(Component { name, parameters, stored: stored.into_keys().collect() });
    }
}

fn check_text_encoder(dir: &Path, suffix: &str, component: &str, options: &LoadOptions) -> Result<(), ModelError> {
    let (encoder, tokenizer): (PathBuf, PathBuf) = (dir.join(component), dir.join(format!("tokenizer{suffix}")));
    if suffix == "_3" {
        T5Tokenizer::open(&tokenizer, 256)?;
        T5Encoder::load(&encoder, options)?;
    } else {
        let positions = ClipTextModel::load(&encoder, options)?.positions();
        ClipTokenizer::open(&tokenizer, positions)?;
    }
    Ok(())
}
