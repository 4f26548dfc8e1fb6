//! Detects models that were distilled from others: to fewer steps (Turbo, Lightning, LCM) or to fewer layers (BK-SDM,
//! SSD-1B).
//!
//! The authors of such a model measured its generated images. The errors that labels depend on were never measured, so
//! `elbo inspect` warns about it. No single setting marks a distilled model. The signs are settings that no other model
//! has, and model names.

use std::path::Path;

use elbo_hub::model_files::MODEL_INDEX;
use serde_json::Value;

use super::family::Family;
use super::settings::read_json;

/// Name parts of models distilled to fewer steps.
const FEWER_STEPS: [&str; 11] =
    ["turbo", "lightning", "lcm", "hyper-sd", "hyper-sdxl", "tcd", "dmd", "dmd2", "schnell", "instaflow", "distilled"];

/// Name parts of models distilled to fewer layers.
const FEWER_LAYERS: [&str; 8] =
    ["bk-sdm", "tiny-sd", "small-sd", "ssd-1b", "segmind-vega", "koala-700m", "koala-1b", "sdxs"];

/// The scheduler's configuration.
const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// Channels of the finest level in every released Stable Diffusion. Each of their levels has two resnets on the way
/// down.
const FULL_WIDTH: u64 = 320;

/// Notes on the model in `dir`, whose user-visible name is `called`; empty if nothing suggests that it was distilled.
pub(super) fn notes(dir: &Path, family: Family, called: &str) -> Vec<String> {
    let signs = Signs::of(dir, family, called);
    let kinds = [("steps", signs.fewer_steps()), ("layers", signs.fewer_layers())];
    let note = |(what, sign): (&str, Option<String>)| {
        sign.map(|sign| {
            format!(
                "probably distilled to fewer {what} ({sign}): its errors were never measured for labelling, so compare \
                 its labels with known ones before you trust them"
            )
        })
    };
    kinds.into_iter().filter_map(note).collect()
}

/// The places to look for signs.
struct Signs {
    names: Vec<String>,
    index: Value,
    scheduler: Value,
    network: Value,
    network_file: String,
    family: Family,
}

impl Signs {
    fn of(dir: &Path, family: Family, called: &str) -> Self {
        // Loading the model reports files that can't be read.
        let read = |name: &str| read_json::<Value>(&dir.join(name)).unwrap_or_default();
        let network_file = format!("{}/config.json", family.network());
        let (index, network) = (read(MODEL_INDEX), read(&network_file));
        let place = std::fs::canonicalize(dir).unwrap_or_default();
        let written = [&index, &network].into_iter().filter_map(|json| json["_name_or_path"].as_str());
        let place = place.to_string_lossy();
        let names = [called, &place].into_iter().chain(written).filter_map(own_name).map(str::to_owned).collect();
        Self { names, scheduler: read(SCHEDULER), index, network, network_file, family }
    }

    fn fewer_steps(&self) -> Option<String> {
        let (index, scheduler) = (class(&self.index), class(&self.scheduler));
        let zero_snr = self.scheduler["rescale_betas_zero_snr"] == true;
        let epsilon = self.scheduler["prediction_type"].as_str().unwrap_or("epsilon") == "epsilon";
        if self.network["time_cond_proj_dim"].is_u64() {
            Some(format!(
                "{}: time_cond_proj_dim, an input for a guidance scale, which is set to no guidance",
                self.network_file
            ))
        } else if index == "LatentConsistencyModelPipeline" {
            Some(format!("{MODEL_INDEX}: {index}"))
        } else if ["LCMScheduler", "TCDScheduler"].contains(&scheduler) {
            Some(format!("{SCHEDULER}: {scheduler}"))
        } else if self.is_unet() && self.scheduler["timestep_spacing"] == "trailing" && epsilon && !zero_snr {
            Some(format!("{SCHEDULER}: timestep_spacing is trailing, as for Turbo and Lightning"))
        } else {
            self.named(&FEWER_STEPS)
        }
    }

    fn fewer_layers(&self) -> Option<String> {
        let set = |key: &str| self.network.get(key).filter(|value| !value.is_null() && **value != false);
        let middle = self.network.get("mid_block_type").filter(|middle| **middle != "UNetMidBlock2DCrossAttn");
        let one_resnet = self.network["layers_per_block"] == 1;
        let full_width = self.network["block_out_channels"][0].as_u64().is_some_and(|width| width >= FULL_WIDTH);
        let sign = |setting: String| Some(format!("{}: {setting}", self.network_file));
        match (middle, set("reverse_transformer_layers_per_block")) {
            (Some(middle), _) if self.is_unet() => sign(format!("mid_block_type is {middle}")),
            (_, Some(depths)) if self.is_unet() => sign(format!("reverse_transformer_layers_per_block is {depths}")),
            _ if self.is_unet() && one_resnet && full_width => sign("layers_per_block is 1".to_owned()),
            _ => self.named(&FEWER_LAYERS),
        }
    }

    fn is_unet(&self) -> bool {
        matches!(self.family, Family::StableDiffusion | Family::Sdxl)
    }

    /// The first name that contains one of these words.
    fn named(&self, words: &[&str]) -> Option<String> {
        let has = |name: &&String| {
            let plain = |c: char| if c.is_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
            let name = format!("-{}-", name.chars().map(plain).collect::<String>());
            words.iter().any(|word| name.contains(&format!("-{word}-")))
        };
        self.names.iter().find(has).map(|name| format!("it is called {name}"))
    }
}

/// The last part of a model's path; in the hub's cache, the part before `snapshots`.
fn own_name(path: &str) -> Option<&str> {
    let mut parts = path.split(['/', '\\']).rev().filter(|part| !part.is_empty());
    let last = parts.next()?;
    match parts.next() {
        Some("snapshots") => parts.next(),
        _ => Some(last),
    }
}

fn class(config: &Value) -> &str {
    config["_class_name"].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The notes on a model with these files.
    fn said(called: &str, family: Family, files: &[(&str, Value)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content.to_string()).unwrap();
        }
        notes(dir.path(), family, called)
    }

    #[test]
    fn fewer_steps_are_detected_from_settings_and_names() {
        let unet = |config| [("unet/config.json", config)];
        let scheduler = |config| [(SCHEDULER, config)];
        let cases = [
            ("a", unet(json!({"time_cond_proj_dim": 256})), "unet/config.json: time_cond_proj_dim"),
            (
                "a",
                [(MODEL_INDEX, json!({"_class_name": "LatentConsistencyModelPipeline"}))],
                "model_index.json: Latent",
            ),
            ("a", scheduler(json!({"_class_name": "LCMScheduler"})), "LCMScheduler"),
            ("a", scheduler(json!({"timestep_spacing": "trailing"})), "trailing"),
            ("stabilityai/sd-turbo@main", unet(json!({})), "it is called sd-turbo@main"),
            ("/models/LCM_Dreamshaper_v7/", unet(json!({})), "it is called LCM_Dreamshaper_v7"),
            ("hub/models--stabilityai--sdxl-turbo/snapshots/0a1", unet(json!({})), "models--stabilityai--sdxl-turbo"),
            ("a", unet(json!({"_name_or_path": "ByteDance/SDXL-Lightning"})), "it is called SDXL-Lightning"),
        ];
        for (called, files, sign) in cases {
            let said = said(called, Family::StableDiffusion, &files);
            assert!(said.len() == 1 && said[0].contains("fewer steps") && said[0].contains(sign), "{said:?}");
            assert!(said[0].contains("never measured for labelling"), "{said:?}");
        }
    }

    #[test]
    fn fewer_layers_are_detected_from_settings_and_names() {
        let cases = [
            ("a", json!({"mid_block_type": null}), "mid_block_type is null"),
            ("a", json!({"mid_block_type": "UNetMidBlock2D"}), "mid_block_type is \"UNetMidBlock2D\""),
            ("a", json!({"reverse_transformer_layers_per_block": [[4, 4, 10], 1]}), "[[4,4,10],1]"),
            ("a", json!({"layers_per_block": 1, "block_out_channels": [320, 640]}), "layers_per_block is 1"),
            ("nota-ai/bk-sdm-base", json!({}), "it is called bk-sdm-base"),
        ];
        for (called, config, sign) in cases {
            let said = said(called, Family::Sdxl, &[("unet/config.json", config)]);
            assert!(said.len() == 1 && said[0].contains("fewer layers") && said[0].contains(sign), "{said:?}");
        }
    }

    #[test]
    fn other_models_give_no_notes() {
        let full = json!({"mid_block_type": "UNetMidBlock2DCrossAttn", "layers_per_block": 2, "block_out_channels": [320],
            "reverse_transformer_layers_per_block": null, "time_cond_proj_dim": null});
        let small = json!({"layers_per_block": 1, "block_out_channels": [32, 48]});
        let zero_snr = json!({"timestep_spacing": "trailing", "prediction_type": "v_prediction"});
        let cases = [
            ("stable-diffusion-2-1", Family::StableDiffusion, [("unet/config.json", full)]),
            ("digits-sd", Family::StableDiffusion, [("unet/config.json", small)]),
            ("somebody/hyper-realistic", Family::StableDiffusion, [("unet/config.json", json!({}))]),
            ("turbo/turbocharged-koalas", Family::Sdxl, [(SCHEDULER, zero_snr)]),
            ("dit", Family::Dit, [("transformer/config.json", json!({"mid_block_type": null}))]),
            ("empty", Family::Sd3, [(MODEL_INDEX, json!({}))]),
        ];
        for (called, family, files) in cases {
            assert_eq!(said(called, family, &files), Vec::<String>::new(), "{called}");
        }
    }
}
