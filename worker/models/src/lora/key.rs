//! The names of adapters' weights, in all versions of diffusers and peft.

use std::borrow::Cow;

/// A parsed key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// The component, if the key names it.
    pub(super) component: Option<&'static str>,
    /// diffusers' name of the module whose weight is changed.
    pub(super) module: String,
    /// Which part of the change it is.
    pub(super) role: Role,
}

/// The part of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A, `[r, in]`.
    Down,
    /// B, `[out, r]`.
    Up,
    /// A scalar.
    Alpha,
}

/// Components that an adapter can change.
const COMPONENTS: [&str; 5] = ["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"];

/// The ends of keys: peft's suffixes, and the names of diffusers' own layers.
const ENDINGS: [(&str, Role); 5] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".down.weight", Role::Down),
    (".up.weight", Role::Up),
    (".alpha", Role::Alpha),
];

/// How to use an adapter of an unsupported kind without losing anything.
pub(super) const MERGE: &str = "merge it into the model with diffusers, which keeps alpha, and label with the result: \
    `pipe.load_lora_weights(ADAPTER); pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(OUT)`";

impl Key {
    /// Parses a key, or returns why it is not supported.
    pub(super) fn parse(key: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "{key} is not a supported LoRA weight (by diffusers, peft or kohya, without DoRA or biases); {MERGE}"
            )
        };
        let plain = strip_wrapper(key);
        let component =
            COMPONENTS.into_iter().find(|c| plain.strip_prefix(c).is_some_and(|rest| rest.starts_with('.')));
        let rest = without_adapter(strip_wrapper(component.map_or(plain, |c| &plain[c.len() + 1..])));
        let find = |(ending, role): (&'static str, Role)| Some((rest.strip_suffix(ending)?, ending, role));
        let (base, ending, role) = ENDINGS.into_iter().find_map(find).ok_or_else(unknown)?;
        let module = match old_module(base) {
            Some(module) => module,
            // These ends are valid only after the names of diffusers' own layers.
            None if ending == ".down.weight" || ending == ".up.weight" => return Err(unknown()),
            None => base.to_owned(),
        };
        Ok(Self { component, module, role })
    }
}

/// The key without peft's name for the adapter, such as `default_0`, between `lora_A` and `weight`.
fn without_adapter(key: &str) -> Cow<'_, str> {
    for part in [".lora_A.", ".lora_B."] {
        let split = key.split_once(part).and_then(|(module, rest)| Some((module, rest.strip_suffix(".weight")?)));
        if let Some((module, adapter)) = split
            && !adapter.contains('.')
        {
            return Cow::Owned(format!("{module}{part}weight"));
        }
    }
    Cow::Borrowed(key)
}

/// Removes the prefix of peft's wrapper.
fn strip_wrapper(key: &str) -> &str {
    key.strip_prefix("base_model.model.").unwrap_or(key)
}

/// The module that one of diffusers' own LoRA layers belonged to.
fn old_module(layer: &str) -> Option<String> {
    if let Some(module) = layer.strip_suffix(".lora").or_else(|| layer.strip_suffix(".lora_linear_layer")) {
        return Some(module.to_owned());
    }
    let (attention, name) = layer.strip_suffix("_lora")?.rsplit_once('.')?;
    let attention = attention.strip_suffix(".processor").unwrap_or(attention);
    let name = match (attention.ends_with("self_attn"), name) {
        (true, "to_q") => "q_proj",
        (true, "to_k") => "k_proj",
        (true, "to_v") => "v_proj",
        (true, "to_out") => "out_proj",
        (false, "to_out") => "to_out.0",
        (_, name) => name,
    };
    Some(format!("{attention}.{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_versions_are_read() {
        let cases = [
            ("unet.a.attn1.to_q.lora_A.weight", Some("unet"), "a.attn1.to_q", Role::Down),
            ("unet.a.to_out.0.lora.up.weight", Some("unet"), "a.to_out.0", Role::Up),
            ("a.attn1.processor.to_out_lora.down.weight", None, "a.attn1.to_out.0", Role::Down),
            ("text_encoder.t.self_attn.to_v_lora.up.weight", Some("text_encoder"), "t.self_attn.v_proj", Role::Up),
            ("text_encoder_2.t.q_proj.lora_linear_layer.up.weight", Some("text_encoder_2"), "t.q_proj", Role::Up),
            ("base_model.model.a.proj_in.lora_B.default.weight", None, "a.proj_in", Role::Up),
            ("unet.a.attn1.to_q.lora_A.default_0.weight", Some("unet"), "a.attn1.to_q", Role::Down),
            ("unet.a.attn1.to_q.lora_B.my-style.weight", Some("unet"), "a.attn1.to_q", Role::Up),
            ("transformer.base_model.model.x.alpha", Some("transformer"), "x", Role::Alpha),
            ("unet.a.attn1.processor.to_k_lora.alpha", Some("unet"), "a.attn1.to_k", Role::Alpha),
        ];
        for (key, component, module, role) in cases {
            assert_eq!(Key::parse(key), Ok(Key { component, module: module.to_owned(), role }), "{key}");
        }
    }

    #[test]
    fn other_names_are_refused() {
        for key in ["unet.a.lora_magnitude_vector", "unet.a.dora_scale", "unet.a.lora_B.bias", "unet.a.down.weight"] {
            let error = Key::parse(key).unwrap_err();
            assert!(error.contains(key) && error.contains("keeps alpha"), "{error}");
        }
    }
}
