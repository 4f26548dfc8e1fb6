//! Latents as sequences of patches, for transformers (Dosovitskiy et al., ICLR 2021).

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use elbo_kernels::{Linear, Rows};

use super::checkpoint::Params;
use super::error::ModelError;

/// A convolution over non-overlapping patches. On channels-last images it is a linear layer over a patch's values.
#[derive(Debug)]
pub(crate) struct PatchEmbed {
    size: usize,
    proj: Linear,
}

impl PatchEmbed {
    /// Loads the convolution `[D, C, p, p]`.
    pub(crate) fn load(
        p: &Params<'_>,
        size: usize,
        channels: usize,
        width: usize,
    ) -> std::result::Result<Self, ModelError> {
        let weight = p.get("weight", &[width, channels, size, size])?.permute((0, 2, 3, 1))?.contiguous()?;
        let weight = weight.reshape((width, size * size * channels))?;
        Ok(Self { size, proj: Linear::new(&weight, Some(&p.get("bias", &[width])?))? })
    }

    /// `x [P, H, W, C]` to `[P, L, D]`, with `positions [1, L, D]` added.
    pub(crate) fn forward(&self, x: &Tensor, positions: &Tensor) -> Result<Tensor> {
        let (images, height, width, channels) = x.dims4()?;
        let size = self.size;
        let x = x.reshape((images, height / size, size, width / size, size, channels))?;
        let x = x.permute((0, 1, 3, 2, 4, 5))?.contiguous()?;
        let x = x.reshape((images, height * width / size / size, size * size * channels))?;
        self.proj.forward(&x, Some(Rows::indexed(positions, &vec![0; images])))
    }
}

/// Position embeddings, cached for the last grid, since a job has only one.
#[derive(Debug, Default)]
pub(crate) struct Positions(Mutex<Option<((usize, usize), Tensor)>>);

impl Positions {
    /// The embeddings for a grid of this many rows and columns.
    pub(crate) fn of(&self, grid: (usize, usize), make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((known, positions)) if *known == grid => Ok(positions.clone()),
            _ => {
                let positions = make()?;
                *kept = Some((grid, positions.clone()));
                Ok(positions)
            }
        }
    }
}

/// `[B, L, p p C]` back to images `[B, H, W, C]`.
pub(crate) fn unpatchify(x: &Tensor, size: usize, height: usize, width: usize) -> Result<Tensor> {
    let (images, _, values) = x.dims3()?;
    let channels = values / size / size;
    let x = x.reshape((images, height / size, width / size, size, size, channels))?;
    x.permute((0, 1, 3, 2, 4, 5))?.contiguous()?.reshape((images, height, width, channels))
}

/// Sines and cosines of a grid's columns, then of its rows: `[1, rows columns, D]`.
///
/// As in diffusers' `get_2d_sincos_pos_embed`, a grid that differs from the training grid `base` is stretched to it.
pub(crate) fn grid_embedding(
    (rows, columns): (usize, usize),
    base: usize,
    scale: f64,
    width: usize,
    device: &Device,
    dtype: DType,
) -> Result<Tensor> {
    let quarter = width / 4;
    // One axis: the sines, then the cosines, of every position's angles.
    let axis = |count: usize| -> Vec<Vec<f32>> {
        let place = |i: usize| f64::from(i as f32 / (count as f32 / base as f32) / scale as f32);
        let angle = |i: usize, k: usize| place(i) * 10_000f64.powf(-(k as f64) / quarter as f64);
        let waves = |i: usize| {
            let sines = (0..quarter).map(move |k| angle(i, k).sin() as f32);
            sines.chain((0..quarter).map(move |k| angle(i, k).cos() as f32)).collect()
        };
        (0..count).map(waves).collect()
    };
    let (of_rows, of_columns) = (axis(rows), axis(columns));
    let mut values = Vec::with_capacity(rows * columns * width);
    for of_row in &of_rows {
        for of_column in &of_columns {
            values.extend_from_slice(of_column);
            values.extend_from_slice(of_row);
        }
    }
    Tensor::from_vec(values, (1, rows * columns, width), device)?.to_dtype(dtype)
}
