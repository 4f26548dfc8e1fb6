//! candle-transformers' networks with the weights of a model directory: an implementation of the same papers that shares no
//! code with this program's beyond the tensor library.
//!
//! They are used as they are. A batch has one timestep, every evaluation computes everything, and the layers use all of
//! candle's threads (`RAYON_NUM_THREADS`).

use std::path::Path;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use candle_transformers::models::mmdit::model::{Config as MmditConfig, MMDiT};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use elbo_models::{LoadOptions, TextEmbeddings, Weights};
use serde_json::Value;

use crate::BenchError;

/// A noise predictor of candle-transformers.
pub struct CandleNetwork {
    network: Network,
    dtype: DType,
}

enum Network {
    Unet(Box<UNet2DConditionModel>),
    Mmdit(Box<MMDiT>),
}

impl std::fmt::Debug for CandleNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CandleNetwork").field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl CandleNetwork {
    /// The network in `dir`, the `unet` or `transformer` of a model directory, on the CPU.
    pub fn load(dir: &Path, options: &LoadOptions) -> std::result::Result<Self, BenchError> {
        let path = dir.join("config.json");
        let unreadable = |error: String| BenchError::Candle(format!("{}: {error}", path.display()));
        let config = std::fs::read(&path).map_err(|error| unreadable(error.to_string()))?;
        let config: Value = serde_json::from_slice(&config).map_err(|error| unreadable(error.to_string()))?;
        let weights = Weights::open(dir, "diffusion_pytorch_model", options)?;
        let device = &Device::Cpu;
        match config["_class_name"].as_str() {
            Some("UNet2DConditionModel") => {
                let settings = unet_settings(&config).map_err(BenchError::Candle)?;
                let channels = |key: &str| number(&config, key).map_err(BenchError::Candle);
                let vars = VarBuilder::from_backend(Box::new(Same(weights)), DType::F32, device.clone());
                let unet = UNet2DConditionModel::new(
                    vars,
                    channels("in_channels")?,
                    channels("out_channels")?,
                    false,
                    settings,
                )?;
                Ok(Self { network: Network::Unet(Box::new(unet)), dtype: DType::F32 })
            }
            Some("SD3Transformer2DModel") => {
                let settings = mmdit(&config).map_err(BenchError::Candle)?;
                let last = format!("joint_blocks.{}.context_block.", settings.depth - 1);
                // Its timestep embedding is in half precision, whatever the rest is in.
                let vars = VarBuilder::from_backend(Box::new(Original { weights, last }), DType::F16, device.clone());
                Ok(Self { network: Network::Mmdit(Box::new(MMDiT::new(&settings, false, vars)?)), dtype: DType::F16 })
            }
            other => Err(BenchError::Candle(format!("it has no counterpart of {}", other.unwrap_or("it")))),
        }
    }

    /// The type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Evaluates `latents [B, H, W, C]` at one timestep, each with its own prompt, to `[B, H, W, C']` in f32.
    pub fn forward(&self, latents: &Tensor, timestep: f32, texts: &TextEmbeddings) -> Result<Tensor> {
        let x = latents.permute((0, 3, 1, 2))?.contiguous()?.to_dtype(self.dtype)?;
        let tokens = texts.tokens.to_dtype(self.dtype)?;
        let y = match (&self.network, &texts.pooled) {
            (Network::Unet(unet), _) => unet.forward(&x, timestep.into(), &tokens)?,
            (Network::Mmdit(mmdit), Some(pooled)) => {
                let times = Tensor::full(timestep, x.dim(0)?, x.device())?;
                mmdit.forward(&x, &times, &pooled.to_dtype(self.dtype)?, &tokens, None)?
            }
            (Network::Mmdit(_), None) => bail!("pooled text embeddings are missing"),
        };
        y.permute((0, 2, 3, 1))?.contiguous()?.to_dtype(DType::F32)
    }
}

/// The weights under their own names.
struct Same(Weights);

impl SimpleBackend for Same {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, dtype: DType, device: &Device) -> Result<Tensor> {
        take(&self.0, name, shape.dims())?.to_dtype(dtype)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("a shape is needed for {name}")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.at("").has(name)
    }
}

fn take(weights: &Weights, name: &str, shape: &[usize]) -> Result<Tensor> {
    weights.at("").get(name, shape).map_err(candle_core::Error::wrap)
}

/// The weights of diffusers' `SD3Transformer2DModel` under the names of the original checkpoints.
struct Original {
    weights: Weights,
    /// The last block's context, which has no feed-forward, and whose modulation diffusers stores scale first.
    last: String,
}

/// Names of an MMDiT's parts outside of its blocks, original and diffusers'.
const PARTS: [(&str, &str); 8] = [
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
];

/// Names within a block: of the image, and of the context.
const LAYERS: [(&str, [&str; 2]); 9] = [
    ("adaLN_modulation.1", ["norm1.linear", "norm1_context.linear"]),
    ("attn.proj", ["attn.to_out.0", "attn.to_add_out"]),
    ("attn2.proj", ["attn2.to_out.0", ""]),
    ("attn.ln_q", ["attn.norm_q", "attn.norm_added_q"]),
    ("attn.ln_k", ["attn.norm_k", "attn.norm_added_k"]),
    ("attn2.ln_q", ["attn2.norm_q", ""]),
    ("attn2.ln_k", ["attn2.norm_k", ""]),
    ("mlp.fc1", ["ff.net.0.proj", "ff_context.net.0.proj"]),
    ("mlp.fc2", ["ff.net.2", "ff_context.net.2"]),
];

/// Names of queries, keys and values, which are one product in the original.
const PROJECTIONS: [(&str, [[&str; 3]; 2]); 2] = [
    ("attn.qkv", [["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]]),
    ("attn2.qkv", [["attn2.to_q", "attn2.to_k", "attn2.to_v"], ["", "", ""]]),
];

impl Original {
    /// diffusers' names of a weight; several are joined along the first dimension.
    fn stored(name: &str) -> Option<Vec<String>> {
        if name == "pos_embed" {
            return Some(vec!["pos_embed.pos_embed".to_owned()]);
        }
        let (layer, kind) = name.rsplit_once('.')?;
        if let Some((_, stored)) = PARTS.iter().find(|(part, _)| *part == layer) {
            return Some(vec![format!("{stored}.{kind}")]);
        }
        let (block, within) = layer.strip_prefix("joint_blocks.")?.split_once('.')?;
        let (side, within) = within.split_once("_block.")?;
        let side = usize::from(side == "context");
        let of_block = |layer: &&str| format!("transformer_blocks.{block}.{layer}.{kind}");
        if let Some((_, stored)) = PROJECTIONS.iter().find(|(layer, _)| *layer == within) {
            return Some(stored[side].iter().map(of_block).collect());
        }
        let (_, stored) = LAYERS.iter().find(|(layer, _)| *layer == within)?;
        Some(vec![of_block(&stored[side])])
    }
}

impl SimpleBackend for Original {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let Some(stored) = Self::stored(name) else { bail!("no weight {name}") };
        let mut dims = shape.dims().to_vec();
        if let Some(first) = dims.first_mut() {
            *first /= stored.len();
        }
        let parts = stored.iter().map(|name| take(&self.weights, name, &dims)).collect::<Result<Vec<_>>>()?;
        let mut whole = Tensor::cat(&parts, 0)?;
        let scale_first = name.starts_with("final_layer.adaLN") || name.starts_with(&format!("{}adaLN", self.last));
        if scale_first {
            let halves = whole.chunk(2, 0)?;
            whole = Tensor::cat(&[&halves[1], &halves[0]], 0)?;
        }
        whole.to_dtype(dtype)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("a shape is needed for {name}")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        Self::stored(name).is_some_and(|stored| stored.iter().all(|name| self.weights.at("").has(name)))
    }
}

fn number(config: &Value, key: &str) -> std::result::Result<usize, String> {
    config[key].as_u64().map(|number| number as usize).ok_or_else(|| format!("its {key} is {}", config[key]))
}

fn numbers(config: &Value, key: &str) -> Option<Vec<usize>> {
    config[key].as_array()?.iter().map(|number| Some(number.as_u64()? as usize)).collect()
}

/// Groups of every norm of its transformers.
const GROUPS: usize = 32;

/// The settings of a UNet by its `config.json`, or what candle-transformers lacks.
pub fn unet_settings(config: &Value) -> std::result::Result<UNet2DConditionModelConfig, String> {
    let flag = |key: &str| config[key].as_bool().unwrap_or_default();
    let real = |key: &str| config[key].as_f64().ok_or_else(|| format!("its {key} is {}", config[key]));
    for key in ["addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim"] {
        if !config[key].is_null() {
            return Err(format!("it has no {key}"));
        }
    }
    if config.get("mid_block_type").is_some_and(|middle| middle != "UNetMidBlock2DCrossAttn") {
        return Err(format!("it has no mid_block_type {}", config["mid_block_type"]));
    }
    if config["norm_num_groups"] != GROUPS {
        return Err(format!("its transformers have {GROUPS} groups, not {}", config["norm_num_groups"]));
    }
    let channels = numbers(config, "block_out_channels").ok_or("its block_out_channels are missing")?;
    // diffusers calls the number of heads attention_head_dim in these models.
    let heads = numbers(config, "attention_head_dim")
        .or_else(|| Some(vec![config["attention_head_dim"].as_u64()? as usize; channels.len()]))
        .filter(|heads| heads.len() == channels.len())
        .ok_or("its attention_head_dim is missing")?;
    let transformer = |block: &Value| match block.as_str() {
        Some("CrossAttnDownBlock2D" | "CrossAttnUpBlock2D") => Ok(Some(1)),
        Some("DownBlock2D" | "UpBlock2D") => Ok(None),
        _ => Err(format!("it has no block {block}")),
    };
    let of_blocks = |key: &str| -> std::result::Result<Vec<Option<usize>>, String> {
        config[key].as_array().into_iter().flatten().map(transformer).collect()
    };
    let (down, up) = (of_blocks("down_block_types")?, of_blocks("up_block_types")?);
    if down.len() != channels.len() || !down.iter().eq(up.iter().rev()) {
        return Err("its way up must mirror its way down".to_owned());
    }
    let blocks = channels.iter().zip(heads).zip(down);
    let block = |((&out_channels, attention_head_dim), use_cross_attn)| BlockConfig {
        out_channels,
        use_cross_attn,
        attention_head_dim,
    };
    Ok(UNet2DConditionModelConfig {
        center_input_sample: flag("center_input_sample"),
        flip_sin_to_cos: flag("flip_sin_to_cos"),
        freq_shift: real("freq_shift")?,
        blocks: blocks.map(block).collect(),
        layers_per_block: number(config, "layers_per_block")?,
        downsample_padding: number(config, "downsample_padding")?,
        mid_block_scale_factor: real("mid_block_scale_factor")?,
        norm_num_groups: number(config, "norm_num_groups")?,
        norm_eps: real("norm_eps")?,
        cross_attention_dim: number(config, "cross_attention_dim")?,
        sliced_attention_size: None,
        use_linear_projection: flag("use_linear_projection"),
    })
}

/// The settings of an MMDiT, or what candle-transformers' lacks.
fn mmdit(config: &Value) -> std::result::Result<MmditConfig, String> {
    let of = |key: &str| number(config, key);
    if of("num_layers")? != of("num_attention_heads")? {
        return Err("it has as many heads as layers".to_owned());
    }
    Ok(MmditConfig {
        patch_size: of("patch_size")?,
        in_channels: of("in_channels")?,
        out_channels: of("out_channels").or_else(|_| of("in_channels"))?,
        depth: of("num_layers")?,
        head_size: of("attention_head_dim")?,
        adm_in_channels: of("pooled_projection_dim")?,
        pos_embed_max_size: of("pos_embed_max_size")?,
        context_embed_size: of("joint_attention_dim")?,
        frequency_embedding_size: 256,
    })
}
