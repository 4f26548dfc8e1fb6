//! Opens fixtures and compares with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_core::job::ModelDtype;
use elbo_core::schedule::NoiseSchedule;
use elbo_models::{Conditions, DiffusionModel, LoadOptions};
use elbo_tests::numbers::{channels_last, flat};
use elbo_tests::{copy_tree, fixtures, model};
use elbo_worker::Devices;
use tempfile::TempDir;

use crate::loading::copied;

/// The device of the models: the CPU, or the value of `ELBO_TEST_DEVICE` (`cuda:0`).
pub(crate) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || {
        let name = std::env::var("ELBO_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        name.parse::<Devices>().unwrap().find().unwrap().engines(1)[0].open().unwrap()
    };
    DEVICE.get_or_init(open).clone()
}

/// How the models are loaded: on that device, in f32.
pub(crate) fn options() -> LoadOptions {
    LoadOptions::new(device(), ModelDtype::F32)
}

pub(crate) struct Reference {
    pub(crate) tensors: HashMap<String, Tensor>,
    json: serde_json::Value,
    pub(crate) model: PathBuf,
    /// The model's directory if it was assembled from two fixtures.
    _assembled: Option<TempDir>,
}

impl Reference {
    pub(crate) fn open(name: &str) -> Self {
        let dir = fixtures().join(name);
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
        let tensors = safetensors::load(dir.join("reference.safetensors"), &Device::Cpu).unwrap();
        if let Some(base) = json["base"].as_str() {
            return Self::open(base).with_unet(&dir, tensors);
        }
        let own = dir.join("model");
        Self { tensors, json, model: if own.is_dir() { own } else { model() }, _assembled: None }
    }

    /// The same fixture with the UNet in `dir`, its scheduler if it has one, and the reference that diffusers computed for it.
    fn with_unet(mut self, dir: &Path, tensors: HashMap<String, Tensor>) -> Self {
        let assembled = copied(&self.model);
        for component in ["unet", "scheduler"].into_iter().filter(|component| dir.join(component).is_dir()) {
            let place = assembled.path().join(component);
            std::fs::remove_dir_all(&place).unwrap();
            copy_tree(&dir.join(component), &place);
        }
        let of_the_other = ["unet.", "mse", "l1", "huber", "model_output", "nonsquare_out"];
        self.tensors.retain(|name, _| !of_the_other.iter().any(|start| name.starts_with(start)));
        self.tensors.extend(tensors);
        let images = self.get("mse").dims()[0];
        let latents = self.get("latents_mean").narrow(0, 0, images).unwrap();
        self.tensors.insert("latents_mean".to_owned(), latents);
        Self { model: assembled.path().to_owned(), _assembled: Some(assembled), ..self }
    }

    pub(crate) fn model(&self) -> DiffusionModel {
        DiffusionModel::load_with(&self.model, &options()).unwrap()
    }

    pub(crate) fn schedule(&self) -> NoiseSchedule {
        elbo_hub::model_config::schedule(&self.model).unwrap()
    }

    pub(crate) fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor stored `[.., C, H, W]`, as `[.., H, W, C]`.
    pub(crate) fn channels_last(&self, name: &str) -> Tensor {
        channels_last(self.get(name))
    }

    pub(crate) fn strings(&self, name: &str) -> Vec<String> {
        let strings = self.json[name].as_array();
        strings.into_iter().flatten().map(|s| s.as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn integers(&self, name: &str) -> Vec<u32> {
        let wide = self.get(name).to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1::<i64>().unwrap();
        wide.into_iter().map(|v| v as u32).collect()
    }

    /// The timesteps of the table of errors.
    pub(crate) fn timesteps(&self) -> Vec<u32> {
        if self.has("timesteps") {
            return self.integers("timesteps");
        }
        flat(self.get("sigmas")).iter().map(|sigma| (sigma * 1000.0).round() as u32).collect()
    }

    /// The conditions of the table of errors: its prompts and the empty one, or its classes and the null class.
    pub(crate) fn conditions(&self, model: &DiffusionModel) -> Conditions {
        let (texts, classes) = (self.strings("prompts"), self.strings("classes"));
        let labels: Vec<i32> = (0..classes.len() as i32).collect();
        if texts.is_empty() { model.label_conditions(&labels) } else { model.text_conditions(&texts) }.unwrap()
    }

    /// Pixels `[B, H, W, 3]` in [-1, 1].
    pub(crate) fn pixels(&self) -> Tensor {
        let pixels = self.get("images_u8").to_dtype(DType::F64).unwrap();
        let pixels = pixels.affine(2.0 / 255.0, -1.0).unwrap();
        let upscale = self.json["image_upscale"].as_u64().unwrap() as usize;
        let (b, h, w, c) = pixels.dims4().unwrap();
        let repeated = pixels.reshape((b, h, 1, w, 1, c)).unwrap();
        let repeated = repeated.broadcast_as((b, h, upscale, w, upscale, c)).unwrap().contiguous().unwrap();
        let pixels = repeated.reshape((b, h * upscale, w * upscale, c)).unwrap().to_dtype(DType::F32).unwrap();
        pixels.to_device(&device()).unwrap()
    }

    /// x_t of image `i` at timestep `k`, `[1, H, W, C]`.
    pub(crate) fn noisy(&self, schedule: &NoiseSchedule, i: usize, k: usize) -> Tensor {
        let mix = schedule.mix(self.timesteps()[k]);
        let part = |name: &str, at: usize, factor: f32| {
            (self.channels_last(name).narrow(0, at, 1).unwrap() * f64::from(factor)).unwrap()
        };
        (part("latents_mean", i, mix.signal) + part("noise", k, mix.noise)).unwrap().to_device(&device()).unwrap()
    }
}

/// The timesteps in the form that the network takes.
pub(crate) fn times(schedule: &NoiseSchedule, timesteps: &[u32]) -> Vec<f32> {
    timesteps.iter().map(|t| schedule.time(*t)).collect()
}
