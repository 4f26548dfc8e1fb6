//! Which file holds a component's weights. They may be in one file or in shards, and in variants (`model.fp16.safetensors`).
//!
//! The file without a variant is diffusers' default. If it is missing, variants with the same weights in other precisions are
//! used, the most precise first. Training weights (`ema`, `non_ema`) are different weights: they are used only if there is
//! nothing else.

/// Variants that differ in precision, starting with the one without a name.
const PRECISIONS: [&str; 4] = ["", "fp32", "fp16", "bf16"];

/// Variants with different weights.
const TRAINING: [&str; 2] = ["ema", "non_ema"];

/// How a component's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored<'a> {
    /// In a single file.
    Whole(&'a str),
    /// In shards named by an index.
    Sharded(&'a str),
}

/// The file to load among the `names` in a directory, for weights called `stem`; `None` if there are no such weights. If it is
/// unclear which variant to load, the error holds the variants.
pub fn stored<'a>(names: &[&'a str], stem: &str) -> Result<Option<Stored<'a>>, Vec<&'a str>> {
    let of = |variant: &str| of_variant(names, stem, variant);
    if let Some(found) = PRECISIONS.into_iter().find_map(of) {
        return Ok(Some(found));
    }
    let others = others(names, stem);
    let training: Vec<Stored<'a>> = TRAINING.into_iter().filter_map(of).collect();
    match (training.as_slice(), others.len()) {
        ([only], 1) => Ok(Some(*only)),
        (_, 0) => Ok(None),
        _ => Err(others),
    }
}

/// The files of weights called `stem`, in the one variant that [`stored`] picks, including the shards of an index. If it is
/// unclear which variant to load, all are returned, so that the loader can report this.
pub fn files<'a>(names: &[&'a str], stem: &str) -> Vec<&'a str> {
    match stored(names, stem) {
        Ok(None) => Vec::new(),
        Ok(Some(Stored::Whole(name))) => vec![name],
        Ok(Some(Stored::Sharded(index))) => {
            // The index names the shards, but may not be fetched yet.
            let variant = variant_of(index);
            let is_shard = |name: &&str| name.ends_with(".safetensors") && variant_of(name) == variant;
            names.iter().copied().filter(|name| is_shard(name) || *name == index).collect()
        }
        Err(variants) => variants,
    }
}

/// The possible file names of weights called `stem`, in all variants.
pub fn usual_names(stem: &str) -> impl Iterator<Item = String> {
    PRECISIONS.into_iter().chain(TRAINING).map(move |variant| whole(stem, variant))
}

fn whole(stem: &str, variant: &str) -> String {
    if variant.is_empty() { format!("{stem}.safetensors") } else { format!("{stem}.{variant}.safetensors") }
}

fn of_variant<'a>(names: &[&'a str], stem: &str, variant: &str) -> Option<Stored<'a>> {
    let find = |wanted: &str| names.iter().copied().find(|name| *name == wanted);
    let whole = whole(stem, variant);
    if let Some(name) = find(&whole) {
        return Some(Stored::Whole(name));
    }
    // diffusers and transformers put the variant before the last extension; others put it before the first.
    let last = format!("{stem}.safetensors.index.{variant}.json");
    find(&format!("{whole}.index.json")).or_else(|| find(&last)).map(Stored::Sharded)
}

/// The variants other than the plain file, each represented by its file or index.
fn others<'a>(names: &[&'a str], stem: &str) -> Vec<&'a str> {
    let variant = |name: &&str| {
        let rest = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('.'));
        rest.is_some_and(|rest| rest.ends_with(".safetensors") || rest.contains("safetensors.index."))
    };
    names.iter().copied().filter(|name| variant(name)).filter(|name| !is_numbered(name)).collect()
}

/// Whether a file is one of several shards: `model.fp16-00001-of-00002.safetensors`.
fn is_numbered(name: &str) -> bool {
    name.contains("-of-") && name.ends_with(".safetensors")
}

/// The known variant in a file's name; empty if there is none.
fn variant_of(name: &str) -> &'static str {
    let carries = |variant: &&&str| {
        name.split('.')
            .any(|part| part == **variant || part.strip_prefix(**variant).is_some_and(|p| p.starts_with('-')))
    };
    PRECISIONS.iter().chain(&TRAINING).filter(|variant| !variant.is_empty()).find(carries).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken<'a>(names: &[&'a str]) -> Result<Option<Stored<'a>>, Vec<&'a str>> {
        stored(names, "model")
    }

    #[test]
    fn the_plain_file_comes_first_and_then_the_most_precise() {
        let all = ["model.bf16.safetensors", "model.fp16.safetensors", "model.fp32.safetensors", "model.safetensors"];
        for (count, expected) in [(4, all[3]), (3, all[2]), (2, all[1]), (1, all[0])] {
            assert_eq!(taken(&all[..count]), Ok(Some(Stored::Whole(expected))));
        }
        let (plain, half) = ("model.safetensors.index.json", "model.fp16.safetensors.index.json");
        assert_eq!(taken(&[half, plain]), Ok(Some(Stored::Sharded(plain))));
        assert_eq!(taken(&[half]), Ok(Some(Stored::Sharded(half))));
        let late = "model.safetensors.index.bf16.json";
        assert_eq!(taken(&[late, "model.bf16-00001-of-00001.safetensors"]), Ok(Some(Stored::Sharded(late))));
        assert_eq!(taken(&["model.bin", "other.fp16.safetensors", "config.json"]), Ok(None));
    }

    #[test]
    fn training_weights_are_used_only_if_there_is_nothing_else() {
        let (ema, other) = ("model.ema.safetensors", "model.non_ema.safetensors");
        for only in [ema, other] {
            assert_eq!(taken(&[only, "config.json"]), Ok(Some(Stored::Whole(only))));
        }
        assert_eq!(taken(&[ema, other]), Err(vec![ema, other]));
        assert_eq!(taken(&[ema, other, "model.fp16.safetensors"]), Ok(Some(Stored::Whole("model.fp16.safetensors"))));
        assert_eq!(taken(&["model.int8.safetensors"]), Err(vec!["model.int8.safetensors"]));
        assert_eq!(files(&[ema, other], "model"), [ema, other]);
    }

    #[test]
    fn an_index_comes_with_the_shards_of_its_variant() {
        let index = "model.bf16.safetensors.index.json";
        let names = [index, "model.bf16-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"];
        assert_eq!(files(&names, "model"), names[..2]);
        let index = "model.safetensors.index.non_ema.json";
        let names = [index, "model.non_ema-00001-of-00001.safetensors", "model-00001-of-00001.safetensors"];
        assert_eq!(files(&names, "model"), names[..2]);
    }
}
