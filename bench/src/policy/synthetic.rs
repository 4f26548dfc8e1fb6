//! Draws errors of many classes from a model with the variances of real errors.
//!
//! The error of class `c` on a slot is `3 + u + b m_c + w z`. The slot's `u` (standard deviation 0.3) is the same for all
//! classes, `m_c` is the standing of the class, `z` is standard normal and independent, and `b` and `w` are as below. The
//! standing is standard normal for a wrong class and [`Model::ADVANTAGE`] lower for the right one. So even without noise, the
//! right class wins about as often as with Stable Diffusion 2.0 on ImageNet (61.4 %, Li et al. 2023). The noise of a
//! difference on one slot, `w sqrt(2)`, is [`Model::NOISE`] times the spread `b` of the standings: on digits-sd's errors the
//! ratio of the difference between a class and the best one to its standard deviation over slots is 1.5 between the timesteps
//! 390 and 480 (seed 0). The advantage over the average class has the same ratio.

use elbo_core::ensemble::Contenders;
use elbo_core::ids::PromptIndex;
use elbo_core::policy::Slot;
use elbo_core::policy::pilot::Scored;

use super::Errors;
use crate::random::mix;

/// The model that errors are drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Classes.
    pub classes: usize,
    /// Samples.
    pub samples: usize,
    /// Slots.
    pub slots: u32,
    /// Seed.
    pub seed: u64,
}

impl Model {
    /// The advantage of the right class over the average one, in standard deviations of standings.
    const ADVANTAGE: f64 = 3.5;
    /// The standard deviation of a difference on one slot, in standard deviations of standings.
    const NOISE: f64 = Self::ADVANTAGE / 1.5;
    /// Standard deviation of standings, in errors.
    const SPREAD: f64 = 0.003;

    /// Draws the errors.
    pub fn draw(&self) -> Errors {
        let mut state = self.seed;
        let noise = Self::NOISE * Self::SPREAD / std::f64::consts::SQRT_2;
        let mut truth = Vec::new();
        let mut errors = Vec::new();
        for _ in 0..self.samples {
            let right = (mix(&mut state) % self.classes.max(1) as u64) as usize;
            truth.push(Some(PromptIndex(right as u32)));
            let own: Vec<f64> = (0..self.slots).map(|_| 0.3 * normal(&mut state)).collect();
            let of_class = |class: usize| {
                let standing = normal(&mut state) - if class == right { Self::ADVANTAGE } else { 0.0 };
                let base = 3.0 + Self::SPREAD * standing;
                own.iter().map(|own| (base + own + noise * normal(&mut state)) as f32).collect()
            };
            errors.push((0..self.classes).map(of_class).collect());
        }
        let step = 1000 / self.slots.max(1);
        let slot = |i: u32| Slot { timestep: (step / 2 + i * step).min(999), noise: i };
        let scored = Scored { slots: (0..self.slots).map(slot).collect(), errors };
        Errors {
            title: format!("synthetic errors of {} classes, seed {}", self.classes, self.seed),
            scored,
            contenders: Contenders::prompts(self.classes),
            truth,
            timesteps: 1000,
        }
    }
}

/// Draws a standard normal number (Box and Muller, 1958).
fn normal(state: &mut u64) -> f64 {
    let uniform = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let (radius, angle) = (uniform(mix(state)), uniform(mix(state)));
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}
