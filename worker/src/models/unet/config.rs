//! The UNet's `config.json`, with diffusers' defaults; settings that would change the forward pass in ways not
//! implemented here are refused by name.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::models::checkpoint::{ModelError, read_json, unsupported};
use crate::models::settings::{optional_square, with_defaults};

/// One value for all levels or one per level.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum PerLevel<T> {
    All(T),
    Each(Vec<T>),
}

impl<T: Clone> PerLevel<T> {
    fn levels(&self, count: usize) -> Option<Vec<T>> {
        match self {
            Self::All(value) => Some(vec![value.clone(); count]),
            Self::Each(values) => (values.len() == count).then(|| values.clone()),
        }
    }
}

/// The settings as written; see [`UnetConfig`] for their meaning.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Raw {
    #[serde(deserialize_with = "optional_square")]
    sample_size: Option<usize>,
    in_channels: usize,
    out_channels: usize,
    block_out_channels: Vec<usize>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    layers_per_block: PerLevel<usize>,
    transformer_layers_per_block: PerLevel<usize>,
    attention_head_dim: PerLevel<usize>,
    num_attention_heads: Option<PerLevel<usize>>,
    cross_attention_dim: PerLevel<usize>,
    norm_num_groups: usize,
    norm_eps: f64,
    use_linear_projection: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    addition_embed_type: Option<String>,
    addition_time_embed_dim: Option<usize>,
    projection_class_embeddings_input_dim: Option<usize>,
}

impl Default for Raw {
    fn default() -> Self {
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let (cross_down, cross_up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            block_out_channels: vec![320, 640, 1280, 1280],
            down_block_types: names(&[cross_down, cross_down, cross_down, "DownBlock2D"]),
            up_block_types: names(&["UpBlock2D", cross_up, cross_up, cross_up]),
            layers_per_block: PerLevel::All(2),
            transformer_layers_per_block: PerLevel::All(1),
            attention_head_dim: PerLevel::All(8),
            num_attention_heads: None,
            cross_attention_dim: PerLevel::All(1280),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            use_linear_projection: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
        }
    }
}

/// Settings that `false` leaves out as `null` does.
const OPTIONAL: [&str; 4] =
    ["addition_embed_type", "addition_time_embed_dim", "num_attention_heads", "projection_class_embeddings_input_dim"];

/// Settings that must have one value (or be absent) for the forward pass to be the one implemented. `false` is as good as
/// `null`.
const FIXED: &[(&str, &str)] = &[
    ("_class_name", "\"UNet2DConditionModel\""),
    ("act_fn", "\"silu\""),
    ("attention_type", "\"default\""),
    ("center_input_sample", "false"),
    ("class_embed_type", "null"),
    ("class_embeddings_concat", "false"),
    ("conv_in_kernel", "3"),
    ("conv_out_kernel", "3"),
    ("cross_attention_norm", "null"),
    ("downsample_padding", "1"),
    ("dual_cross_attention", "false"),
    ("encoder_hid_dim", "null"),
    ("encoder_hid_dim_type", "null"),
    ("mid_block_only_cross_attention", "null"),
    ("mid_block_scale_factor", "1"),
    ("mid_block_type", "\"UNetMidBlock2DCrossAttn\""),
    ("num_class_embeds", "null"),
    ("only_cross_attention", "false"),
    ("resnet_skip_time_act", "false"),
    ("resnet_time_scale_shift", "\"default\""),
    ("reverse_transformer_layers_per_block", "null"),
    ("time_cond_proj_dim", "null"),
    ("time_embedding_act_fn", "null"),
    ("time_embedding_dim", "null"),
    ("time_embedding_type", "\"positional\""),
    ("timestep_post_act", "null"),
];

/// One resolution level of the UNet.
#[derive(Clone, Debug)]
pub(super) struct Level {
    /// Channels.
    pub(super) channels: usize,
    /// Attention heads.
    pub(super) heads: usize,
    /// Resnets on the way down; one more on the way up.
    pub(super) layers: usize,
    /// Transformer blocks after each resnet where there is attention.
    pub(super) depth: usize,
    /// Width of the text embedding.
    pub(super) text: usize,
    /// Attention on the way down.
    pub(super) down_attention: bool,
    /// Attention on the way up.
    pub(super) up_attention: bool,
}

/// SDXL's additional embedding of the pooled text and six sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextTime {
    /// Width of one size's sinusoid.
    pub(super) width: usize,
    /// Width of the pooled text and the six sinusoids together.
    pub(super) inputs: usize,
}

/// A UNet2DConditionModel's settings, checked.
///
/// `upcast_attention` and `resnet_out_scale_factor` have no effect on these blocks in f32, and `use_linear_projection`
/// only changes a weight's stored shape.
#[derive(Clone, Debug)]
pub(super) struct UnetConfig {
    /// Height and width of the latents the model was trained on.
    pub(super) sample_size: usize,
    /// Channels of the latents.
    pub(super) in_channels: usize,
    /// Channels of the output.
    pub(super) out_channels: usize,
    /// Groups of every group norm.
    pub(super) groups: usize,
    /// Epsilon of the resnets' norms.
    pub(super) eps: f64,
    /// Cosines before sines in the time embedding.
    pub(super) flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the time embedding's exponent.
    pub(super) freq_shift: f64,
    /// Additional conditioning.
    pub(super) text_time: Option<TextTime>,
    /// From the finest to the coarsest.
    pub(super) levels: Vec<Level>,
}

impl UnetConfig {
    /// Reads and checks a configuration.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let mut values: Value = read_json(path)?;
        for (key, expected) in FIXED {
            let found = values.get(key).filter(|v| !v.is_null());
            let same = found.is_none_or(|v| {
                let text = v.to_string();
                text == *expected
                    || v.as_f64().is_some_and(|v| expected.parse() == Ok(v))
                    || (*expected == "null" && *v == Value::Bool(false))
                    || (*key == "act_fn" && text == "\"swish\"")
            });
            if !same {
                return Err(unsupported(path, key, found));
            }
        }
        for key in OPTIONAL {
            if values.get(key) == Some(&Value::Bool(false)) {
                values[key] = Value::Null;
            }
        }
        with_defaults::<Raw>(path, values)?.check(path.to_owned())
    }
}

impl Raw {
    fn check(self, path: PathBuf) -> Result<UnetConfig, ModelError> {
        let count = self.block_out_channels.len();
        let per_level = |key: &str, setting: &PerLevel<usize>| {
            setting.levels(count).ok_or_else(|| unsupported(&path, key, setting))
        };
        let attention = |key: &str, types: &[String], cross: &str, bare: &str| {
            let known = types.iter().find(|t| *t != cross && *t != bare);
            match known {
                Some(other) => Err(unsupported(&path, key, other)),
                None if types.len() != count => Err(unsupported(&path, key, types)),
                None => Ok(types.iter().map(|t| t == cross).collect::<Vec<bool>>()),
            }
        };
        let down = attention("down_block_types", &self.down_block_types, "CrossAttnDownBlock2D", "DownBlock2D")?;
        let up = attention("up_block_types", &self.up_block_types, "CrossAttnUpBlock2D", "UpBlock2D")?;
        // diffusers reads `attention_head_dim` as the number of heads when `num_attention_heads` is absent.
        let heads = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim);
        let heads = per_level("attention_head_dim", heads)?;
        let layers = per_level("layers_per_block", &self.layers_per_block)?;
        let depth = per_level("transformer_layers_per_block", &self.transformer_layers_per_block)?;
        let text = per_level("cross_attention_dim", &self.cross_attention_dim)?;
        let levels: Vec<Level> = (0..count)
            .map(|i| Level {
                channels: self.block_out_channels[i],
                heads: heads[i],
                layers: layers[i],
                depth: depth[i],
                text: text[i],
                down_attention: down[i],
                up_attention: up[count - 1 - i],
            })
            .collect();
        if count == 0 || layers.contains(&0) {
            return Err(unsupported(&path, "layers_per_block", layers));
        }
        if depth.contains(&0) {
            return Err(unsupported(&path, "transformer_layers_per_block", depth));
        }
        if levels.iter().any(|l| l.heads == 0 || !l.channels.is_multiple_of(l.heads)) {
            return Err(unsupported(&path, "attention_head_dim", heads));
        }
        let text_time = match (self.addition_embed_type.as_deref(), self.addition_time_embed_dim) {
            (None, _) => None,
            (Some("text_time"), Some(width)) => {
                let inputs = self.projection_class_embeddings_input_dim.unwrap_or(0);
                if inputs <= 6 * width {
                    return Err(unsupported(&path, "projection_class_embeddings_input_dim", inputs));
                }
                Some(TextTime { width, inputs })
            }
            (Some("text_time"), None) => return Err(unsupported(&path, "addition_time_embed_dim", None::<usize>)),
            (other, _) => return Err(unsupported(&path, "addition_embed_type", other)),
        };
        let Some(sample_size) = self.sample_size.filter(|s| *s > 0) else {
            return Err(unsupported(&path, "sample_size", self.sample_size));
        };
        Ok(UnetConfig {
            sample_size,
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift,
            text_time,
            levels,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(change: impl FnOnce(&mut Value)) -> Result<UnetConfig, String> {
        let mut settings = serde_json::json!({ "sample_size": 8, "_class_name": "UNet2DConditionModel" });
        change(&mut settings);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, settings.to_string()).unwrap();
        UnetConfig::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn squares_and_false_in_the_place_of_null_are_read() {
        assert_eq!(read(|settings| settings["sample_size"] = serde_json::json!([8, 8])).unwrap().sample_size, 8);
        for (key, _) in FIXED.iter().filter(|(_, expected)| ["null", "false"].contains(expected)) {
            assert!(read(|settings| settings[key] = false.into()).is_ok(), "{key}");
            assert!(read(|settings| settings[key] = Value::Null).is_ok(), "{key}");
            assert!(read(|settings| settings[key] = true.into()).unwrap_err().contains(key), "{key}");
        }
        for key in OPTIONAL {
            assert!(read(|settings| settings[key] = false.into()).is_ok(), "{key}");
        }
    }

    #[test]
    fn what_can_not_be_read_is_named_with_its_file() {
        let cases = [
            ("sample_size", serde_json::json!([8, 16])),
            ("in_channels", "four".into()),
            ("cross_attention_dim", "wide".into()),
            ("_class_name", "UNet3DConditionModel".into()),
        ];
        for (key, value) in cases {
            let error = read(|settings| settings[key] = value).unwrap_err();
            assert!(error.contains("config.json") && error.contains(key), "{error}");
        }
    }
}
