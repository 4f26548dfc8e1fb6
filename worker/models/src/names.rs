//! Weight names in different versions of transformers.
//!
//! From version 5 on, transformers saves a text encoder without the prefix `text_model.`. Weights and adapters are
//! looked up by the older names, which nearly all files use.

use std::borrow::Cow;

/// Maps the name of a weight in a file to its usual name.
pub(crate) type Naming = for<'a> fn(&'a str) -> Cow<'a, str>;

/// Names are used as they are.
pub(crate) fn as_stored(key: &str) -> Cow<'_, str> {
    Cow::Borrowed(key)
}

/// CLIP's text encoder: `text_model.encoder.layers.0`.
pub(crate) fn clip(key: &str) -> Cow<'_, str> {
    prefixed(key, "text_model.", &["embeddings.", "encoder.", "final_layer_norm."])
}

/// T5's encoder: `encoder.block.0`, and `shared` for the embeddings.
pub(crate) fn t5(key: &str) -> Cow<'_, str> {
    match key.strip_prefix("encoder.embed_tokens.").or_else(|| key.strip_prefix("embed_tokens.")) {
        Some(rest) => Cow::Owned(format!("shared.{rest}")),
        None => prefixed(key, "encoder.", &["block.", "final_layer_norm."]),
    }
}

/// The two towers of a contrastive model: `text_model.encoder.layers.0`, `vision_model.encoder.layers.0`.
pub(crate) fn towers(key: &str) -> Cow<'_, str> {
    let twice = ["text_model.", "vision_model."].into_iter().find_map(|tower| {
        let rest = key.strip_prefix(tower)?;
        rest.starts_with(tower).then_some(rest)
    });
    Cow::Borrowed(twice.unwrap_or(key))
}

/// The naming for one of a diffusion model's directories.
pub(crate) fn of_component(component: &str) -> Naming {
    match component {
        "text_encoder" | "text_encoder_2" => clip,
        "text_encoder_3" => t5,
        _ => as_stored,
    }
}

fn prefixed<'a>(key: &'a str, prefix: &str, bare: &[&str]) -> Cow<'a, str> {
    match key.strip_prefix(prefix) {
        // A model within a model has its prefix twice.
        Some(rest) if rest.starts_with(prefix) => Cow::Borrowed(rest),
        None if bare.iter().any(|start| key.starts_with(start)) => Cow::Owned(format!("{prefix}{key}")),
        _ => Cow::Borrowed(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_versions_map_to_the_usual_ones() {
        let cases: [(Naming, &str, &str); 10] = [
            (clip, "encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.0.mlp.fc1.weight"),
            (clip, "embeddings.position_ids", "text_model.embeddings.position_ids"),
            (clip, "text_model.text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias"),
            (clip, "text_projection.weight", "text_projection.weight"),
            (t5, "encoder.embed_tokens.weight", "shared.weight"),
            (t5, "embed_tokens.weight", "shared.weight"),
            (t5, "block.0.layer.0.layer_norm.weight", "encoder.block.0.layer.0.layer_norm.weight"),
            (t5, "encoder.final_layer_norm.weight", "encoder.final_layer_norm.weight"),
            (towers, "vision_model.vision_model.post_layernorm.bias", "vision_model.post_layernorm.bias"),
            (of_component("unet"), "encoder.weight", "encoder.weight"),
        ];
        for (naming, stored, usual) in cases {
            assert_eq!(naming(stored), usual);
            assert_eq!(naming(usual), usual);
        }
    }
}
