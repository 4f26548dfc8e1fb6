//! The names of kohya's sd-scripts: `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`.
//!
//! Dots have become underscores, so a module can be identified only by comparing with the model's own names. Adapters
//! for SDXL use the UNet module names of its first release (`input_blocks_4_1`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value;

use super::super::error::ModelError;
use super::super::names;
use super::super::settings::read_json;
use super::super::stored::StoredWeights;
use super::key::{Key, MERGE, Role};
use super::wrong;

/// Name prefixes and their components.
const STARTS: [(&str, &str); 6] = [
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
];

/// Unsupported adapter kinds under the same prefixes, by a part of the key.
const OTHERS: [(&str, &str); 7] = [
    (".dora_scale", "DoRA"),
    (".lora_mid.", "LoCon with Tucker decomposition"),
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".oft_", "OFT"),
    (".diff", "a difference of full weights"),
    (".bias", "a bias"),
];

/// Finds the modules of one model for kohya's names.
#[derive(Debug)]
pub(super) struct Kohya<'a> {
    adapter: &'a Path,
    model: &'a Path,
    /// For each component, its modules by their names with underscores.
    modules: BTreeMap<&'static str, HashMap<String, String>>,
}

impl<'a> Kohya<'a> {
    pub(super) fn new(adapter: &'a Path, model: &'a Path) -> Self {
        Self { adapter, model, modules: BTreeMap::new() }
    }

    /// Parses a key; `None` if it is not one of kohya's.
    pub(super) fn parse(&mut self, key: &str) -> Result<Option<Key>, ModelError> {
        let start = STARTS.into_iter().find_map(|(start, component)| Some((key.strip_prefix(start)?, component)));
        let Some((rest, mut component)) = start else { return Ok(None) };
        // The scripts also call the network of Stable Diffusion 3 a UNet.
        if component == "unet" && !self.model.join("unet").is_dir() && self.model.join("transformer").is_dir() {
            component = "transformer";
        }
        let role = match rest.split_once('.') {
            Some((name, "lora_down.weight")) => Some((name, Role::Down)),
            Some((name, "lora_up.weight")) => Some((name, Role::Up)),
            Some((name, "alpha")) => Some((name, Role::Alpha)),
            _ => None,
        };
        let Some((name, role)) = role else {
            let kind =
                OTHERS.iter().find(|(part, _)| rest.contains(part)).map_or("not a LoRA weight", |(_, kind)| *kind);
            return Err(wrong(self.adapter, format!("{key} is {kind}, which is not supported; {MERGE}")));
        };
        let layers = self.layers_per_block();
        let modules = self.modules(component)?;
        let found = modules.get(name).or_else(|| modules.get(&usual_name(name, layers)?));
        match found {
            Some(module) => Ok(Some(Key { component: Some(component), module: module.clone(), role })),
            None => {
                let message =
                    format!("{key}: the model's {component} has no module of this name; use an adapter made for it");
                Err(wrong(self.adapter, format!("{message}, or {MERGE}")))
            }
        }
    }

    /// Resnets per level of the UNet on the way down. If levels differ, SDXL's original names can't be resolved.
    fn layers_per_block(&self) -> usize {
        let config: Result<Value, _> = read_json(&self.model.join("unet/config.json"));
        let layers = config.ok().and_then(|config| config.get("layers_per_block")?.as_u64());
        layers.map_or(2, |layers| layers as usize)
    }

    fn modules(&mut self, component: &'static str) -> Result<&HashMap<String, String>, ModelError> {
        if !self.modules.contains_key(component) {
            let modules = underscored(self.adapter, self.model, component)?;
            self.modules.insert(component, modules);
        }
        Ok(self.modules.entry(component).or_default())
    }
}

/// The modules of a component that have weights, by their names with underscores.
fn underscored(adapter: &Path, model: &Path, component: &'static str) -> Result<HashMap<String, String>, ModelError> {
    let dir = model.join(component);
    if !dir.is_dir() {
        return Err(wrong(adapter, format!("the model has no {component}; use an adapter made for it")));
    }
    let stem = if component.starts_with("text_encoder") { "model" } else { "diffusion_pytorch_model" };
    let weights = StoredWeights::open(&dir, stem, names::of_component(component))?;
    let modules = weights.names().filter_map(|name| name.strip_suffix(".weight"));
    let mut found = HashMap::new();
    for module in modules {
        if let Some(other) = found.insert(module.replace('.', "_"), module.to_owned()) {
            return Err(wrong(
                adapter,
                format!("{component} has both {module} and {other}, which have the same name in kohya's format"),
            ));
        }
    }
    Ok(found)
}

/// diffusers' name, with underscores, for a module name from SDXL's first release. `layers` is the number of resnets
/// per level.
fn usual_name(name: &str, layers: usize) -> Option<String> {
    const NAMES: [(&str, &str); 7] = [
        ("time_embed_0", "time_embedding_linear_1"),
        ("time_embed_2", "time_embedding_linear_2"),
        ("label_emb_0_0", "add_embedding_linear_1"),
        ("label_emb_0_2", "add_embedding_linear_2"),
        ("input_blocks_0_0", "conv_in"),
        ("out_0", "conv_norm_out"),
        ("out_2", "conv_out"),
    ];
    if let Some((_, usual)) = NAMES.iter().find(|(first, _)| *first == name) {
        return Some((*usual).to_owned());
    }
    let number = |text: &str| text.parse::<usize>().ok();
    if let Some(rest) = name.strip_prefix("middle_block_") {
        let (block, rest) = rest.split_once('_')?;
        let kind = ["resnets_0", "attentions_0", "resnets_1"].get(number(block)?)?;
        return Some(format!("mid_block_{kind}_{}", usual_layer(rest)));
    }
    let is_down = name.starts_with("input_blocks_");
    let rest = name.strip_prefix("input_blocks_").or_else(|| name.strip_prefix("output_blocks_"))?;
    let (block, rest) = rest.split_once('_')?;
    let (inner, rest) = rest.split_once('_')?;
    // Input block 0 is the first convolution.
    let at = if is_down { number(block)?.checked_sub(1)? } else { number(block)? };
    let (level, layer) = (at / (layers + 1), at % (layers + 1));
    let side = if is_down { "down_blocks" } else { "up_blocks" };
    Some(match (rest, number(inner)?) {
        ("op", _) => format!("{side}_{level}_downsamplers_0_conv"),
        ("conv", 1 | 2) => format!("{side}_{level}_upsamplers_0_conv"),
        (rest, 0) => format!("{side}_{level}_resnets_{layer}_{}", usual_layer(rest)),
        (rest, 1) => format!("{side}_{level}_attentions_{layer}_{rest}"),
        _ => return None,
    })
}

/// diffusers' name of a resnet's layer. Names of attention layers stay the same.
fn usual_layer(first: &str) -> &str {
    match first {
        "in_layers_0" => "norm1",
        "in_layers_2" => "conv1",
        "out_layers_0" => "norm2",
        "out_layers_3" => "conv2",
        "emb_layers_1" => "time_emb_proj",
        "skip_connection" => "conv_shortcut",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn original_sdxl_names_are_translated() {
        // As in diffusers' _maybe_map_sgm_blocks_to_diffusers and _convert_unet_lora_key.
        let cases = [
            (
                "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            ),
            ("input_blocks_5_0_in_layers_2", "down_blocks_1_resnets_1_conv1"),
            ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
            ("middle_block_1_proj_in", "mid_block_attentions_0_proj_in"),
            ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
            (
                "output_blocks_5_1_transformer_blocks_1_ff_net_0_proj",
                "up_blocks_1_attentions_2_transformer_blocks_1_ff_net_0_proj",
            ),
            ("output_blocks_5_2_conv", "up_blocks_1_upsamplers_0_conv"),
            ("output_blocks_0_0_emb_layers_1", "up_blocks_0_resnets_0_time_emb_proj"),
            ("output_blocks_8_0_skip_connection", "up_blocks_2_resnets_2_conv_shortcut"),
            ("time_embed_2", "time_embedding_linear_2"),
            ("label_emb_0_0", "add_embedding_linear_1"),
        ];
        for (first, usual) in cases {
            assert_eq!(usual_name(first, 2).as_deref(), Some(usual), "{first}");
        }
        for other in ["joint_blocks_0_x_block_attn_qkv", "input_blocks_0_1_x", "input_blocks_x_1_y", "output_blocks_9"]
        {
            assert_eq!(usual_name(other, 2), None, "{other}");
        }
    }
}
