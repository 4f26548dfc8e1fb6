//! Every error of every reference table: what all predictions rest on.

use candle_core::Tensor;
use elbo_common::loss::Loss;
use elbo_common::schedule::NoiseSchedule;
use elbo_common::score::{Point, Scorer};
use elbo_worker::models::Pass;

use crate::for_each;
use crate::reference::{Reference, assert_close, flat, times};

/// Classes in the table of errors.
const CLASSES: usize = 10;

for_each!(check:
    digits_sd "digits-sd",
    stable_diffusion_1 "sd15",
    stable_diffusion_2 "sd2-eps",
    stable_diffusion_2_v "sd2-v",
    sdxl "sdxl",
    stable_diffusion_3 "sd3",
    stable_diffusion_35 "sd35",
    digits_dit "digits-dit",
);

fn check(fixture: &str) {
    let reference = Reference::open(fixture);
    check_table(&reference, reference.schedule(), "");
}

for_each!(check_shifted: stable_diffusion_3_shifted "sd3", stable_diffusion_35_shifted "sd35");

fn check_shifted(fixture: &str) {
    let reference = Reference::open(fixture);
    check_table(&reference, reference.schedule().with_shift(3.0).unwrap(), "_shift3");
}

fn check_table(reference: &Reference, schedule: NoiseSchedule, suffix: &str) {
    let model = reference.model();
    let network = model.network();
    let timesteps = reference.timesteps();
    let cache = network.time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let conditions = reference.conditions(&model);
    let learned_variance = network.out_channels() != network.in_channels();
    let tables = [("mse", Loss::L2), ("l1", Loss::L1), ("huber", Loss::Huber)];
    let tables: Vec<_> = tables
        .into_iter()
        .map(|(name, loss)| (format!("{name}{suffix}"), loss))
        .filter(|(name, _)| reference.has(name))
        .map(|(name, loss)| {
            let scorer = Scorer::new(schedule.clone(), loss, network.in_channels(), learned_variance).unwrap();
            (name.clone(), scorer, flat(reference.get(&name)))
        })
        .collect();
    assert!(tables.len() >= 2);
    let outputs = reference.channels_last(&format!("model_output{suffix}"));
    let (images, mut worst) = (reference.get("images_u8").dim(0).unwrap(), vec![0.0f64; tables.len()]);
    let mut compared = 0;
    for image in 0..images {
        let latents: Vec<Tensor> = (0..timesteps.len()).map(|k| reference.noisy(&schedule, image, k)).collect();
        let noisy = Tensor::cat(&latents, 0).unwrap();
        let points = 0..timesteps.len() as u32;
        let evaluations: Vec<_> = points.flat_map(|k| (0..CLASSES as u32).map(move |c| (k, c))).collect();
        let pass = Pass { latents: &noisy, timesteps: &timesteps, evaluations: &evaluations };
        let predicted = network.forward(&pass, &cache, &conditions).unwrap();
        let values = |t: &Tensor, i: usize| t.get(i).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let latent = values(&reference.channels_last("latents_mean"), image);
        for (i, &(k, class)) in evaluations.iter().enumerate() {
            let (k, class) = (k as usize, class as usize);
            let (noise, noisy) = (values(&reference.channels_last("noise"), k), values(&noisy, k));
            let point = Point { latent: &latent, noise: &noise, noisy: &noisy, timestep: timesteps[k] };
            let at = (image * CLASSES + class) * timesteps.len() + k;
            for ((_, scorer, expected), worst) in tables.iter().zip(&mut worst) {
                let found = scorer.error(point, &mut values(&predicted, i));
                *worst = worst.max((f64::from(found) / expected[at] - 1.0).abs());
            }
            let find = |all: &[usize], one: usize| all.iter().position(|&x| x == one);
            if let (Some(i_out), Some(c), Some(k)) = (find(&[0, 5], image), find(&[0, 7], class), find(&[0, 9, 19], k))
                && i_out < outputs.dim(0).unwrap()
                && c < outputs.dim(1).unwrap()
            {
                let expected = outputs.get(i_out).unwrap().get(c).unwrap().get(k).unwrap();
                assert_close("model output", &predicted.get(i).unwrap(), &expected, 1e-5);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, outputs.dims()[..3].iter().product::<usize>());
    for ((name, ..), worst) in tables.iter().zip(worst) {
        println!("{name}: largest relative error {worst:.1e}");
        assert!(worst < 2e-5, "{name}: largest relative error {worst}");
    }
}
