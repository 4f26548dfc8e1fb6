//! The input of a forward pass, common to all networks.

use candle_core::{Result, Tensor, bail};

use super::error::ModelError;
use super::timestep::TimeCache;

/// Points (noisy latents at timesteps) and evaluations (a point with a condition).
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Noisy latents x_t, one per point: `[P, H, W, C]`.
    pub latents: &'a Tensor,
    /// The `P` timesteps of the points, as values (0 to 999) that the time cache contains.
    pub timesteps: &'a [u32],
    /// `B` index pairs of point and condition, in ascending order of points. A point's evaluations share common work.
    pub evaluations: &'a [(u32, u32)],
}

/// A pass's evaluations as indices of points, conditions and cached timesteps.
#[derive(Debug)]
pub(crate) struct Indices {
    /// The point of each evaluation.
    pub(crate) points: Vec<u32>,
    /// The condition of each evaluation.
    pub(crate) conditions: Vec<u32>,
    /// The row in the time cache of each point.
    pub(crate) point_times: Vec<u32>,
    /// The row in the time cache of each evaluation.
    pub(crate) times: Vec<u32>,
}

impl Pass<'_> {
    /// Checks that the latents divide into squares of `multiple` pixels a side, one per timestep.
    pub(crate) fn check(&self, multiple: usize) -> std::result::Result<(usize, usize), ModelError> {
        let (points, height, width, _) = self.latents.dims4()?;
        if points != self.timesteps.len() {
            return Err(ModelError::Input(format!("{points} points with {} timesteps", self.timesteps.len())));
        }
        if !height.is_multiple_of(multiple) || !width.is_multiple_of(multiple) {
            let message = format!("latents of {height}x{width} pixels, whose sides are not multiples of {multiple}");
            return Err(ModelError::Input(message));
        }
        Ok((height, width))
    }

    /// The evaluations' indices; `conditions` is the number of conditions.
    pub(crate) fn indices(&self, times: &TimeCache, conditions: usize) -> Result<Indices> {
        let point_times = times.rows(self.timesteps)?;
        let count = self.evaluations.len();
        let mut indices = Indices {
            points: Vec::with_capacity(count),
            conditions: Vec::with_capacity(count),
            times: Vec::with_capacity(count),
            point_times,
        };
        for &(point, condition) in self.evaluations {
            let Some(&time) = indices.point_times.get(point as usize) else {
                bail!("an evaluation of point {point} among {}", self.timesteps.len());
            };
            if condition as usize >= conditions {
                bail!("an evaluation with condition {condition} among {conditions}");
            }
            indices.points.push(point);
            indices.conditions.push(condition);
            indices.times.push(time);
        }
        Ok(indices)
    }
}
