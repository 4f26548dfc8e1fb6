//! Timestep embeddings, and a cache of values that depend only on the timestep.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use elbo_kernels::{Activation, Linear, activate};

use super::checkpoint::Params;
use super::error::ModelError;
use super::layers::linear;

/// The sinusoids of Vaswani et al. (2017) with diffusers' options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sinusoid {
    /// Number of values per embedding.
    pub(crate) width: usize,
    /// Whether cosines come before sines.
    pub(crate) flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the exponent.
    pub(crate) freq_shift: f64,
}

impl Sinusoid {
    /// The embeddings `[T, width]` of numbers, rounded to f32 in the same places as in diffusers'
    /// `get_timestep_embedding`.
    pub(crate) fn forward(self, numbers: &[f32], device: &Device, dtype: DType) -> Result<Tensor> {
        let mut values = Vec::with_capacity(numbers.len() * self.width);
        numbers.iter().for_each(|number| self.push(*number, &mut values));
        Tensor::from_vec(values, (numbers.len(), self.width), device)?.to_dtype(dtype)
    }

    fn push(self, number: f32, values: &mut Vec<f32>) {
        let half = self.width / 2;
        let angle = |i: usize| {
            let exponent = -(10_000f64.ln() as f32) * i as f32 / (half as f64 - self.freq_shift) as f32;
            number * f64::from(exponent).exp() as f32
        };
        let sines = |values: &mut Vec<f32>| values.extend((0..half).map(|i| f64::from(angle(i)).sin() as f32));
        let cosines = |values: &mut Vec<f32>| values.extend((0..half).map(|i| f64::from(angle(i)).cos() as f32));
        if self.flip_sin_to_cos {
            cosines(values);
            sines(values);
        } else {
            sines(values);
            cosines(values);
        }
        values.resize(values.len() + self.width % 2, 0.0);
    }
}

/// `linear_2(silu(linear_1(x)))`, which embeds sinusoids and pooled texts alike.
#[derive(Debug)]
pub(crate) struct EmbeddingMlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl EmbeddingMlp {
    pub(crate) fn load(p: &Params<'_>, inputs: usize, outputs: usize) -> std::result::Result<Self, ModelError> {
        Self::load_named(p, ["linear_1", "linear_2"], inputs, outputs)
    }

    pub(crate) fn load_named(
        p: &Params<'_>,
        names: [&str; 2],
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            linear_1: linear(&p.at(names[0]), inputs, outputs)?,
            linear_2: linear(&p.at(names[1]), outputs, outputs)?,
        })
    }

    /// Maps `x [N, in]` to `[N, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&activate(&self.linear_1.forward(x, None)?, Activation::Silu)?, None)
    }
}

/// Rows that depend only on the timestep, for a set of timesteps.
#[derive(Debug)]
pub struct TimeCache {
    /// Row of each timestep.
    rows: HashMap<u32, u32>,
    /// `[T, ..]` each; their meaning depends on the network.
    layers: Vec<Tensor>,
}

impl TimeCache {
    /// Each of the `layers` has one row per timestep.
    pub(crate) fn new(timesteps: &[u32], layers: Vec<Tensor>) -> Self {
        let rows = timesteps.iter().zip(0..).map(|(&t, row)| (t, row)).collect();
        Self { rows, layers }
    }

    /// The rows of timesteps.
    pub(crate) fn rows(&self, timesteps: &[u32]) -> Result<Vec<u32>> {
        let row = |t: &u32| match self.rows.get(t) {
            Some(&row) => Ok(row),
            None => bail!("timestep {t} is not in the cache"),
        };
        timesteps.iter().map(row).collect()
    }

    /// The rows of all layers.
    pub(crate) fn layers(&self) -> &[Tensor] {
        &self.layers
    }

    /// The rows `[T, ..]` of a layer.
    pub(crate) fn layer(&self, layer: usize) -> Result<&Tensor> {
        match self.layers.get(layer) {
            Some(layer) => Ok(layer),
            None => bail!("the time cache belongs to another model"),
        }
    }
}
