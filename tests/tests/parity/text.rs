//! Tokenizers and text encoders.

use candle_core::Tensor;
use elbo_models::{ClipTextModel, ClipTokenizer, DiffusionModel, Probe, T5Encoder, T5Tokenizer, TextEmbeddings};
use elbo_tests::numbers::assert_close;

use crate::for_each;
use crate::loading::copied;
use crate::reference::{Reference, options};

for_each!(check_clip:
    digits_sd "digits-sd",
    stable_diffusion_1 "sd15",
    stable_diffusion_2 "sd2-eps",
    stable_diffusion_2_v "sd2-v",
    sdxl "sdxl",
    stable_diffusion_3 "sd3",
    stable_diffusion_35 "sd35",
);

/// Checks token ids, also of odd texts, with and without tokenizer.json; all hidden states; pooled embeddings.
fn check_clip(fixture: &str) {
    let reference = Reference::open(fixture);
    for suffix in ["", "_2"] {
        let (name, dir) = (format!("text_encoder{suffix}"), reference.model.join(format!("tokenizer{suffix}")));
        if !dir.is_dir() {
            continue;
        }
        let bare = copied(&dir);
        std::fs::remove_file(bare.path().join("tokenizer.json")).unwrap();
        for dir in [&dir, bare.path()] {
            let tokenizer = ClipTokenizer::open(dir, 77).unwrap();
            check_ids(&reference, &name, |text| tokenizer.encode(text).unwrap());
        }

        let tokenizer = ClipTokenizer::open(&dir, 77).unwrap();
        let encoder = ClipTextModel::load(&reference.model.join(&name), &options()).unwrap();
        let ids: Vec<_> = reference.strings("prompts").iter().map(|text| tokenizer.encode(text).unwrap()).collect();
        let mut states = Vec::new();
        let mut watch = |_: &str, state: &Tensor| states.push(state.get(0).unwrap());
        let output = encoder.forward(&ids, &mut Probe::new(&mut watch)).unwrap();
        let expected = reference.get(&format!("{name}.hidden_states_prompt0"));
        assert_close("hidden states", &Tensor::stack(&states, 0).unwrap(), expected, 5e-6);
        let penultimate = expected.get(expected.dim(0).unwrap() - 2).unwrap();
        assert_close("penultimate", &output.penultimate.get(0).unwrap(), &penultimate, 5e-6);
        let expected = reference.get(&format!("{name}.last_hidden_state"));
        assert_close("last hidden state", &output.last_hidden_state, expected, 5e-6);
        let pooled = format!("{name}.text_embeds");
        assert_eq!(output.text_embeds.is_some(), reference.has(&pooled));
        if let Some(embeds) = output.text_embeds {
            assert_close("text embeds", &embeds, reference.get(&pooled), 5e-6);
        }
    }
}

for_each!(check_t5: t5 "sd3", t5_35 "sd35");

fn check_t5(fixture: &str) {
    let reference = Reference::open(fixture);
    let tokenizer = T5Tokenizer::open(&reference.model.join("tokenizer_3"), 256).unwrap();
    check_ids(&reference, "text_encoder_3", |text| tokenizer.encode(text).unwrap());
    let encoder = T5Encoder::load(&reference.model.join("text_encoder_3"), &options()).unwrap();
    let ids: Vec<_> = reference.strings("prompts").iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    let mut states = Vec::new();
    let mut watch = |_: &str, state: &Tensor| states.push(state.get(0).unwrap());
    let last = encoder.forward(&ids, &mut Probe::new(&mut watch)).unwrap();
    // In transformers, the last state is after the final norm.
    states.pop();
    states.push(last.get(0).unwrap());
    let states = Tensor::stack(&states, 0).unwrap();
    assert_close("hidden states", &states, reference.get("text_encoder_3.hidden_states_prompt0"), 5e-6);
    assert_close("last hidden state", &last, reference.get("text_encoder_3.last_hidden_state"), 5e-6);
}

fn check_ids(reference: &Reference, encoder: &str, encode: impl Fn(&str) -> Vec<u32>) {
    for (texts, ids) in [("prompts", "input_ids"), ("weird_prompts", "weird_input_ids")] {
        let expected = reference.integers(&format!("{encoder}.{ids}"));
        for (text, expected) in reference.strings(texts).iter().zip(expected.chunks(77)) {
            assert_eq!(encode(text), expected, "{encoder}: {text:?}");
        }
    }
}

for_each!(check_embeddings:
    embeddings_of_digits_sd "digits-sd",
    embeddings_of_sdxl "sdxl",
    embeddings_of_stable_diffusion_3 "sd3",
    embeddings_of_stable_diffusion_35 "sd35",
);

/// Checks the conditioning of the network, from all encoders of its family.
fn check_embeddings(fixture: &str) {
    let reference = Reference::open(fixture);
    let TextEmbeddings { tokens, pooled } = reference.model().encode_texts(&reference.strings("prompts")).unwrap();
    assert_close("prompt embeds", &tokens, reference.get("prompt_embeds"), 5e-6);
    assert_eq!(pooled.is_some(), reference.has("pooled_prompt_embeds"));
    if let Some(pooled) = pooled {
        assert_close("pooled prompt embeds", &pooled, reference.get("pooled_prompt_embeds"), 5e-6);
    }
}

#[test]
fn t5_tokens_are_zeros_if_t5_is_missing() {
    let reference = Reference::open("sd3");
    let model = copied(&reference.model);
    std::fs::remove_dir_all(model.path().join("text_encoder_3")).unwrap();
    let texts = reference.strings("prompts");
    let found = DiffusionModel::load(model.path()).unwrap().encode_texts(&texts).unwrap().tokens;
    // Like diffusers' pipeline: 256 tokens of zeros.
    assert_eq!(found.dims(), [texts.len(), 77 + 256, 64]);
    let expected = reference.get("prompt_embeds").narrow(1, 0, 77).unwrap();
    assert_close("CLIP's tokens", &found.narrow(1, 0, 77).unwrap(), &expected, 5e-6);
    let zeros = found.narrow(1, 77, 256).unwrap().abs().unwrap().sum_all().unwrap();
    assert_eq!(zeros.to_scalar::<f32>().unwrap(), 0.0);
}
