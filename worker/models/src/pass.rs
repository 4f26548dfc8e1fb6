//! What a forward pass evaluates, common to all networks.

use candle_core::{Result, Tensor, bail};

use super::error::ModelError;
use super::timestep::TimeCache;

/// Points (noisy latents at timesteps) and evaluations (a point with a condition).
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Noisy latents x_t, one per point: `[P, H, W, C]`.
    pub latents: &'a Tensor,
    /// Each point's timestep, as a value (0 to 999) that the time cache holds: `P` of them.
    pub timesteps: &'a [u32],
    /// `B` pairs of point and condition (as indices), points ascending. A point's evaluations share its common work.
    pub evaluations: &'a [(u32, u32)],
}

/// A pass' evaluations as indices into what it shares.
#[derive(Debug)]
pub(crate) struct Indices {
    /// Per evaluation its point.
    pub(crate) points: Vec<u32>,
    /// Per evaluation its condition.
    pub(crate) conditions: Vec<u32>,
    /// Per point its row in the time cache.
    pub(crate) point_times: Vec<u32>,
    /// Per evaluation its row in the time cache.
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

    /// The evaluations' rows, `conditions` being how many conditions there are.
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
