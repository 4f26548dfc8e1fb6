//! How to load a model: device, precision, and adapters to merge into its weights.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use elbo_core::job::ModelDtype;

use super::lora::Lora;

/// The types of a model's weights and of its arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Every weight is rounded to this type.
    pub weights: DType,
    /// The layers hold their weights and compute in this type.
    pub compute: DType,
}

impl Precision {
    /// Single precision throughout.
    pub const F32: Self = Self { weights: DType::F32, compute: DType::F32 };

    /// A job's element type on a device. The CPU kernels compute in f32, so on the CPU half precision only rounds the
    /// weights.
    pub fn on(device: &Device, dtype: ModelDtype) -> Self {
        let weights = match dtype {
            ModelDtype::F32 => DType::F32,
            ModelDtype::F16 => DType::F16,
            ModelDtype::Bf16 => DType::BF16,
        };
        Self { weights, compute: if device.is_cpu() { DType::F32 } else { weights } }
    }

    /// Rounds a weight and converts it to the layers' type.
    pub(crate) fn round(self, weight: &Tensor) -> candle_core::Result<Tensor> {
        weight.to_dtype(self.weights)?.to_dtype(self.compute)
    }
}

/// Where a model's weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightsFrom {
    /// The files next to its configuration.
    #[default]
    Files,
    /// A seed. Weights are drawn so that activations keep their scale. Measuring speed needs no other file.
    Seed(u64),
}

/// How to load a model. The default is the CPU, f32 and no adapters.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The device to run on.
    pub device: Device,
    /// Types of weights and arithmetic.
    pub precision: Precision,
    /// Adapters to merge into its weights, in this order.
    pub loras: Vec<Arc<Lora>>,
    /// The source of the weights.
    pub weights: WeightsFrom,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, precision: Precision::F32, loras: Vec::new(), weights: WeightsFrom::Files }
    }
}

impl LoadOptions {
    /// A model without adapters, on a device, in a job's element type.
    pub fn new(device: Device, dtype: ModelDtype) -> Self {
        Self { precision: Precision::on(&device, dtype), device, ..Self::default() }
    }
}
