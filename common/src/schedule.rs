//! The noise schedule: how much of a latent is left at each timestep.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// What the network's output means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise itself.
    Epsilon,
    /// `v = sqrt(abar) eps - sqrt(1 - abar) x0` (Salimans & Ho, 2022).
    VPrediction,
}

/// `scheduler_config.json` as diffusers writes it; the sampler's class is irrelevant.
#[derive(Clone, Debug, Deserialize)]
struct SchedulerConfig {
    #[serde(default = "default_timesteps")]
    num_train_timesteps: u32,
    #[serde(default = "default_beta_start")]
    beta_start: f32,
    #[serde(default = "default_beta_end")]
    beta_end: f32,
    #[serde(default = "default_beta_schedule")]
    beta_schedule: String,
    #[serde(default)]
    trained_betas: Option<Vec<f32>>,
    #[serde(default = "default_prediction")]
    prediction_type: String,
}

fn default_timesteps() -> u32 {
    1000
}
fn default_beta_start() -> f32 {
    1e-4
}
fn default_beta_end() -> f32 {
    0.02
}
fn default_beta_schedule() -> String {
    "linear".into()
}
fn default_prediction() -> String {
    "epsilon".into()
}

/// A scheduler configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The file can't be read.
    #[error("reading {path}: {source}; --model needs a directory in diffusers layout")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Not the JSON expected.
    #[error("scheduler_config.json can't be read: {0}")]
    Json(#[from] serde_json::Error),
    /// A setting this version does not know.
    #[error("scheduler_config.json: {key} '{value}' is not supported; supported: {supported}")]
    Unsupported {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would work.
        supported: &'static str,
    },
}

/// `alphas_cumprod` of every training timestep and the prediction type.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f32>,
    prediction: PredictionType,
}

/// `sqrt(abar)` and `sqrt(1 - abar)` of one timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Weight of the latent.
    pub signal: f32,
    /// Weight of the noise.
    pub noise: f32,
}

impl NoiseSchedule {
    /// Reads the schedule of a model directory in diffusers layout.
    pub fn of_model(directory: &Path) -> Result<Self, ScheduleError> {
        let path = directory.join("scheduler/scheduler_config.json");
        let json = std::fs::read_to_string(&path).map_err(|source| ScheduleError::Read { path, source })?;
        Self::from_json(&json)
    }

    /// Parses a diffusers `scheduler_config.json`.
    pub fn from_json(json: &str) -> Result<Self, ScheduleError> {
        let config: SchedulerConfig = serde_json::from_str(json)?;
        let prediction = match config.prediction_type.as_str() {
            "epsilon" => PredictionType::Epsilon,
            "v_prediction" => PredictionType::VPrediction,
            _ => {
                return Err(ScheduleError::Unsupported {
                    key: "prediction_type",
                    value: config.prediction_type,
                    supported: "epsilon, v_prediction",
                });
            }
        };
        let (n, start, end) = (config.num_train_timesteps, config.beta_start, config.beta_end);
        let betas = match (config.trained_betas, config.beta_schedule.as_str()) {
            (Some(betas), _) => betas,
            (None, "linear") => linspace(start, end, n),
            (None, "scaled_linear") => linspace(start.sqrt(), end.sqrt(), n).into_iter().map(|b| b * b).collect(),
            (None, _) => {
                return Err(ScheduleError::Unsupported {
                    key: "beta_schedule",
                    value: config.beta_schedule,
                    supported: "linear, scaled_linear, trained_betas",
                });
            }
        };
        let mut product = 1.0f32;
        let alphas_cumprod = betas
            .into_iter()
            .map(|beta| {
                product *= 1.0 - beta;
                product
            })
            .collect();
        Ok(Self { alphas_cumprod, prediction })
    }

    /// Training timesteps.
    pub fn timesteps(&self) -> u32 {
        self.alphas_cumprod.len() as u32
    }

    /// `abar` of every timestep.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// What the network's output means.
    pub fn prediction(&self) -> PredictionType {
        self.prediction
    }

    /// The weights of latent and noise at timestep `t`; `t` must be below [`NoiseSchedule::timesteps`].
    pub fn mix(&self, t: u32) -> Mix {
        let abar = self.alphas_cumprod[t as usize];
        Mix { signal: abar.sqrt(), noise: (1.0 - abar).sqrt() }
    }
}

impl Mix {
    /// `x_t = sqrt(abar) x0 + sqrt(1 - abar) eps` into `out`.
    pub fn add_noise(self, latent: &[f32], epsilon: &[f32], out: &mut [f32]) {
        for ((out, x0), eps) in out.iter_mut().zip(latent).zip(epsilon) {
            *out = self.signal * x0 + self.noise * eps;
        }
    }

    /// The predicted noise in place of the network's `output`, given the noisy latent `x_t`.
    pub fn epsilon(self, prediction: PredictionType, x_t: &[f32], output: &mut [f32]) {
        match prediction {
            PredictionType::Epsilon => {}
            PredictionType::VPrediction => {
                for (v, x) in output.iter_mut().zip(x_t) {
                    *v = self.signal * *v + self.noise * x;
                }
            }
        }
    }
}

/// `torch.linspace` in f32: symmetric about the middle.
fn linspace(start: f32, end: f32, n: u32) -> Vec<f32> {
    if n == 1 {
        return vec![start];
    }
    let step = (end - start) / (n - 1) as f32;
    (0..n).map(|i| if i < n / 2 { start + step * i as f32 } else { end - step * (n - 1 - i) as f32 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_settings_are_named() {
        let error = |json| NoiseSchedule::from_json(json).unwrap_err().to_string();
        assert!(error(r#"{"prediction_type": "sample"}"#).contains("prediction_type 'sample'"));
        assert!(error(r#"{"beta_schedule": "sigmoid"}"#).contains("beta_schedule 'sigmoid'"));
        assert!(error("{").contains("scheduler_config.json"));
    }

    #[test]
    fn v_prediction_recovers_the_noise() {
        let schedule = NoiseSchedule::from_json(r#"{"prediction_type": "v_prediction"}"#).unwrap();
        let mix = schedule.mix(500);
        let (x0, eps) = ([0.7f32, -1.2], [0.3f32, 2.0]);
        let mut x_t = [0.0; 2];
        mix.add_noise(&x0, &eps, &mut x_t);
        let mut v = [0, 1].map(|i| mix.signal * eps[i] - mix.noise * x0[i]);
        mix.epsilon(schedule.prediction(), &x_t, &mut v);
        assert!(v.iter().zip(eps).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
