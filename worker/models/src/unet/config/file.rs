//! The UNet's `config.json`, with diffusers' defaults. Settings that would change the forward pass in unsupported ways
//! are refused by name.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{Level, Middle, TextTime, UnetConfig};
use crate::error::ModelError;
use crate::settings::{optional_square, refused, with_defaults};

/// One value per level, or one for all. If a list could be read either way, each value stands for a level.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum PerLevel<T> {
    Each(Vec<T>),
    All(T),
}

impl<T: Clone> PerLevel<T> {
    fn levels(&self, count: usize) -> Option<Vec<T>> {
        match self {
            Self::All(value) => Some(vec![value.clone(); count]),
            Self::Each(values) => (values.len() == count).then(|| values.clone()),
        }
    }
}

/// Number of blocks in a level's transformers: the same for all, or one number for each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Depth {
    Same(usize),
    Each(Vec<usize>),
}

impl Depth {
    /// The number of blocks in each of the first `count` transformers; `None` if too few are given or one is 0.
    fn of(&self, count: usize) -> Option<Vec<usize>> {
        let depths = match self {
            Self::Same(depth) => vec![*depth; count],
            Self::Each(depths) => depths.get(..count)?.to_vec(),
        };
        (!depths.contains(&0)).then_some(depths)
    }

    /// The number of blocks in the transformer after each of the `resnets`. Without attention, depths are ignored.
    fn transformers(&self, resnets: usize, attention: bool) -> Option<Vec<Option<usize>>> {
        if attention { Some(self.of(resnets)?.into_iter().map(Some).collect()) } else { Some(vec![None; resnets]) }
    }
}

/// The depths of the transformers of every level.
struct Depths {
    down: Vec<Depth>,
    up: Vec<Depth>,
    /// The setting that gives the depths for the way up.
    named_up: &'static str,
}

/// The setting with the depths of the transformers.
const FORWARD: &str = "transformer_layers_per_block";

/// The setting with the depths on the way up, from the coarsest level, if they differ.
const REVERSE: &str = "reverse_transformer_layers_per_block";

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
    /// Here `null` is a value and not the default.
    mid_block_type: Option<String>,
    only_cross_attention: PerLevel<bool>,
    layers_per_block: PerLevel<usize>,
    transformer_layers_per_block: PerLevel<Depth>,
    reverse_transformer_layers_per_block: Option<Vec<Depth>>,
    attention_head_dim: PerLevel<usize>,
    num_attention_heads: Option<PerLevel<usize>>,
    cross_attention_dim: PerLevel<usize>,
    norm_num_groups: usize,
    norm_eps: f64,
    use_linear_projection: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    time_cond_proj_dim: Option<usize>,
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
            mid_block_type: Some(CROSS_MIDDLE.to_owned()),
            only_cross_attention: PerLevel::All(false),
            layers_per_block: PerLevel::All(2),
            transformer_layers_per_block: PerLevel::All(Depth::Same(1)),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerLevel::All(8),
            num_attention_heads: None,
            cross_attention_dim: PerLevel::All(1280),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            use_linear_projection: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            time_cond_proj_dim: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
        }
    }
}

/// The default: a middle with attention.
const CROSS_MIDDLE: &str = "UNetMidBlock2DCrossAttn";

/// Settings for which `false` means unset, like `null`.
const OPTIONAL: [&str; 6] = [
    "addition_embed_type",
    "addition_time_embed_dim",
    "num_attention_heads",
    "projection_class_embeddings_input_dim",
    "reverse_transformer_layers_per_block",
    "time_cond_proj_dim",
];

/// Settings that must have this value or be absent, since only that forward pass is implemented. `false` counts as
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
    ("mid_block_scale_factor", "1"),
    ("num_class_embeds", "null"),
    ("resnet_skip_time_act", "false"),
    ("resnet_time_scale_shift", "\"default\""),
    ("time_embedding_act_fn", "null"),
    ("time_embedding_dim", "null"),
    ("time_embedding_type", "\"positional\""),
    ("timestep_post_act", "null"),
];

/// The settings among `values`, checked.
pub(super) fn checked(path: &Path, mut values: Value) -> Result<UnetConfig, ModelError> {
    for key in OPTIONAL {
        if values.get(key) == Some(&Value::Bool(false)) {
            values[key] = Value::Null;
        }
    }
    let refuse = |key: &str| refused(path, key, values.get(key));
    let is_null = |key: &str| values.get(key).is_some_and(Value::is_null);
    if let Some((key, _)) = FIXED.iter().find(|(key, expected)| !is_as_expected(&values, key, expected)) {
        return Err(refuse(key));
    }
    if is_null("norm_num_groups") {
        return Err(refuse("norm_num_groups"));
    }
    let mut raw = with_defaults::<Raw>(path, values.clone())?;
    if is_null("mid_block_type") {
        raw.mid_block_type = None;
    }
    raw.check().map_err(refuse)
}

fn is_as_expected(values: &Value, key: &str, expected: &str) -> bool {
    values.get(key).filter(|value| !value.is_null()).is_none_or(|value| {
        let text = value.to_string();
        text == expected
            || value.as_f64().is_some_and(|value| expected.parse() == Ok(value))
            || (expected == "null" && *value == Value::Bool(false))
            || (key == "act_fn" && text == "\"swish\"")
    })
}

impl Raw {
    /// Fails with the key of an unsupported setting.
    fn check(self) -> Result<UnetConfig, &'static str> {
        let levels = self.levels()?;
        let middle = self.middle(levels.len())?;
        let attends = levels.iter().any(|level| level.down.iter().chain(&level.up).any(Option::is_some));
        if !attends && !matches!(middle, Middle::Transformer(_)) {
            // Without attention nothing would depend on the prompt.
            return Err("down_block_types");
        }
        // The sinusoid divides by half its width minus one.
        if self.time_cond_proj_dim.is_some_and(|width| width < 4) {
            return Err("time_cond_proj_dim");
        }
        Ok(UnetConfig {
            sample_size: self.sample_size.filter(|side| *side > 0).ok_or("sample_size")?,
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift,
            guidance: self.time_cond_proj_dim,
            text_time: self.text_time()?,
            levels,
            middle,
        })
    }

    fn levels(&self) -> Result<Vec<Level>, &'static str> {
        let count = self.block_out_channels.len();
        let down = attention(&self.down_block_types, "DownBlock2D", count).ok_or("down_block_types")?;
        let up = attention(&self.up_block_types, "UpBlock2D", count).ok_or("up_block_types")?;
        // diffusers reads `attention_head_dim` as the number of heads when `num_attention_heads` is absent.
        let heads = self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim);
        let heads = heads.levels(count).ok_or("attention_head_dim")?;
        let layers = self.layers_per_block.levels(count).filter(|layers| !layers.contains(&0));
        let layers = layers.filter(|layers| !layers.is_empty()).ok_or("layers_per_block")?;
        let text = self.cross_attention_dim.levels(count).ok_or("cross_attention_dim")?;
        let only_cross = self.only_cross_attention.levels(count).ok_or("only_cross_attention")?;
        let depths = self.depths(count)?;
        let level = |i: usize| {
            let channels = self.block_out_channels[i];
            if heads[i] == 0 || !channels.is_multiple_of(heads[i]) {
                return Err("attention_head_dim");
            }
            Ok(Level {
                channels,
                heads: heads[i],
                text: text[i],
                only_cross: only_cross[i],
                down: depths.down[i].transformers(layers[i], down[i]).ok_or(FORWARD)?,
                up: depths.up[i].transformers(layers[i] + 1, up[count - 1 - i]).ok_or(depths.named_up)?,
            })
        };
        (0..count).map(level).collect()
    }

    fn depths(&self, count: usize) -> Result<Depths, &'static str> {
        let down = self.transformer_layers_per_block.levels(count).ok_or(FORWARD)?;
        match &self.reverse_transformer_layers_per_block {
            Some(up) if up.len() == count => {
                Ok(Depths { down, up: up.iter().rev().cloned().collect(), named_up: REVERSE })
            }
            Some(_) => Err(REVERSE),
            // One depth per resnet does not define the way up, which has one more resnet.
            None if down.iter().any(|depth| matches!(depth, Depth::Each(_))) => Err(REVERSE),
            None => Ok(Depths { up: down.clone(), down, named_up: FORWARD }),
        }
    }

    fn middle(&self, count: usize) -> Result<Middle, &'static str> {
        match self.mid_block_type.as_deref() {
            None => Ok(Middle::Nothing),
            Some("UNetMidBlock2D") => Ok(Middle::Resnet),
            Some(CROSS_MIDDLE) => match self.depths(count)?.down.last().and_then(|depth| depth.of(1)).as_deref() {
                Some([depth]) => Ok(Middle::Transformer(*depth)),
                _ => Err(FORWARD),
            },
            Some(_) => Err("mid_block_type"),
        }
    }

    fn text_time(&self) -> Result<Option<TextTime>, &'static str> {
        match self.addition_embed_type.as_deref() {
            None => Ok(None),
            Some("text_time") => {
                let width = self.addition_time_embed_dim.ok_or("addition_time_embed_dim")?;
                let inputs = self.projection_class_embeddings_input_dim.filter(|inputs| *inputs > 6 * width);
                Ok(Some(TextTime { width, inputs: inputs.ok_or("projection_class_embeddings_input_dim")? }))
            }
            Some(_) => Err("addition_embed_type"),
        }
    }
}

/// Which blocks have attention (`CrossAttn` before the name of the `bare` block); `None` if a type is unknown or
/// missing.
fn attention(types: &[String], bare: &str, count: usize) -> Option<Vec<bool>> {
    let kind = |name: &String| match name.strip_suffix(bare)? {
        "" => Some(false),
        "CrossAttn" => Some(true),
        _ => None,
    };
    types.iter().map(kind).collect::<Option<Vec<bool>>>().filter(|kinds| kinds.len() == count)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(change: impl FnOnce(&mut Value)) -> Result<UnetConfig, String> {
        let mut settings = json!({ "sample_size": 8, "_class_name": "UNet2DConditionModel" });
        change(&mut settings);
        checked(Path::new("unet/config.json"), settings).map_err(|error| error.to_string())
    }

    #[test]
    fn squares_and_false_in_place_of_null_are_read() {
        assert_eq!(read(|settings| settings["sample_size"] = json!([8, 8])).unwrap().sample_size, 8);
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
    fn unsupported_settings_are_named_with_file_and_value() {
        let cases = [
            ("sample_size", json!([8, 16])),
            ("in_channels", "four".into()),
            ("cross_attention_dim", "wide".into()),
            ("_class_name", "UNet3DConditionModel".into()),
            ("norm_num_groups", Value::Null),
            ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn".into()),
            ("mid_block_type", false.into()),
            ("down_block_types", json!(["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"])),
            ("only_cross_attention", json!([true, false])),
            ("time_cond_proj_dim", 2.into()),
            ("time_cond_proj_dim", true.into()),
            ("transformer_layers_per_block", json!([1, 2, 0, 1])),
            ("reverse_transformer_layers_per_block", json!([1, 2, 1])),
            ("reverse_transformer_layers_per_block", json!([1, [1, 1], 1, 1])),
            ("layers_per_block", 0.into()),
            ("attention_head_dim", 7.into()),
        ];
        for (key, value) in cases {
            let error = read(|settings| settings[key] = value.clone()).unwrap_err();
            assert!(error.contains("unet/config.json") && error.contains(key), "{error}");
            assert!(!error.contains("not supported") || error.contains(&format!("{key} = {value}")), "{error}");
        }
        // Depths that differ within a level do not define the way up.
        let error = read(|settings| settings["transformer_layers_per_block"] = json!([1, [2, 2], 1, 1])).unwrap_err();
        assert!(error.contains("reverse_transformer_layers_per_block"), "{error}");
        let bare = |settings: &mut Value| {
            settings["down_block_types"] = json!(vec!["DownBlock2D"; 4]);
            settings["up_block_types"] = json!(vec!["UpBlock2D"; 4]);
            settings["mid_block_type"] = Value::Null;
        };
        assert!(read(bare).unwrap_err().contains("down_block_types"));
    }

    #[test]
    fn depths_may_be_given_per_level_and_per_transformer() {
        let config = read(|settings| {
            settings["transformer_layers_per_block"] = json!([1, [2, 3], [4, 5, 6], 0]);
            settings["reverse_transformer_layers_per_block"] = json!([0, [7, 8, 9], [3, 2, 1], 2]);
            settings["mid_block_type"] = "UNetMidBlock2D".into();
            settings["only_cross_attention"] = json!([true, false, false, false]);
        })
        .unwrap();
        let depths = |part: fn(&Level) -> &Vec<Option<usize>>| {
            let levels = config.levels.iter().map(part);
            levels.map(|depths| depths.iter().map(|depth| depth.unwrap_or(0)).collect()).collect::<Vec<Vec<usize>>>()
        };
        assert_eq!(depths(|level| &level.down), [vec![1, 1], vec![2, 3], vec![4, 5], vec![0, 0]]);
        assert_eq!(depths(|level| &level.up), [vec![2, 2, 2], vec![3, 2, 1], vec![7, 8, 9], vec![0, 0, 0]]);
        assert_eq!(config.middle, Middle::Resnet);
        assert_eq!(config.levels.iter().map(|level| level.only_cross).collect::<Vec<_>>(), [true, false, false, false]);
        let same = read(|settings| settings["transformer_layers_per_block"] = json!([1, 2, 10, 3])).unwrap();
        assert_eq!((same.levels[2].up.as_slice(), same.middle), (&[Some(10); 3][..], Middle::Transformer(3)));
    }
}
