//! How a model is loaded: where it computes, how precisely, and what is merged into its weights.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use elbo_core::job::ModelDtype;

use super::lora::Lora;

/// The types of a model's weights and of its arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// What every weight is rounded to.
    pub weights: DType,
    /// What the layers hold and compute in.
    pub compute: DType,
}

impl Precision {
    /// Single precision throughout.
    pub const F32: Self = Self { weights: DType::F32, compute: DType::F32 };

    /// A job's element type on a device. The CPU's kernels are f32: there, half precision rounds the weights alone.
    pub fn on(device: &Device, dtype: ModelDtype) -> Self {
        let weights = match dtype {
            ModelDtype::F32 => DType::F32,
            ModelDtype::F16 => DType::F16,
            ModelDtype::Bf16 => DType::BF16,
        };
        Self { weights, compute: if device.is_cpu() { DType::F32 } else { weights } }
    }

    /// A weight as layers hold it.
    pub(crate) fn round(self, weight: &Tensor) -> candle_core::Result<Tensor> {
        weight.to_dtype(self.weights)?.to_dtype(self.compute)
    }
}

/// Where a model's weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightsFrom {
    /// The files beside its configuration.
    #[default]
    Files,
    /// A seed: they are drawn such that activations keep their scale. To measure speed no other file is needed.
    Seed(u64),
}

/// How a model is loaded. By default for the CPU, in f32, as it is stored.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where it computes.
    pub device: Device,
    /// How precisely.
    pub precision: Precision,
    /// What is merged into its weights, in this order.
    pub loras: Vec<Arc<Lora>>,
    /// Where the weights come from.
    pub weights: WeightsFrom,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, precision: Precision::F32, loras: Vec::new(), weights: WeightsFrom::Files }
    }
}

impl LoadOptions {
    /// A model as it is stored, on a device, in a job's element type.
    pub fn new(device: Device, dtype: ModelDtype) -> Self {
        Self { precision: Precision::on(&device, dtype), device, ..Self::default() }
    }
}
