//! Reads a model directory in diffusers' layout: JSON configurations and safetensors weights.
//!
//! A component's weights are one file, or several shards with an index, in one of several variants. Files are mapped,
//! not read, and every tensor is converted when a layer takes it. So host memory holds one weight at a time besides the
//! layers, and an error names the file and the key.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::drawn::drawn;
use super::error::ModelError;
use super::file::WeightsFile;
use super::lora::Lora;
use super::names::{Naming, as_stored};
use super::options::{LoadOptions, Precision, WeightsFrom};
use super::stored::StoredWeights;

/// The weights of one component.
#[derive(Debug)]
pub struct Weights {
    stored: StoredWeights,
    /// The directory's name, which adapters use as the component's name.
    component: String,
    loras: Vec<Arc<Lora>>,
    device: Device,
    precision: Precision,
    from: WeightsFrom,
}

impl Weights {
    /// Opens the weights `<stem>[.<variant>].safetensors` or their shards in `dir`. Layers get them as `options` say.
    pub fn open(dir: &Path, stem: &str, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::open_named(dir, stem, as_stored, options)
    }

    /// Like [`Weights::open`], for weights that had other names in some versions.
    pub(crate) fn open_named(
        dir: &Path,
        stem: &str,
        naming: Naming,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        let stored = match options.weights {
            WeightsFrom::Files => StoredWeights::open(dir, stem, naming)?,
            WeightsFrom::Seed(_) => StoredWeights::none(naming),
        };
        let component = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if options.weights == WeightsFrom::Files {
            for lora in &options.loras {
                lora.check(&component, |key| stored.shape(key))?;
            }
        }
        Ok(Self {
            stored,
            component,
            loras: options.loras.clone(),
            device: options.device.clone(),
            precision: options.precision,
            from: options.weights,
        })
    }

    /// Name, shape and stored type of every weight, in no order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &[usize], String)> {
        self.stored.entries()
    }

    /// The weights whose names start with `name.`.
    pub fn at(&self, name: &str) -> Params<'_> {
        Params { weights: self, prefix: name.to_owned() }
    }

    /// A weight with every adapter's change, rounded and placed for the layers.
    fn take(&self, key: &str, stored: &Tensor, shape: &[usize]) -> Result<Tensor, ModelError> {
        let mut weight = stored.reshape(shape)?;
        for lora in &self.loras {
            if let Some(change) = lora.change(&self.component, key)? {
                weight = (weight.to_dtype(DType::F32)? + change.reshape(shape)?)?;
            }
        }
        self.held(&weight)
    }

    /// Rounds a weight and places it on the layers' device.
    fn held(&self, weight: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.precision.round(weight)?.to_device(&self.device)?)
    }
}

/// A component's weights below a prefix, such as `down_blocks.0.resnets.1`.
#[derive(Clone, Debug)]
pub struct Params<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Params<'_> {
    /// The weights one level below.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: self.name(name) }
    }

    /// The layers' device.
    pub(crate) fn device(&self) -> &Device {
        &self.weights.device
    }

    /// The type of the layers' weights.
    pub(crate) fn dtype(&self) -> DType {
        self.weights.precision.compute
    }

    /// Whether a weight of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.weights.stored.shape(&self.name(name)).is_some()
    }

    /// The weight `name` of the given shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        self.get_any(name, &[shape])
    }

    /// The weight `name`, stored in one of several shapes; returned in the first of them.
    pub fn get_any(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor, ModelError> {
        let shape = shapes.first().copied().unwrap_or_default();
        if let WeightsFrom::Seed(seed) = self.weights.from {
            return self.weights.held(&drawn(seed, &self.name(name), shape)?);
        }
        let (file, stored) = self.find(name, shapes)?;
        self.weights.take(&self.name(name), &file.tensor(stored)?, shape)
    }

    /// The single value `name`, not rounded to the layers' type.
    pub(crate) fn scalar(&self, name: &str) -> Result<f32, ModelError> {
        let (file, stored) = self.find(name, &[&[], &[1]])?;
        Ok(file.tensor(stored)?.reshape(())?.to_dtype(DType::F32)?.to_scalar()?)
    }

    /// The file a weight is in, and its name there.
    fn find(&self, name: &str, shapes: &[&[usize]]) -> Result<(&WeightsFile, &str), ModelError> {
        let (weights, key) = (self.weights, self.name(name));
        let Some((file, stored)) = weights.stored.find(&key) else {
            let path = weights.stored.path();
            return Err(ModelError::MissingKey { path, key });
        };
        let found = file.shape(stored).unwrap_or_default();
        if !shapes.contains(&found) {
            let expected = shapes.first().copied().unwrap_or_default().to_vec();
            let (path, key, found) = (file.path().to_owned(), stored.to_owned(), found.to_vec());
            return Err(ModelError::WrongShape { path, key, expected, found });
        }
        Ok((file, stored))
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}
