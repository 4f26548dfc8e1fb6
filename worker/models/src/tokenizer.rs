//! CLIP's tokenizer, which turns text into a fixed number of token ids.
//!
//! Older checkpoints have only `vocab.json` and `merges.txt`. The same byte-level BPE is then built from these.

use std::path::Path;

use serde::Deserialize;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::error::ModelError;
use super::reading::Reading;
use super::settings::{read, read_json};

/// Words, single digits, contractions and runs of punctuation, as in CLIP's original tokenizer.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer with its family's special tokens.
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    max_length: usize,
}

/// The settings used from `tokenizer_config.json` and `special_tokens_map.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    pad_token: Option<Token>,
    unk_token: Option<Token>,
}

/// A special token, as a string or with its matching options.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Full { content: String },
}

impl Token {
    fn text(token: Option<Self>) -> Option<String> {
        token.map(|token| match token {
            Self::Plain(content) | Self::Full { content } => content,
        })
    }
}

impl ClipTokenizer {
    /// Opens the tokenizer in `dir` for sequences of `max_length` ids (77 for Stable Diffusion).
    pub fn open(dir: &Path, max_length: usize) -> Result<Self, ModelError> {
        let special = SpecialTokens::read(dir)?;
        let file = dir.join("tokenizer.json");
        let tokenizer = if file.is_file() { Tokenizer::from_bytes(read(&file)?) } else { assemble(dir, &special)? };
        let mut tokenizer = tokenizer.map_err(|e| broken(dir, e))?;
        // The file may contain padding settings from when it was saved.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| broken(dir, e))?;
        // Special tokens are recognised within a text, including the padding token, which is `!` in Stable Diffusion 2.
        let tokens = [&special.bos, &special.eos, &special.pad];
        let tokens = tokens.map(|content| AddedToken::from(content.clone(), true).normalized(true));
        tokenizer.add_special_tokens(tokens).map_err(|e| broken(dir, e))?;
        let id = |token: &str| tokenizer.token_to_id(token).ok_or_else(|| broken(dir, format!("no token {token}")));
        let (bos, eos, pad) = (id(&special.bos)?, id(&special.eos)?, id(&special.pad)?);
        if max_length < 2 {
            return Err(broken(dir, format!("a sequence of {max_length} ids has no room for text")));
        }
        Ok(Self { tokenizer, bos, eos, pad, max_length })
    }

    /// The ids of a text: start, the text truncated to fit, end, then padding; always `max_length` of them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.read(text)?.into_ids())
    }

    /// The ids of a text, and how much of the text they cover.
    pub(crate) fn read(&self, text: &str) -> Result<Reading, ModelError> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| broken(Path::new("memory"), e))?;
        let room = self.max_length - 2;
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.bos);
        ids.extend(encoding.get_ids().iter().take(room));
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        Ok(Reading::new(ids, encoding.len(), room))
    }
}

struct SpecialTokens {
    bos: String,
    eos: String,
    pad: String,
    unk: String,
}

impl SpecialTokens {
    /// Reads the tokens from `special_tokens_map.json` or `tokenizer_config.json`, whichever names them.
    fn read(dir: &Path) -> Result<Self, ModelError> {
        let optional = |name: &str| {
            let path = dir.join(name);
            if path.is_file() { read_json(&path) } else { Ok(TokenizerConfig::default()) }
        };
        let (map, config) = (optional("special_tokens_map.json")?, optional("tokenizer_config.json")?);
        let pick = |a: Option<Token>, b: Option<Token>, default: &str| {
            Token::text(a.or(b)).unwrap_or_else(|| default.to_owned())
        };
        Ok(Self {
            bos: pick(map.bos_token, config.bos_token, "<|startoftext|>"),
            eos: pick(map.eos_token, config.eos_token, "<|endoftext|>"),
            pad: pick(map.pad_token, config.pad_token, "<|endoftext|>"),
            unk: pick(map.unk_token, config.unk_token, "<|endoftext|>"),
        })
    }
}

/// Builds the tokenizer from `vocab.json` and `merges.txt`.
fn assemble(dir: &Path, special: &SpecialTokens) -> Result<tokenizers::Result<Tokenizer>, ModelError> {
    let vocab: std::collections::HashMap<String, u32> = read_json(&dir.join("vocab.json"))?;
    let merges = read(&dir.join("merges.txt"))?;
    let merges: Vec<(String, String)> = String::from_utf8_lossy(&merges)
        .lines()
        .filter(|line| !line.starts_with("#version"))
        .filter_map(|line| line.split_once(' '))
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .collect();
    Ok(byte_pair_encoding(vocab, merges, special))
}

fn byte_pair_encoding(
    vocab: std::collections::HashMap<String, u32>,
    merges: Vec<(String, String)>,
    special: &SpecialTokens,
) -> tokenizers::Result<Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token(special.unk.clone())
        .end_of_word_suffix("</w>".to_owned())
        .build()?;
    let mut tokenizer = Tokenizer::new(model);
    let whitespace = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![NFC.into(), whitespace.into(), Lowercase.into()])))?;
    let words = SplitPattern::Regex(WORDS.to_owned());
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        Split::new(words, SplitDelimiterBehavior::Removed, true)?.into(),
        ByteLevel::new(false, true, true).into(),
    ])));
    Ok(tokenizer)
}

fn broken(dir: &Path, message: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer { path: dir.to_owned(), message: message.to_string() }
}
