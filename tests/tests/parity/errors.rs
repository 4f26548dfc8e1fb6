//! Every error of every reference table. All predictions depend on these errors.

use candle_core::{DType, Device, Tensor, safetensors};
use elbo_core::loss::Loss;
use elbo_core::schedule::NoiseSchedule;
use elbo_core::score::{Point, Scorer};
use elbo_models::{DiffusionModel, Pass};
use elbo_tests::fixtures;
use elbo_tests::numbers::{assert_close, flat};

use crate::for_each;
use crate::reference::{Reference, times};

/// The number of classes in the table of errors.
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
    bk_sdm_base "unets/bk-sdm-base",
    bk_sdm_small "unets/bk-sdm-small",
    bk_sdm_tiny_and_tiny_sd "unets/bk-sdm-tiny",
    bk_sdm_v2_base "unets/bk-sdm-v2-base",
    bk_sdm_v2_small "unets/bk-sdm-v2-small",
    bk_sdm_v2_tiny "unets/bk-sdm-v2-tiny",
    sd_turbo "unets/sd-turbo",
    sdxl_turbo "unets/sdxl-turbo",
    ssd_1b "unets/ssd-1b",
    segmind_vega "unets/segmind-vega",
    koala "unets/koala-700m",
    latent_consistency "unets/lcm",
    only_cross_attention "unets/only-cross",
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

/// Checks the largest relative difference of every table of errors, and the raw outputs if the fixture has them.
fn check_table(reference: &Reference, schedule: NoiseSchedule, suffix: &str) {
    let model = reference.model();
    let mut tables = 0;
    for (name, loss) in [("mse", Loss::L2), ("l1", Loss::L1), ("huber", Loss::Huber)] {
        let name = format!("{name}{suffix}");
        if !reference.has(&name) {
            continue;
        }
        let (found, expected) = (table(reference, &model, &schedule, loss), flat(reference.get(&name)));
        let worst = found.iter().zip(&expected).fold(0.0f64, |worst, (a, b)| worst.max((a / b - 1.0).abs()));
        println!("{name}: largest relative error {worst:.1e}");
        assert!(worst < 2e-5, "{name}: largest relative error {worst}");
        tables += 1;
    }
    assert!(tables >= 2);

    let outputs = reference.channels_last(&format!("model_output{suffix}"));
    let dims = outputs.dims();
    for (i, image) in [0, 5].into_iter().take(dims[0]).enumerate() {
        let predicted = predict(reference, &model, &schedule, image);
        for (c, class) in [0, 7].into_iter().take(dims[1]).enumerate() {
            for (k, slot) in [0, 9, 19].into_iter().enumerate() {
                let expected = outputs.get(i).unwrap().get(c).unwrap().get(k).unwrap();
                assert_close("model output", &predicted.get(slot * CLASSES + class).unwrap(), &expected, 1e-5);
            }
        }
    }
}

/// The output for every timestep and class of an image, `[T * 10, H, W, C]`.
fn predict(reference: &Reference, model: &DiffusionModel, schedule: &NoiseSchedule, image: usize) -> Tensor {
    let timesteps = reference.timesteps();
    let cache = model.network().time_cache(&timesteps, &times(schedule, &timesteps)).unwrap();
    let points = 0..timesteps.len() as u32;
    let evaluations: Vec<_> = points.flat_map(|k| (0..CLASSES as u32).map(move |c| (k, c))).collect();
    let latents = noisy(reference, schedule, image).to_dtype(model.device().1).unwrap();
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &evaluations };
    model.network().forward(&pass, &cache, &reference.conditions(model)).unwrap()
}

/// x_t of an image at every timestep.
fn noisy(reference: &Reference, schedule: &NoiseSchedule, image: usize) -> Tensor {
    let latents: Vec<_> = (0..reference.timesteps().len()).map(|k| reference.noisy(schedule, image, k)).collect();
    Tensor::cat(&latents, 0).unwrap()
}

/// The error of every image, class and timestep, in this order.
pub(crate) fn table(reference: &Reference, model: &DiffusionModel, schedule: &NoiseSchedule, loss: Loss) -> Vec<f64> {
    let network = model.network();
    let learned_variance = network.out_channels() != network.in_channels();
    let scorer = Scorer::new(schedule.clone(), loss, network.in_channels(), learned_variance).unwrap();
    let rows = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
    let (latents, noise) = (rows(&reference.channels_last("latents_mean")), rows(&reference.channels_last("noise")));
    let timesteps = reference.timesteps();
    let mut errors = vec![0.0; latents.len() * CLASSES * timesteps.len()];
    for (image, latent) in latents.iter().enumerate() {
        let noisy = rows(&noisy(reference, schedule, image));
        for (i, mut output) in rows(&predict(reference, model, schedule, image)).into_iter().enumerate() {
            let (k, class) = (i / CLASSES, i % CLASSES);
            let point = Point { latent, noise: &noise[k], noisy: &noisy[k], timestep: timesteps[k] };
            let at = (image * CLASSES + class) * timesteps.len() + k;
            errors[at] = f64::from(scorer.error(point, &mut output));
        }
    }
    errors
}

#[test]
fn the_variational_bound_of_a_learned_variance_matches() {
    let (reference, name) = (Reference::open("digits-dit"), "digits-dit/bound.safetensors");
    let bound = safetensors::load(fixtures().join(name), &Device::Cpu).unwrap();
    let (model, schedule, expected) = (reference.model(), reference.schedule(), flat(&bound["vlb"]));
    let found = table(&reference, &model, &schedule, Loss::Vlb);
    let worst = found.iter().zip(&expected).fold(0.0f64, |worst, (a, b)| worst.max((a / b - 1.0).abs()));
    println!("vlb: largest relative error {worst:.1e}");
    assert!(worst < 1e-4, "{worst}");
    let (both, l2) =
        (table(&reference, &model, &schedule, Loss::L2Vlb), table(&reference, &model, &schedule, Loss::L2));
    assert!(both.iter().zip(l2.iter().zip(&found)).all(|(both, (a, b))| (both / (a + b) - 1.0).abs() < 1e-6));
}
