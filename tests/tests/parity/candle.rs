//! candle-transformers as a second opinion: its networks share no code with this project's, and are compared where they compute
//! the same. Where they don't, the tests show with which of the two diffusers agrees.

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Shape, Tensor, bail, safetensors};
use candle_nn::VarMap;
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_transformers::models::clip::text_model::{Activation, ClipTextConfig, ClipTextTransformer};
use candle_transformers::models::stable_diffusion::unet_2d::UNet2DConditionModel;
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use candle_transformers::models::t5::T5EncoderModel;
use elbo_bench::candle::{CandleNetwork, unet_settings};
use elbo_core::job::ModelDtype;
use elbo_models::{ClipTextModel, ClipTokenizer, LoadOptions, Pass, Probe, T5Encoder, T5Tokenizer, TextEmbeddings};
use elbo_models::{Family, Network, VaeEncoder};
use elbo_tests::numbers::{assert_close, channels_last};

use crate::reference::{Reference, times};

fn options() -> LoadOptions {
    LoadOptions::new(Device::Cpu, ModelDtype::F32)
}

/// The largest difference, relative to the largest value.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let largest = |t: &Tensor| f64::from(t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap());
    largest(&(found - expected).unwrap()) / largest(expected)
}

/// The settings of a UNet that candle-transformers can run: its norms have 32 groups.
fn unet(widths: [usize; 3], is_linear: bool) -> String {
    let blocks = |names: [&str; 3]| serde_json::json!(names);
    serde_json::json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": if is_linear { serde_json::json!([2, 4, 4]) } else { serde_json::json!(4) },
        "block_out_channels": widths,
        "cross_attention_dim": 24,
        "center_input_sample": false,
        "down_block_types": blocks(["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]),
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 16,
        "up_block_types": blocks(["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
        "use_linear_projection": is_linear,
    })
    .to_string()
}

#[test]
fn unet_like_stable_diffusion_1() {
    check_unet(&unet([32, 64, 96], false));
}

#[test]
fn unet_like_stable_diffusion_2() {
    check_unet(&unet([64, 64, 128], true));
}

/// Evaluates candle's UNet and ours with the same random weights.
fn check_unet(config: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let settings = unet_settings(&serde_json::from_str(config).unwrap()).unwrap();
    let drawn = VarMap::new();
    UNet2DConditionModel::new(VarBuilder::from_varmap(&drawn, DType::F32, &Device::Cpu), 4, 4, false, settings)
        .unwrap();
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
    let weights = drawn.data().lock().unwrap();
    // Norms begin as ones and zeros, which would hide them.
    let weights = weights.iter().map(|(name, weight)| {
        let changed = if weight.rank() == 1 {
            (weight.as_tensor() + random(weight.dims()) * 0.1).unwrap()
        } else {
            weight.as_tensor().clone()
        };
        (name.clone(), changed)
    });
    let mut weights: HashMap<String, Tensor> = weights.collect();
    let latents = random(&[1, 16, 16, 4]);
    let texts = TextEmbeddings { tokens: random(&[1, 77, 24]), pooled: None };
    let timestep = 321;
    let both = |weights: &HashMap<String, Tensor>| {
        safetensors::save(weights, dir.path().join("diffusion_pytorch_model.safetensors")).unwrap();
        let theirs = CandleNetwork::load(dir.path(), &options()).unwrap();
        let network = Network::load(Family::StableDiffusion, dir.path(), &options()).unwrap();
        let cache = network.time_cache(&[timestep], &[timestep as f32]).unwrap();
        let conditions = network.text_conditions(&texts, 128).unwrap();
        let pass = Pass { latents: &latents, timesteps: &[timestep], evaluations: &[(0, 0)] };
        let ours = network.forward(&pass, &cache, &conditions).unwrap();
        (theirs.forward(&latents, timestep as f32, &texts).unwrap(), ours)
    };

    // candle approximates the feed-forwards' GELU by a hyperbolic tangent. diffusers' GEGLU does not: the fixtures that it made
    // agree with ours within 1e-5.
    let (theirs, whole) = both(&weights);
    let approximation = difference(&theirs, &whole);
    assert!((1e-5..1e-2).contains(&approximation), "{approximation}");

    // Without the feed-forwards' part of the sums, both compute the same.
    for (_, weight) in weights.iter_mut().filter(|(name, _)| name.contains(".ff.net.2.")) {
        *weight = weight.zeros_like().unwrap();
    }
    let (theirs, ours) = both(&weights);
    assert!(difference(&ours, &whole) > 1e-3, "the feed-forwards don't matter");
    assert_close("candle's output", &theirs, &ours, 1e-5);
}

#[test]
fn mmdit_of_stable_diffusion_3() {
    let reference = Reference::open("sd3");
    let schedule = reference.schedule();
    let latents = reference.noisy(&schedule, 0, 9).to_device(&Device::Cpu).unwrap();
    let of_prompt = |name: &str| reference.get(name).narrow(0, 7, 1).unwrap().to_dtype(DType::F32).unwrap();
    let texts = TextEmbeddings { tokens: of_prompt("prompt_embeds"), pooled: Some(of_prompt("pooled_prompt_embeds")) };
    let dir = reference.model.join("transformer");
    let theirs = CandleNetwork::load(&dir, &options()).unwrap();
    // It embeds the timestep in half precision, so all of it is: several times the loss of one rounding.
    assert_eq!(theirs.dtype(), DType::F16);
    let timesteps = [reference.timesteps()[9]];
    let theirs = theirs.forward(&latents, times(&schedule, &timesteps)[0], &texts).unwrap();
    let ours = Network::load(Family::Sd3, &dir, &options()).unwrap();
    let cache = ours.time_cache(&timesteps, &times(&schedule, &timesteps)).unwrap();
    let conditions = ours.text_conditions(&texts, 32).unwrap();
    let pass = Pass { latents: &latents, timesteps: &timesteps, evaluations: &[(0, 0)] };
    assert_close("candle's output", &theirs, &ours.forward(&pass, &cache, &conditions).unwrap(), 1e-2);
}

/// The stored weights, and zeros for the decoder's.
struct Stored(HashMap<String, Tensor>);

impl SimpleBackend for Stored {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        match self.0.get(name) {
            Some(weight) => weight.reshape(shape)?.to_dtype(dtype),
            // The decoder is not used, and the fixtures lack it.
            None if name.starts_with("decoder.") || name.starts_with("post_quant_conv.") => {
                Tensor::zeros(shape, dtype, device)
            }
            None => bail!("no weight {name}"),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        panic!("{name} needs a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

#[test]
fn autoencoder_of_stable_diffusion_1() {
    let reference = Reference::open("sd15");
    let dir = reference.model.join("vae");
    let mut weights = safetensors::load(dir.join("diffusion_pytorch_model.safetensors"), &Device::Cpu).unwrap();
    // It gives a sample of the posterior only. With a variance of e^-60 that is the mean.
    for (name, variance) in [("quant_conv.weight", 0.0), ("quant_conv.bias", -60.0)] {
        let stored = &weights[name];
        let half = stored.dim(0).unwrap() / 2;
        let variances = stored.narrow(0, half, half).unwrap().affine(0.0, variance).unwrap();
        let edited = Tensor::cat(&[&stored.narrow(0, 0, half).unwrap(), &variances], 0).unwrap();
        weights.insert(name.to_owned(), edited);
    }
    let config = AutoEncoderKLConfig {
        block_out_channels: vec![8, 8, 16, 16],
        layers_per_block: 2,
        latent_channels: 4,
        norm_num_groups: 8,
        use_quant_conv: true,
        use_post_quant_conv: true,
    };
    let vars = VarBuilder::from_backend(Box::new(Stored(weights)), DType::F32, Device::Cpu);
    let theirs = AutoEncoderKL::new(vars, 3, 3, config).unwrap();
    let ours = VaeEncoder::load(&dir, &options()).unwrap();
    let latents = reference.channels_last("latents_mean");
    // One image at a time: candle-core 0.11 multiplies a transposed batch by one matrix wrongly, as its attention does.
    for i in 0..3 {
        let of_image = |t: &Tensor| t.narrow(0, i, 1).unwrap().to_device(&Device::Cpu).unwrap();
        let pixels = of_image(&reference.pixels());
        let planes = pixels.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let theirs = channels_last(&theirs.encode(&planes).unwrap().sample().unwrap());
        let theirs = (theirs * 0.18215).unwrap();
        assert_close("candle's latents", &theirs, &ours.encode(&pixels, &mut Probe::none()).unwrap(), 1e-5);
        assert_close("candle's latents beside diffusers'", &theirs, &of_image(&latents), 1e-5);
    }
}

#[test]
fn clip_of_stable_diffusion_1() {
    let reference = Reference::open("sd15");
    let dir = reference.model.join("text_encoder");
    let config = ClipTextConfig {
        vocab_size: 581,
        embed_dim: 32,
        activation: Activation::QuickGelu,
        intermediate_size: 128,
        max_position_embeddings: 77,
        pad_with: None,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        projection_dim: 32,
    };
    let weights = safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    let vars = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let theirs = ClipTextTransformer::new(vars.pp("text_model"), &config).unwrap();
    let tokenizer = ClipTokenizer::open(&reference.model.join("tokenizer"), 77).unwrap();
    let ids: Vec<_> = reference.strings("prompts").iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    let theirs = theirs.forward_with_mask(&Tensor::new(ids.clone(), &Device::Cpu).unwrap(), usize::MAX).unwrap();
    let ours = ClipTextModel::load(&dir, &options()).unwrap().forward(&ids, &mut Probe::none()).unwrap();
    assert_close("candle's hidden state", &theirs, &ours.last_hidden_state, 5e-6);
}

#[test]
fn t5_of_stable_diffusion_3() {
    let reference = Reference::open("sd3");
    let dir = reference.model.join("text_encoder_3");
    let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let weights = safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    let mut theirs =
        T5EncoderModel::load(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu), &config).unwrap();
    let tokenizer = T5Tokenizer::open(&reference.model.join("tokenizer_3"), 77).unwrap();
    let ids: Vec<_> = reference.strings("prompts").iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    let theirs = theirs.forward(&Tensor::new(ids.clone(), &Device::Cpu).unwrap()).unwrap();
    let ours = T5Encoder::load(&dir, &options()).unwrap().forward(&ids, &mut Probe::none()).unwrap();
    assert_close("candle's hidden state", &theirs.i(..).unwrap(), &ours, 5e-6);
}
