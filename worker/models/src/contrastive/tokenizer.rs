//! Turns texts into token ids, as CLIP and its relatives or SigLIP do.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Pieces;

use crate::error::ModelError;
use crate::reading::Reading;
use crate::settings::{read, read_json, unsupported};
use crate::tokenizer::ClipTokenizer;

/// sentencepiece's mark of a word's start.
const WORD: char = '▁';

/// A tokenizer that gives sequences of a fixed length.
#[derive(Debug)]
pub(super) enum Tokenizer {
    Clip(ClipTokenizer),
    Siglip(SiglipTokenizer),
}

impl Tokenizer {
    /// The CLIP tokenizer in `dir`.
    pub(super) fn clip(dir: &Path, length: usize) -> Result<Self, ModelError> {
        Ok(Self::Clip(ClipTokenizer::open(dir, length)?))
    }

    /// The SigLIP tokenizer in `dir`.
    pub(super) fn siglip(dir: &Path, length: usize) -> Result<Self, ModelError> {
        Ok(Self::Siglip(SiglipTokenizer::open(dir, length)?))
    }

    /// The padded ids of a text, and how much of the text they cover.
    pub(super) fn read(&self, text: &str) -> Result<Reading, ModelError> {
        match self {
            Self::Clip(tokenizer) => tokenizer.read(text),
            Self::Siglip(tokenizer) => tokenizer.read(text),
        }
    }
}

/// SigLIP's tokenizer: pieces of lowercase text without punctuation, then end and padding.
#[derive(Debug)]
pub(super) struct SiglipTokenizer {
    pieces: Pieces,
    end: u32,
    padding: u32,
    length: usize,
}

impl SiglipTokenizer {
    fn open(dir: &Path, length: usize) -> Result<Self, ModelError> {
        let config = settings(&dir.join("tokenizer_config.json"))?;
        let special = settings(&dir.join("special_tokens_map.json"))?;
        // SigLIP 2 has a different vocabulary and keeps punctuation.
        if let Some(class) = config.get("tokenizer_class").filter(|class| *class != "SiglipTokenizer") {
            return Err(unsupported(&dir.join("tokenizer_config.json"), "tokenizer_class", class));
        }
        let file = dir.join("tokenizer.json");
        if !file.is_file() && dir.join("spiece.model").is_file() {
            return Err(broken(
                dir,
                "spiece.model can't be read, and tokenizer.json is missing: fetch it from the model's repository, or \
                 write it with transformers, T5TokenizerFast('spiece.model', extra_ids=0)._tokenizer.save('tokenizer.json')",
            ));
        }
        if length == 0 {
            return Err(broken(dir, "a sequence of 0 ids has no room for text"));
        }
        let mut pieces = Pieces::from_bytes(read(&file)?).map_err(|e| broken(dir, e))?;
        // The file may contain padding settings from when it was saved.
        pieces.with_padding(None);
        pieces.with_truncation(None).map_err(|e| broken(dir, e))?;
        let id = |name: &str| {
            let token = special.get(name).or_else(|| config.get(name));
            let token = token.and_then(|token| token.get("content").unwrap_or(token).as_str()).unwrap_or("</s>");
            pieces.token_to_id(token).ok_or_else(|| broken(dir, format!("no token {token}")))
        };
        let (end, padding) = (id("eos_token")?, id("pad_token")?);
        Ok(Self { pieces, end, padding, length })
    }

    fn read(&self, text: &str) -> Result<Reading, ModelError> {
        let text = canonical(text);
        let mut ids = Vec::with_capacity(self.length);
        let (mut tokens, room) = (0, self.length - 1);
        if !text.is_empty() {
            let encoding = self.pieces.encode(text, false).map_err(|e| broken(Path::new("memory"), e))?;
            tokens = encoding.len();
            ids.extend(encoding.get_ids().iter().take(room));
        }
        ids.push(self.end);
        ids.resize(self.length, self.padding);
        Ok(Reading::new(ids, tokens, room))
    }
}

/// Lowercase text without ASCII punctuation, with words separated by single spaces, after the mark of a word's start.
/// As in transformers, a space before the text makes that mark a separate word.
fn canonical(text: &str) -> String {
    let text = text.replace(WORD, " ").to_lowercase().replace(|c: char| c.is_ascii_punctuation(), "");
    let words: Vec<&str> = text.split_whitespace().collect();
    let words = words.join(" ");
    match text.starts_with(char::is_whitespace) {
        _ if words.is_empty() => words,
        true => format!("{WORD} {words}"),
        false => format!("{WORD}{words}"),
    }
}

/// The settings in an optional file.
fn settings(path: &Path) -> Result<Value, ModelError> {
    if path.is_file() { read_json(path) } else { Ok(Value::Null) }
}

fn broken(dir: &Path, message: impl std::fmt::Display) -> ModelError {
    ModelError::Tokenizer { path: dir.to_owned(), message: message.to_string() }
}
