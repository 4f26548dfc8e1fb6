//! The noise schedule: how much of a latent is left at each timestep.

mod config;

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use self::config::Config;
use crate::python_json::JsonError;

/// What the network's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise itself.
    Epsilon,
    /// `v = sqrt(abar) eps - sqrt(1 - abar) x0` (Salimans & Ho, 2022).
    VPrediction,
    /// `v = eps - x0` of a straight path from latent to noise (Liu et al., 2023; Esser et al., 2024).
    Flow,
}

/// A scheduler configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The file can't be read.
    #[error("reading {path}: {source}; a model is a directory in diffusers layout")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file is not the expected JSON.
    #[error("scheduler_config.json can't be read: {0}")]
    Json(#[from] JsonError),
    /// A setting that this version does not support.
    #[error("scheduler_config.json: {key} '{value}' is not supported; supported: {supported}")]
    Unsupported {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// The supported values.
        supported: String,
    },
    /// Two files disagree about the kind of schedule.
    #[error(
        "scheduler_config.json is of the class '{configured}', and model_index.json names the scheduler '{indexed}', which is \
         another kind: make both name the class that the model was trained for"
    )]
    Classes {
        /// The class in `scheduler_config.json`.
        configured: String,
        /// The class in `model_index.json`.
        indexed: String,
    },
    /// Neither file names a class.
    #[error(
        "neither scheduler_config.json nor model_index.json names the scheduler's class: add \"_class_name\" to the former"
    )]
    NoClass,
    /// The shift is not a positive number.
    #[error("a timestep shift of {0} is not a positive number")]
    Shift(f32),
    /// A shift for a schedule that has none.
    #[error("a timestep shift is for flow matching models like Stable Diffusion 3: leave it out")]
    NoFlow,
}

/// How latents become noise over the training timesteps, and what the network predicts.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    process: Process,
    prediction: PredictionType,
    /// A description of the configuration it came from.
    origin: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Process {
    /// `x_t = sqrt(abar) x0 + sqrt(1 - abar) eps`.
    Diffusion { alphas_cumprod: Vec<f32> },
    /// `z_t = (1 - sigma) x0 + sigma eps`, with `sigma = shift s / (1 + (shift - 1) s)` for `s = t / timesteps`.
    Flow { timesteps: u32, shift: f32 },
}

/// The weights of latent and noise at one timestep: `sqrt(abar)` and `sqrt(1 - abar)`, or `1 - sigma` and `sigma`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Weight of the latent.
    pub signal: f32,
    /// Weight of the noise.
    pub noise: f32,
}

impl NoiseSchedule {
    /// The schedule of a model with this `scheduler_config.json` and `model_index.json`. Both may name the scheduler's class.
    pub fn of_configs(config: &str, index: Option<&[u8]>) -> Result<Self, ScheduleError> {
        Config::parse(config)?.of_index(index)?.schedule()
    }

    /// Parses a diffusers `scheduler_config.json`. If it names no class, DDPMScheduler is assumed.
    pub fn from_json(json: &str) -> Result<Self, ScheduleError> {
        Config::parse(json)?.schedule()
    }

    /// Shifts the timesteps of flow matching towards the noise. An error for other schedules, which have no such shift.
    pub fn with_shift(mut self, shift: f32) -> Result<Self, ScheduleError> {
        match &mut self.process {
            Process::Flow { shift: own, .. } if shift.is_finite() && shift > 0.0 => *own = shift,
            Process::Flow { .. } => return Err(ScheduleError::Shift(shift)),
            Process::Diffusion { .. } => return Err(ScheduleError::NoFlow),
        }
        Ok(self)
    }

    /// Number of training timesteps.
    pub fn timesteps(&self) -> u32 {
        match &self.process {
            Process::Diffusion { alphas_cumprod } => alphas_cumprod.len() as u32,
            Process::Flow { timesteps, .. } => *timesteps,
        }
    }

    /// `abar` of every timestep; empty for flow matching.
    pub fn alphas_cumprod(&self) -> &[f32] {
        match &self.process {
            Process::Diffusion { alphas_cumprod } => alphas_cumprod,
            Process::Flow { .. } => &[],
        }
    }

    /// Whether the latent vanishes entirely at some timestep (zero terminal SNR; Lin et al., WACV 2024). A prediction of noise
    /// there says nothing about the image: its errors are nearly the same for all classes, and the latent can't be computed
    /// from it.
    pub fn loses_all_signal(&self) -> bool {
        self.alphas_cumprod().contains(&0.0)
    }

    /// What the network's output means.
    pub fn prediction(&self) -> PredictionType {
        self.prediction
    }

    /// The weights of latent and noise at timestep `t`; `t` must be below [`NoiseSchedule::timesteps`].
    pub fn mix(&self, t: u32) -> Mix {
        match &self.process {
            Process::Diffusion { alphas_cumprod } => {
                let abar = alphas_cumprod[t as usize];
                Mix { signal: abar.sqrt(), noise: (1.0 - abar).sqrt() }
            }
            Process::Flow { timesteps, shift } => {
                let sigma = shifted(t, *timesteps, *shift);
                Mix { signal: 1.0 - sigma, noise: sigma }
            }
        }
    }

    /// Timestep `t` in the form the network takes: a whole number for diffusion, `sigma` times the timesteps for flow matching.
    pub fn time(&self, t: u32) -> f32 {
        match &self.process {
            Process::Diffusion { .. } => t as f32,
            Process::Flow { timesteps, shift } => shifted(t, *timesteps, *shift) * *timesteps as f32,
        }
    }
}

/// `shift s / (1 + (shift - 1) s)` for `s = t / timesteps`.
fn shifted(t: u32, timesteps: u32, shift: f32) -> f32 {
    let s = f64::from(t) / f64::from(timesteps);
    let shift = f64::from(shift);
    (shift * s / (1.0 + (shift - 1.0) * s)) as f32
}

impl fmt::Display for NoiseSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Process::Diffusion { alphas_cumprod } => {
                let end = alphas_cumprod.last().copied().unwrap_or(1.0);
                write!(f, "{} timesteps, signal down to {:.4} ({})", alphas_cumprod.len(), end.sqrt(), self.origin)
            }
            Process::Flow { timesteps, .. } => write!(f, "{timesteps} timesteps of flow matching ({})", self.origin),
        }
    }
}

impl fmt::Display for PredictionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Epsilon => "epsilon",
            Self::VPrediction => "v_prediction",
            Self::Flow => "flow",
        })
    }
}

impl Mix {
    /// Writes the noisy latent `signal x0 + noise eps` into `out`.
    pub fn add_noise(self, latent: &[f32], epsilon: &[f32], out: &mut [f32]) {
        for ((out, x0), eps) in out.iter_mut().zip(latent).zip(epsilon) {
            *out = self.signal * x0 + self.noise * eps;
        }
    }

    /// Converts the network's `output` to the quantity that is scored, given the noisy latent `x_t`: noise, or velocity for
    /// flow matching (see [`PredictionType::target`]).
    pub fn predicted(self, prediction: PredictionType, x_t: &[f32], output: &mut [f32]) {
        if let Some([of_output, of_noisy]) = self.weights(prediction) {
            for (v, x) in output.iter_mut().zip(x_t) {
                *v = of_output * *v + of_noisy * x;
            }
        }
    }

    /// The weights of the output and the noisy latent in the prediction; `None` if the output is the prediction.
    pub fn weights(self, prediction: PredictionType) -> Option<[f32; 2]> {
        match prediction {
            PredictionType::Epsilon | PredictionType::Flow => None,
            PredictionType::VPrediction => Some([self.signal, self.noise]),
        }
    }
}

impl PredictionType {
    /// The target of a prediction: the noise, or the velocity `eps - x0`.
    pub fn target(self, latent: &[f32], epsilon: &[f32], out: &mut [f32]) {
        match self {
            Self::Epsilon | Self::VPrediction => out.copy_from_slice(epsilon),
            Self::Flow => out.iter_mut().zip(latent).zip(epsilon).for_each(|((out, x0), eps)| *out = eps - x0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v_prediction_recovers_the_noise() {
        let schedule = NoiseSchedule::from_json(r#"{"prediction_type": "v_prediction"}"#).unwrap();
        let mix = schedule.mix(500);
        let (x0, eps) = ([0.7f32, -1.2], [0.3f32, 2.0]);
        let mut x_t = [0.0; 2];
        mix.add_noise(&x0, &eps, &mut x_t);
        let mut v = [0, 1].map(|i| mix.signal * eps[i] - mix.noise * x0[i]);
        mix.predicted(schedule.prediction(), &x_t, &mut v);
        assert!(v.iter().zip(eps).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn flow_matching_is_a_straight_path() {
        let schedule = NoiseSchedule::from_json(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#);
        let schedule = schedule.unwrap();
        assert_eq!(schedule.mix(250), Mix { signal: 0.75, noise: 0.25 });
        assert_eq!((schedule.time(250), schedule.timesteps()), (250.0, 1000));
        let shifted = schedule.with_shift(3.0).unwrap();
        assert_eq!((shifted.mix(250).noise, shifted.time(250)), (0.5, 500.0));
        let mut target = [0.0; 2];
        shifted.prediction().target(&[0.5, -1.0], &[2.0, 1.0], &mut target);
        assert_eq!(target, [1.5, 2.0]);
        assert!(shifted.with_shift(0.0).is_err());
        assert!(NoiseSchedule::from_json("{}").unwrap().with_shift(3.0).is_err());
    }
}
