//! The error of one evaluation, computed from the network's output for a noisy latent.

use crate::loss::{Distance, Loss};
use crate::schedule::{NoiseSchedule, PredictionType};

/// One noisy latent and its parts, all in the same order of elements.
#[derive(Clone, Copy, Debug)]
pub struct Point<'a> {
    /// The scaled latent `x0`.
    pub latent: &'a [f32],
    /// The noise `eps`.
    pub noise: &'a [f32],
    /// The noisy latent `x_t`.
    pub noisy: &'a [f32],
    /// The timestep.
    pub timestep: u32,
}

/// A loss that does not work with a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// The bound needs a diffusion process whose variance the network learned.
    #[error("the loss {0} needs a model that predicts noise and learned its variance, like DiT: use l2 or l1")]
    NoVariance(Loss),
    /// The bound compares means of latents, which predicted noise does not determine without a signal.
    #[error(
        "the loss {0} needs some of the image at every timestep, and this schedule's last has none (rescale_betas_zero_snr in \
         scheduler_config.json): use l2 or l1"
    )]
    NoSignal(Loss),
}

/// Turns a network's outputs into errors.
#[derive(Clone, Debug)]
pub struct Scorer {
    schedule: NoiseSchedule,
    loss: Loss,
    /// Channels of a latent.
    channels: usize,
    /// Whether the output of each pixel holds a variance after the prediction.
    learned_variance: bool,
}

impl Scorer {
    /// A scorer for outputs with as many channels as latents, or twice as many if the variance is learned.
    pub fn new(
        schedule: NoiseSchedule,
        loss: Loss,
        channels: usize,
        learned_variance: bool,
    ) -> Result<Self, ScoreError> {
        if loss.needs_variance() && (!learned_variance || schedule.prediction() != PredictionType::Epsilon) {
            return Err(ScoreError::NoVariance(loss));
        }
        if loss.needs_variance() && schedule.loses_all_signal() {
            return Err(ScoreError::NoSignal(loss));
        }
        Ok(Self { schedule, loss, channels, learned_variance })
    }

    /// The noise schedule of the model.
    pub fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }

    /// The distance, if the loss has no other part.
    pub fn distance(&self) -> Option<Distance> {
        self.loss.distance().filter(|_| !self.loss.needs_variance())
    }

    /// The weights of the output and the noisy latent in the prediction at a timestep.
    pub fn weights(&self, timestep: u32) -> [f32; 2] {
        self.schedule.mix(timestep).weights(self.schedule.prediction()).unwrap_or([1.0, 0.0])
    }

    /// Writes the target of a prediction into `out`.
    pub fn target(&self, latent: &[f32], noise: &[f32], out: &mut [f32]) {
        self.schedule.prediction().target(latent, noise, out);
    }

    /// The error of one evaluation. `output` holds its pixels, channels last, and is overwritten.
    pub fn error(&self, point: Point<'_>, output: &mut [f32]) -> f32 {
        let mut variance = Vec::new();
        let mut predicted = Vec::new();
        let predicted = if self.learned_variance {
            for pixel in output.chunks_exact(2 * self.channels) {
                let (mean, range) = pixel.split_at(self.channels);
                predicted.extend_from_slice(mean);
                variance.extend_from_slice(range);
            }
            &mut predicted[..]
        } else {
            output
        };
        let prediction = self.schedule.prediction();
        self.schedule.mix(point.timestep).predicted(prediction, point.noisy, predicted);
        let mut target = vec![0.0; point.noise.len()];
        self.target(point.latent, point.noise, &mut target);
        let distance = self.loss.distance().map_or(0.0, |distance| distance.mean(predicted, &target));
        let bound = if self.loss.needs_variance() {
            variational_bound(self.schedule.alphas_cumprod(), point, predicted, &variance)
        } else {
            0.0
        };
        (distance + bound) as f32
    }
}

/// The KL divergence between the true and the predicted posterior of `x_{t-1}`, in bits per dimension (Nichol & Dhariwal, ICML
/// 2021, equations 4 and 15). The logarithm of the variance is interpolated between the posterior's and beta's, with `variance`
/// in [-1, 1].
fn variational_bound(alphas_cumprod: &[f32], point: Point<'_>, predicted: &[f32], variance: &[f32]) -> f64 {
    let at = |t: usize| f64::from(alphas_cumprod[t]);
    let t = point.timestep as usize;
    let (abar, before) = (at(t), if t == 0 { 1.0 } else { at(t - 1) });
    let beta = 1.0 - abar / before;
    let posterior = |abar: f64, before: f64| (1.0 - abar / before) * (1.0 - before) / (1.0 - abar);
    // At t = 0 the posterior has no variance, so that of t = 1 is used, as in the reference.
    let true_log = if t == 0 { posterior(at(1), at(0)) } else { posterior(abar, before) }.ln();
    // The means differ only through x0, and the predicted x0 differs from the true one by the error of the noise.
    let per_noise = beta * before.sqrt() / (1.0 - abar) * (1.0 / abar - 1.0).sqrt();
    let terms = point.noise.iter().zip(predicted).zip(variance).map(|((noise, predicted), range)| {
        let fraction = f64::from((range + 1.0) / 2.0);
        let log = fraction * beta.ln() + (1.0 - fraction) * true_log;
        let difference = per_noise * f64::from(predicted - noise);
        0.5 * (log - true_log - 1.0 + (true_log - log).exp() + difference * difference * (-log).exp())
    });
    (terms.sum::<f64>() / predicted.len().max(1) as f64 / std::f64::consts::LN_2).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_needs_a_learned_variance() {
        let schedule = NoiseSchedule::from_json("{}").unwrap();
        assert!(Scorer::new(schedule.clone(), Loss::Vlb, 4, false).is_err());
        let flow = NoiseSchedule::from_json(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#).unwrap();
        assert!(Scorer::new(flow, Loss::L2Vlb, 4, true).is_err());
        assert!(Scorer::new(schedule, Loss::Vlb, 4, true).is_ok());
    }

    #[test]
    fn a_bound_needs_a_signal_at_every_timestep() {
        let schedule = NoiseSchedule::from_json(r#"{"rescale_betas_zero_snr": true}"#).unwrap();
        let refused = Scorer::new(schedule.clone(), Loss::Vlb, 1, true).unwrap_err();
        assert_eq!(refused, ScoreError::NoSignal(Loss::Vlb));
        // Without the bound, no signal is needed.
        let point = Point { latent: &[0.3], noise: &[1.0], noisy: &[1.0], timestep: 999 };
        assert_eq!(Scorer::new(schedule, Loss::L2, 1, false).unwrap().error(point, &mut [1.5]), 0.25);
    }

    #[test]
    fn the_bound_of_a_perfect_prediction_is_zero() {
        let schedule = NoiseSchedule::from_json("{}").unwrap();
        let (latent, noise) = ([0.3f32, -0.8], [1.0f32, 0.2]);
        let point = Point { latent: &latent, noise: &noise, noisy: &[0.0; 2], timestep: 500 };
        let scorer = Scorer::new(schedule, Loss::Vlb, 1, true).unwrap();
        // Two pixels of (noise, variance): -1 is the posterior's own variance.
        let perfect = scorer.error(point, &mut [1.0, -1.0, 0.2, -1.0]);
        assert!(perfect < 1e-12, "{perfect}");
        assert!(scorer.error(point, &mut [1.5, -1.0, 0.2, -1.0]) > 1e-5);
        assert!(scorer.error(point, &mut [1.0, 1.0, 0.2, 1.0]) > 1e-9);
    }
}
