//! diffusers' `scheduler_config.json`: what its classes and settings say about how a model was trained.
//!
//! Most settings only affect sampling: which timesteps are visited (`timestep_spacing`, `steps_offset`, `use_karras_sigmas`,
//! `sigma_min`, flow matching's `shift` and `use_dynamic_shifting`), and how a step is made (`clip_sample`, `thresholding`,
//! `solver_order`, `set_alpha_to_one`, `variance_type`). They have no effect here, because the policy chooses the timesteps.
//! The settings read below change the noise at a timestep, or the network's input or output there.

use std::f64::consts::FRAC_PI_2;

use serde::Deserialize;

use super::{NoiseSchedule, PredictionType, Process, ScheduleError};
use crate::python_json;

/// The most timesteps a schedule may have.
const MOST_TIMESTEPS: u32 = 100_000;

/// What some samplers of diffusers use instead of a last `abar` of zero, to keep their first sigma finite.
const SMALLEST_SIGNAL: f32 = 1.0 / (1 << 24) as f32;

/// The largest beta of schedules that are defined by a function for `abar`.
const LARGEST_BETA: f64 = 0.999;

/// The relevant settings, as written; absent and `null` mean the class's default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    #[serde(rename = "_class_name")]
    class: Option<String>,
    num_train_timesteps: Option<u32>,
    beta_start: Option<f64>,
    beta_end: Option<f64>,
    beta_schedule: Option<String>,
    trained_betas: Option<Vec<f64>>,
    prediction_type: Option<String>,
    rescale_betas_zero_snr: Option<bool>,
    use_flow_sigmas: Option<bool>,
    timestep_type: Option<String>,
    invert_sigmas: Option<bool>,
}

/// The kind of noise that a scheduler adds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Defined by betas.
    Betas(Betas),
    /// A straight path from latent to noise.
    Flow,
}

/// How schedulers with betas differ.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Betas {
    start: f64,
    end: f64,
    schedule: &'static str,
    /// A `beta_schedule` that only this class supports.
    own: Option<&'static str>,
    /// Whether it keeps a little signal at the last timestep of a schedule with zero terminal SNR.
    keeps_signal: bool,
    /// Whether it supports `use_flow_sigmas`.
    has_flow: bool,
}

/// The defaults of most classes (Ho et al., 2020).
const DDPM: Betas =
    Betas { start: 1e-4, end: 0.02, schedule: "linear", own: None, keeps_signal: false, has_flow: false };

/// The second most common defaults.
const K_DIFFUSION: Betas = Betas { start: 0.00085, end: 0.012, ..DDPM };

/// The defaults of classes for distilled latent diffusion models.
const DISTILLED: Betas = Betas { schedule: "scaled_linear", ..K_DIFFUSION };

const CLASSES: [(&str, Kind); 24] = [
    ("DDPMScheduler", Kind::Betas(Betas { own: Some("sigmoid"), ..DDPM })),
    ("DDPMParallelScheduler", Kind::Betas(Betas { own: Some("sigmoid"), ..DDPM })),
    ("DDIMScheduler", Kind::Betas(DDPM)),
    ("DDIMParallelScheduler", Kind::Betas(DDPM)),
    ("DDIMInverseScheduler", Kind::Betas(DDPM)),
    ("PNDMScheduler", Kind::Betas(DDPM)),
    ("LMSDiscreteScheduler", Kind::Betas(DDPM)),
    ("EulerDiscreteScheduler", Kind::Betas(Betas { keeps_signal: true, ..DDPM })),
    ("EulerAncestralDiscreteScheduler", Kind::Betas(Betas { keeps_signal: true, ..DDPM })),
    ("HeunDiscreteScheduler", Kind::Betas(Betas { own: Some("exp"), ..K_DIFFUSION })),
    ("DPMSolverMultistepScheduler", Kind::Betas(Betas { keeps_signal: true, has_flow: true, ..DDPM })),
    ("DPMSolverMultistepInverseScheduler", Kind::Betas(Betas { has_flow: true, ..DDPM })),
    ("DPMSolverSinglestepScheduler", Kind::Betas(Betas { has_flow: true, ..DDPM })),
    ("UniPCMultistepScheduler", Kind::Betas(Betas { keeps_signal: true, has_flow: true, ..DDPM })),
    ("DEISMultistepScheduler", Kind::Betas(Betas { has_flow: true, ..DDPM })),
    ("SASolverScheduler", Kind::Betas(Betas { has_flow: true, ..DDPM })),
    ("DPMSolverSDEScheduler", Kind::Betas(K_DIFFUSION)),
    ("KDPM2DiscreteScheduler", Kind::Betas(K_DIFFUSION)),
    ("KDPM2AncestralDiscreteScheduler", Kind::Betas(K_DIFFUSION)),
    ("LCMScheduler", Kind::Betas(DISTILLED)),
    ("TCDScheduler", Kind::Betas(DISTILLED)),
    ("FlowMatchEulerDiscreteScheduler", Kind::Flow),
    ("FlowMatchHeunDiscreteScheduler", Kind::Flow),
    ("FlowMatchLCMScheduler", Kind::Flow),
];

fn kind(class: &str) -> Result<Kind, ScheduleError> {
    let found = CLASSES.iter().find(|(name, _)| *name == class).map(|(_, kind)| *kind);
    found.ok_or_else(|| {
        let names: Vec<&str> = CLASSES.iter().map(|(name, _)| *name).collect();
        unsupported("_class_name", class, names.join(", "))
    })
}

fn unsupported(key: &'static str, value: impl ToString, supported: impl Into<String>) -> ScheduleError {
    ScheduleError::Unsupported { key, value: value.to_string(), supported: supported.into() }
}

impl Config {
    pub(super) fn parse(json: &str) -> Result<Self, ScheduleError> {
        Ok(python_json::parse(json.as_bytes())?)
    }

    /// Takes the class from `model_index.json` if the configuration has none.
    pub(super) fn of_index(mut self, index: Option<&[u8]>) -> Result<Self, ScheduleError> {
        // An index that can't be read is reported when the model is loaded.
        let index: serde_json::Value = index.and_then(|bytes| python_json::parse(bytes).ok()).unwrap_or_default();
        let indexed = index.get("scheduler").and_then(|entry| entry.get(1)).and_then(|class| class.as_str());
        match (&self.class, indexed) {
            (None, None) => return Err(ScheduleError::NoClass),
            (None, Some(indexed)) => self.class = Some(indexed.to_owned()),
            (Some(configured), Some(indexed)) => {
                let is_flow = |class| Ok::<_, ScheduleError>(kind(class)? == Kind::Flow);
                if is_flow(configured)? != is_flow(indexed)? {
                    let (configured, indexed) = (configured.clone(), indexed.to_owned());
                    return Err(ScheduleError::Classes { configured, indexed });
                }
            }
            (Some(_), None) => {}
        }
        Ok(self)
    }

    /// The noise schedule that follows from the settings.
    pub(super) fn schedule(&self) -> Result<NoiseSchedule, ScheduleError> {
        let class = self.class.as_deref().unwrap_or("DDPMScheduler");
        let timesteps = self.num_train_timesteps.unwrap_or(1000);
        if !(1..=MOST_TIMESTEPS).contains(&timesteps) {
            return Err(unsupported("num_train_timesteps", timesteps, format!("1 to {MOST_TIMESTEPS}")));
        }
        if let Some(other) = self.timestep_type.as_deref().filter(|kind| *kind != "discrete") {
            return Err(unsupported("timestep_type", other, "discrete"));
        }
        match kind(class)? {
            Kind::Flow => self.flow(class, timesteps),
            Kind::Betas(defaults) if self.use_flow_sigmas == Some(true) => match self.prediction_type.as_deref() {
                _ if !defaults.has_flow => Err(unsupported("use_flow_sigmas", true, format!("false in a {class}"))),
                Some("flow_prediction") => self.flow(class, timesteps),
                other => {
                    let other = other.unwrap_or("epsilon");
                    Err(unsupported("prediction_type", other, "flow_prediction where use_flow_sigmas is true"))
                }
            },
            Kind::Betas(defaults) => self.diffusion(class, timesteps, defaults),
        }
    }

    fn flow(&self, class: &str, timesteps: u32) -> Result<NoiseSchedule, ScheduleError> {
        if self.invert_sigmas == Some(true) {
            return Err(unsupported("invert_sigmas", true, "false"));
        }
        let process = Process::Flow { timesteps, shift: 1.0 };
        Ok(NoiseSchedule { process, prediction: PredictionType::Flow, origin: class.to_owned() })
    }

    fn diffusion(&self, class: &str, timesteps: u32, defaults: Betas) -> Result<NoiseSchedule, ScheduleError> {
        let prediction = match self.prediction_type.as_deref() {
            None | Some("epsilon") => PredictionType::Epsilon,
            Some("v_prediction") => PredictionType::VPrediction,
            Some(other) => return Err(unsupported("prediction_type", other, "epsilon, v_prediction")),
        };
        let (mut betas, mut origin) = self.betas(timesteps, defaults)?;
        // NaN must be refused too: the test is for betas above 0.
        if let Some((t, beta)) = betas.iter().enumerate().find(|(_, beta)| !(**beta > 0.0 && **beta <= 1.0)) {
            let key = if self.trained_betas.is_some() { "trained_betas" } else { "beta_start and beta_end" };
            return Err(unsupported(key, format!("{beta} at timestep {t}"), "above 0, up to 1"));
        }
        let is_rescaled = self.rescale_betas_zero_snr == Some(true);
        if is_rescaled {
            betas = with_zero_terminal_snr(&betas);
            origin.push_str(", rescaled to zero terminal SNR");
        }
        let mut alphas_cumprod = cumulative(&betas);
        if let Some(last) = alphas_cumprod.last_mut().filter(|_| is_rescaled && defaults.keeps_signal) {
            *last = SMALLEST_SIGNAL;
        }
        if alphas_cumprod.iter().any(|abar| !abar.is_finite()) {
            return Err(unsupported("rescale_betas_zero_snr", true, "false for betas like these"));
        }
        let process = Process::Diffusion { alphas_cumprod };
        Ok(NoiseSchedule { process, prediction, origin: format!("{class}, {origin}") })
    }

    /// The betas, and a description of where they come from.
    fn betas(&self, timesteps: u32, defaults: Betas) -> Result<(Vec<f32>, String), ScheduleError> {
        if let Some(trained) = &self.trained_betas {
            if trained.len() != timesteps as usize {
                let found = format!("{} values", trained.len());
                return Err(unsupported("trained_betas", found, format!("one for each of {timesteps} timesteps")));
            }
            return Ok((trained.iter().map(|beta| *beta as f32).collect(), "trained_betas".to_owned()));
        }
        let (start, end) = (self.beta_start.unwrap_or(defaults.start), self.beta_end.unwrap_or(defaults.end));
        let name = self.beta_schedule.as_deref().unwrap_or(defaults.schedule);
        let betas = match name {
            "linear" => linspace(start, end, timesteps),
            "scaled_linear" => linspace(start.sqrt(), end.sqrt(), timesteps).into_iter().map(|b| b * b).collect(),
            "squaredcos_cap_v2" => {
                return Ok((of_abar(timesteps, cosine), format!("beta_schedule {name}")));
            }
            "exp" if defaults.own == Some("exp") => {
                return Ok((of_abar(timesteps, |t| libm::exp(-12.0 * t)), format!("beta_schedule {name}")));
            }
            "sigmoid" if defaults.own == Some("sigmoid") => {
                let between = |x: f32| (1.0 / (1.0 + libm::exp(-f64::from(x)))) as f32;
                let (range, start) = ((end - start) as f32, start as f32);
                linspace(-6.0, 6.0, timesteps).into_iter().map(|x| between(x) * range + start).collect()
            }
            other => {
                let own = defaults.own.map_or_else(String::new, |own| format!(", {own}"));
                return Err(unsupported(
                    "beta_schedule",
                    other,
                    format!("linear, scaled_linear, squaredcos_cap_v2{own}, trained_betas"),
                ));
            }
        };
        Ok((betas, format!("beta_schedule {name} from {start} to {end}")))
    }
}

/// `abar` at `t` of [0, 1] (Nichol & Dhariwal, ICML 2021, equation 17).
fn cosine(t: f64) -> f64 {
    libm::cos((t + 0.008) / 1.008 * FRAC_PI_2).powi(2)
}

/// The betas whose products approximate a function for `abar`.
fn of_abar(timesteps: u32, abar: impl Fn(f64) -> f64) -> Vec<f32> {
    let at = |i: u32| abar(f64::from(i) / f64::from(timesteps));
    (0..timesteps).map(|i| (1.0 - at(i + 1) / at(i)).min(LARGEST_BETA) as f32).collect()
}

/// `abar` of betas. Products are in f64 and each is rounded to f32, as in torch.
fn cumulative(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0f64;
    let next = |beta: &f32| {
        product *= f64::from(1.0 - beta);
        product as f32
    };
    betas.iter().map(next).collect()
}

/// Betas whose last `abar` is zero and whose first is unchanged (Lin et al., WACV 2024, algorithm 1), computed step by step in
/// f32 as in diffusers.
fn with_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots.first().copied().unwrap_or(1.0), roots.last().copied().unwrap_or(0.0));
    let scale = first / (first - last);
    let abar: Vec<f32> = roots.into_iter().map(|root| ((root - last) * scale).powi(2)).collect();
    let before = std::iter::once(1.0).chain(abar.iter().copied());
    abar.iter().zip(before).map(|(abar, before)| 1.0 - abar / before).collect()
}

/// `torch.linspace` in f32: symmetric about the middle.
fn linspace(start: f64, end: f64, n: u32) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    if n == 1 {
        return vec![start];
    }
    let step = (end - start) / (n - 1) as f32;
    (0..n).map(|i| if i < n / 2 { start + step * i as f32 } else { end - step * (n - 1 - i) as f32 }).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Deserialize)]
    struct Case {
        config: String,
        values: BTreeMap<u32, f32>,
        times: Option<BTreeMap<u32, f32>>,
    }

    /// See `tests/fixtures/make_schedules.py`.
    fn cases() -> Vec<Case> {
        serde_json::from_str(include_str!("../../../../tests/fixtures/schedules.json")).unwrap()
    }

    #[test]
    fn every_class_and_setting_has_the_noise_that_diffusers_has() {
        for Case { config, values, times } in cases().into_iter().filter(|case| case.times.is_none()) {
            let schedule = NoiseSchedule::from_json(&config).unwrap_or_else(|error| panic!("{error}: {config}"));
            assert!(times.is_none() && values.len() > 4);
            for (t, expected) in values {
                let found = schedule.alphas_cumprod()[t as usize];
                // Powers and exponentials differ in their last bit, and the products over all timesteps add this up.
                let near = (found - expected).abs() <= 2e-6 * expected;
                assert!(near, "timestep {t}: {found} and diffusers' {expected} of {config}");
            }
        }
    }

    #[test]
    fn flow_matching_has_the_sigmas_and_times_that_diffusers_has() {
        let mut shifts = Vec::new();
        for Case { config, values, times } in cases().into_iter().filter(|case| case.times.is_some()) {
            // The configuration's own shift affects only sampling; this is the shift that the user asks for.
            let settings: serde_json::Value = serde_json::from_str(&config).unwrap();
            let shift = settings["shift"].as_f64().unwrap();
            let schedule = NoiseSchedule::from_json(&config).unwrap().with_shift(shift as f32).unwrap();
            for (t, sigma) in values {
                let time = times.as_ref().unwrap()[&t];
                assert!((schedule.mix(t).noise - sigma).abs() < 1e-6, "timestep {t}: {config}");
                assert!((schedule.time(t) - time).abs() < 1e-3, "timestep {t}: {config}");
            }
            shifts.push(shift);
        }
        assert!(shifts.contains(&3.0) && shifts.contains(&1.0));
    }

    #[test]
    fn zero_terminal_snr_leaves_no_signal_and_does_not_divide_by_it() {
        let json =
            r#"{"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": true, "prediction_type": "v_prediction"}"#;
        let schedule = NoiseSchedule::from_json(json).unwrap();
        let mix = schedule.mix(999);
        assert_eq!((mix.signal, mix.noise), (0.0, 1.0));
        assert!(schedule.loses_all_signal() && schedule.to_string().contains("zero terminal SNR"), "{schedule}");
        // The noisy latent is pure noise, and so is the prediction, whatever the output.
        let mut output = [7.0f32, -3.0];
        mix.predicted(PredictionType::VPrediction, &[0.5, -2.0], &mut output);
        assert_eq!(output, [0.5, -2.0]);
        let euler = json.replace("DDIM", "EulerDiscrete");
        assert!(!NoiseSchedule::from_json(&euler).unwrap().loses_all_signal());
    }

    #[test]
    fn unsupported_settings_are_refused_by_name() {
        let cases = [
            (r#"{"prediction_type": "sample"}"#, "prediction_type 'sample'"),
            (r#"{"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}"#, "beta_schedule 'sigmoid'"),
            (r#"{"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}"#, "beta_schedule 'laplace'"),
            (r#"{"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}"#, "_class_name 'EDMEulerScheduler'"),
            (r#"{"_class_name": "CMStochasticIterativeScheduler"}"#, "_class_name 'CMStochasticIterativeScheduler'"),
            (r#"{"_class_name": "CogVideoXDDIMScheduler"}"#, "_class_name 'CogVideoXDDIMScheduler'"),
            (r#"{"timestep_type": "continuous"}"#, "timestep_type 'continuous'"),
            (r#"{"use_flow_sigmas": true}"#, "use_flow_sigmas 'true'"),
            (r#"{"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true}"#, "flow_prediction"),
            (r#"{"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}"#, "flow_prediction'"),
            (r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": true}"#, "invert_sigmas 'true'"),
            (r#"{"num_train_timesteps": 0}"#, "num_train_timesteps '0'"),
            (r#"{"num_train_timesteps": 3, "trained_betas": [0.1, 0.2]}"#, "trained_betas '2 values'"),
            (r#"{"num_train_timesteps": 2, "trained_betas": [0.1, 1.2]}"#, "1.2 at timestep 1"),
            (r#"{"num_train_timesteps": 1, "rescale_betas_zero_snr": true}"#, "rescale_betas_zero_snr"),
            (r#"{"beta_start": "small"}"#, "beta_start: invalid type"),
            ("{", "scheduler_config.json"),
        ];
        for (json, part) in cases {
            let error = NoiseSchedule::from_json(json).unwrap_err().to_string();
            assert!(error.contains(part), "{json}: {error}");
        }
    }

    #[test]
    fn samplers_of_flow_matching_models_are_known() {
        let json = r#"{"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": true,
            "prediction_type": "flow_prediction", "lambda_min_clipped": -Infinity}"#;
        assert_eq!(NoiseSchedule::from_json(json).unwrap().prediction(), PredictionType::Flow);
    }

    #[test]
    fn the_class_comes_from_the_index_if_the_configuration_names_none() {
        let schedule = |index: &str, config: &str| {
            NoiseSchedule::of_configs(config, Some(index.as_bytes())).map_err(|error| error.to_string())
        };
        let lcm = r#"{"scheduler": ["diffusers", "LCMScheduler"]}"#;
        let expected = NoiseSchedule::from_json(r#"{"_class_name": "LCMScheduler"}"#).unwrap();
        assert_eq!(schedule(lcm, "{}").unwrap(), expected);
        assert!(schedule("{}", "{}").unwrap_err().contains("_class_name"));
        assert!(schedule(lcm, r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#).unwrap_err().contains("LCMS"));
        let edm = r#"{"scheduler": ["diffusers", "EDMEulerScheduler"]}"#;
        assert!(schedule(edm, r#"{"_class_name": "DDIMScheduler"}"#).unwrap_err().contains("EDMEulerScheduler"));
    }
}
