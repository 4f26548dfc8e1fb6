//! A stage turns evaluations into errors: with a diffusion model, or with a contrastive model, alone or in front of a
//! diffusion model.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use elbo_core::loss::Distance;
use elbo_core::noise::NoiseSource;
use elbo_core::policy::Slot;
use elbo_core::score::{Point, Scorer};
use elbo_images::Preprocessing;
use elbo_kernels::{Deviation, Download, MeanErrors, mean_errors, upload};
use elbo_models::{Conditions, ContrastiveModel, DiffusionModel, ModelError, Pass, Reading, TextRows, TimeCache};

use crate::latent::Latent;

/// A model with the job's prompts, encoded for it.
#[derive(Debug)]
pub struct ModelStage {
    /// The model.
    pub model: Model,
    /// Its conditions for every prompt of the job; `None` if every sample has its own captions, for which the model keeps
    /// its text encoders.
    pub conditions: Option<Arc<Conditions>>,
}

/// The model that scores.
#[derive(Debug)]
pub enum Model {
    /// Scores by how well it predicts noise.
    Diffusion(Box<Diffusion>),
    /// Scores by the angle between embeddings.
    Contrastive(Box<ContrastiveModel>),
}

/// A diffusion model with everything its evaluations depend on, except samples and prompts.
#[derive(Debug)]
pub struct Diffusion {
    /// The model.
    pub model: DiffusionModel,
    /// Turns the network's outputs into errors.
    pub scorer: Scorer,
    /// The noise of every slot.
    pub noise: NoiseSource,
    /// The network's inputs for every timestep of the rounds.
    pub times: TimeCache,
    /// Held while a batch is given to a GPU.
    pub turn: Mutex<()>,
}

/// A sample at a slot. Evaluations of one point differ only in the prompt.
#[derive(Clone, Copy, Debug)]
pub struct PointWork<'a> {
    /// The key of the sample's noise.
    pub key: &'a str,
    /// The image's latent.
    pub latent: &'a Latent,
    /// The timestep and noise.
    pub slot: Slot,
}

impl ModelStage {
    /// How to preprocess an image file for [`ModelStage::encode`].
    pub fn preprocessing(&self) -> Preprocessing {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.model.preprocessing(),
            Model::Contrastive(model) => model.preprocessing(),
        }
    }

    /// Encodes images, preprocessed pixels `[S, S, 3]` each: to a latent `[h, w, C]`, or an embedding `[D]`.
    pub fn encode(&self, images: &[Vec<f32>]) -> Result<Vec<Vec<f32>>, ModelError> {
        let Some(first) = images.first() else { return Ok(Vec::new()) };
        let side = (first.len() / 3).isqrt();
        let encoded = {
            let _turn = self.turn();
            let pixels = upload(&images.concat(), (images.len(), side, side, 3), self.device())?;
            let encoded = match &self.model {
                Model::Diffusion(diffusion) => diffusion.model.encode_images(&pixels)?,
                Model::Contrastive(model) => model.encode_images(&pixels)?,
            };
            Download::start(&encoded)?
        };
        let encoded = encoded.wait()?;
        Ok(encoded.chunks_exact((encoded.len() / images.len()).max(1)).map(<[f32]>::to_vec).collect())
    }

    /// Waits until no other lane is giving work to the GPU, if the device is one.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.turn(),
            Model::Contrastive(_) => None,
        }
    }

    /// The model's device.
    pub fn device(&self) -> &Device {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.model.device().0,
            Model::Contrastive(model) => model.device(),
        }
    }

    /// How many values [`ModelStage::encode`] returns per image.
    pub fn latent_len(&self) -> usize {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.model.latent_shape().iter().product(),
            Model::Contrastive(model) => model.width(),
        }
    }

    /// The model's readings of texts.
    pub fn readings(&self, texts: &[String]) -> Result<Vec<Reading>, ModelError> {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.model.readings(texts),
            Model::Contrastive(model) => model.readings(texts),
        }
    }

    /// The model's conditions for texts.
    pub fn text_conditions(&self, texts: &[String]) -> Result<Conditions, ModelError> {
        match &self.model {
            Model::Diffusion(diffusion) => diffusion.model.text_conditions(texts),
            Model::Contrastive(model) => Ok(Conditions::Embeddings(TextRows::new(&model.encode_texts(texts)?)?)),
        }
    }

    /// The errors of evaluations, in their order. An evaluation is a pair of a point and a condition, with points
    /// ascending.
    pub fn errors(
        &self,
        points: &[PointWork<'_>],
        conditions: &Conditions,
        evaluations: &[(u32, u32)],
    ) -> Result<Vec<f32>, ModelError> {
        let errors = match (&self.model, conditions) {
            (Model::Diffusion(diffusion), _) => diffusion.errors(points, conditions, evaluations)?,
            (Model::Contrastive(_), Conditions::Embeddings(texts)) => evaluations
                .iter()
                .map(|(point, text)| texts.distance(points[*point as usize].latent, *text))
                .collect::<Result<_, _>>()?,
            (Model::Contrastive(_), _) => {
                return Err(ModelError::Input("conditions of another family of models".into()));
            }
        };
        if errors.iter().all(|e| e.is_finite()) { Ok(errors) } else { Err(ModelError::NotFinite) }
    }
}

impl Diffusion {
    /// Waits until no other lane is giving work to the GPU, if the device is one: otherwise it would hold the activations
    /// of several batches at a time. A batch's output is requested before its turn ends, or it would come after the next
    /// batch.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        let on_gpu = !self.model.device().0.is_cpu();
        on_gpu.then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn errors(
        &self,
        points: &[PointWork<'_>],
        conditions: &Conditions,
        evaluations: &[(u32, u32)],
    ) -> Result<Vec<f32>, ModelError> {
        let ([c, h, w], schedule) = (self.model.latent_shape(), self.scorer.schedule());
        let size = c * h * w;
        let (mut noise, mut noisy) = (vec![0.0f32; points.len() * size], vec![0.0f32; points.len() * size]);
        let mut drawn = vec![0.0f32; size];
        for (i, point) in points.iter().enumerate() {
            self.noise.fill(point.key, point.slot.noise, &mut drawn);
            let range = i * size..(i + 1) * size;
            to_channels_last(&drawn, c, &mut noise[range.clone()]);
            let mix = schedule.mix(point.slot.timestep);
            mix.add_noise(point.latent, &noise[range.clone()], &mut noisy[range]);
        }
        let timesteps: Vec<u32> = points.iter().map(|point| point.slot.timestep).collect();
        let (device, dtype) = self.model.device();
        let shape = (points.len(), h, w, c);
        if let (false, Some(distance)) = (device.is_cpu(), self.scorer.distance()) {
            let targets = points.iter().zip(noise.chunks_exact(size)).flat_map(|(point, noise)| {
                let mut target = vec![0.0; size];
                self.scorer.target(point.latent, noise, &mut target);
                target
            });
            let targets: Vec<f32> = targets.collect();
            let mix: Vec<f32> = timesteps.iter().flat_map(|timestep| self.scorer.weights(*timestep)).collect();
            let of_evaluations: Vec<u32> = evaluations.iter().map(|(point, _)| *point).collect();
            let errors = {
                let _turn = self.turn();
                let (noisy, targets) = (upload(&noisy, shape, device)?, upload(&targets, shape, device)?);
                let mix = upload(&mix, (points.len(), 2), device)?;
                let pass = Pass { latents: &noisy.to_dtype(dtype)?, timesteps: &timesteps, evaluations };
                let output = self.model.network().forward(&pass, &self.times, conditions)?;
                let (points, deviation) = (&of_evaluations[..], deviation(distance));
                let of = MeanErrors { noisy: &noisy, targets: &targets, mix: &mix, points, deviation };
                Download::start(&mean_errors(&output, &of)?)?
            };
            return Ok(errors.wait()?);
        }
        let output = {
            let _turn = self.turn();
            let latents = upload(&noisy, shape, device)?.to_dtype(dtype)?;
            let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations };
            Download::start(&self.model.network().forward(&pass, &self.times, conditions)?)?
        };
        let mut output = output.wait()?;
        let values = output.len() / evaluations.len().max(1);
        let errors = evaluations.iter().zip(output.chunks_mut(values.max(1))).map(|((at, _), output)| {
            let at = *at as usize;
            let range = at * size..(at + 1) * size;
            let (noise, noisy) = (&noise[range.clone()], &noisy[range]);
            self.scorer.error(Point { latent: points[at].latent, noise, noisy, timestep: timesteps[at] }, output)
        });
        Ok(errors.collect())
    }
}

/// The operation for a distance.
fn deviation(distance: Distance) -> Deviation {
    match distance {
        Distance::L2 => Deviation::Squared,
        Distance::L1 => Deviation::Absolute,
        Distance::Huber => Deviation::Huber,
    }
}

/// [C, H, W] to [H, W, C].
fn to_channels_last(planes: &[f32], channels: usize, out: &mut [f32]) {
    let pixels = planes.len() / channels.max(1);
    for (c, plane) in planes.chunks(pixels.max(1)).enumerate() {
        for (pixel, value) in plane.iter().enumerate() {
            out[pixel * channels + c] = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_become_channels_last() {
        let mut out = [0.0; 6];
        to_channels_last(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &mut out);
        assert_eq!(out, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}
