//! Turns prompts into the embeddings that condition a network, with the text encoders of each family.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use candle_core::Tensor;

use super::clip::{ClipOutput, ClipTextModel};
use super::error::ModelError;
use super::family::has_t5;
use super::options::LoadOptions;
use super::probe::Probe;
use super::reading::Reading;
use super::t5::{T5Encoder, T5Tokenizer};
use super::tokenizer::ClipTokenizer;

/// Texts that one thread encodes at once.
const CHUNK: usize = 8;

/// Maximum number of ids for T5, as in diffusers' pipeline.
const T5_LENGTH: usize = 256;

/// The text embeddings that condition a network.
#[derive(Clone, Debug)]
pub struct TextEmbeddings {
    /// A row for every token, `[N, L, C]`.
    pub tokens: Tensor,
    /// One row for the whole text, `[N, P]`, for the families that use it.
    pub pooled: Option<Tensor>,
}

/// A CLIP text encoder with its tokenizer.
#[derive(Debug)]
struct Clip {
    tokenizer: ClipTokenizer,
    model: ClipTextModel,
}

/// The text encoders of a model.
#[derive(Debug)]
pub struct TextEncoders {
    family: Encoding,
}

/// How a family computes its embeddings.
#[derive(Debug)]
enum Encoding {
    /// Stable Diffusion 1.x and 2.x: one encoder's last hidden state.
    Last(Box<Clip>),
    /// SDXL: both encoders' states before the last layer, side by side, and the second one's pooled embedding.
    Two(Box<(Clip, Clip)>),
    /// Stable Diffusion 3: like SDXL padded to the network's `width`, followed by T5's tokens (zeros if there is no
    /// T5), and both pooled embeddings side by side.
    Three { clips: Box<(Clip, Clip)>, t5: Option<Box<(T5Tokenizer, T5Encoder)>>, width: usize },
}

impl Clip {
    fn load(dir: &Path, suffix: &str, options: &LoadOptions) -> Result<Self, ModelError> {
        let model = ClipTextModel::load(&dir.join(format!("text_encoder{suffix}")), options)?;
        let tokenizer = ClipTokenizer::open(&dir.join(format!("tokenizer{suffix}")), model.positions())?;
        Ok(Self { tokenizer, model })
    }

    fn encode(&self, texts: &[String]) -> Result<ClipOutput, ModelError> {
        let ids: Vec<_> = texts.iter().map(|text| self.tokenizer.encode(text)).collect::<Result<_, _>>()?;
        self.model.forward(&ids, &mut Probe::none())
    }

    /// Like [`Clip::encode`], for encoders that must have a pooled embedding.
    fn encode_pooled(&self, texts: &[String]) -> Result<(Tensor, Tensor), ModelError> {
        let output = self.encode(texts)?;
        let pooled = output.text_embeds.ok_or_else(|| {
            ModelError::Input("the text encoder has no text_projection, which this family of models needs".into())
        })?;
        Ok((output.penultimate, pooled))
    }
}

impl TextEncoders {
    /// The single encoder of Stable Diffusion 1.x and 2.x, from the model directory `dir`.
    pub fn stable_diffusion(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        Ok(Self { family: Encoding::Last(Box::new(Clip::load(dir, "", options)?)) })
    }

    /// The two encoders of SDXL.
    pub fn sdxl(dir: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let clips = (Clip::load(dir, "", options)?, Clip::load(dir, "_2", options)?);
        Ok(Self { family: Encoding::Two(Box::new(clips)) })
    }

    /// The three encoders of Stable Diffusion 3, for a network whose text tokens are `width` wide. T5 may be absent.
    pub fn sd3(dir: &Path, width: usize, options: &LoadOptions) -> Result<Self, ModelError> {
        let clips = Box::new((Clip::load(dir, "", options)?, Clip::load(dir, "_2", options)?));
        if clips.0.model.width() + clips.1.model.width() > width {
            let both = clips.0.model.width() + clips.1.model.width();
            return Err(ModelError::Input(format!("text encoders of width {both} for a network that takes {width}")));
        }
        let t5 = if has_t5(dir) {
            let tokenizer = T5Tokenizer::open(&dir.join("tokenizer_3"), T5_LENGTH)?;
            Some(Box::new((tokenizer, T5Encoder::load(&dir.join("text_encoder_3"), options)?)))
        } else {
            None
        };
        Ok(Self { family: Encoding::Three { clips, t5, width } })
    }

    /// The encoders' combined readings of texts.
    pub fn readings(&self, texts: &[String]) -> Result<Vec<Reading>, ModelError> {
        texts.iter().map(|text| self.reading(text)).collect()
    }

    fn reading(&self, text: &str) -> Result<Reading, ModelError> {
        match &self.family {
            Encoding::Last(clip) => clip.tokenizer.read(text),
            Encoding::Two(clips) => Ok(clips.0.tokenizer.read(text)?.and(clips.1.tokenizer.read(text)?)),
            Encoding::Three { clips, t5, .. } => {
                let both = clips.0.tokenizer.read(text)?.and(clips.1.tokenizer.read(text)?);
                match t5.as_deref() {
                    Some((tokenizer, _)) => Ok(both.and(tokenizer.read(text)?)),
                    None => Ok(both),
                }
            }
        }
    }

    /// Embeds texts, a few at a time on every core.
    pub fn encode(&self, texts: &[String]) -> Result<TextEmbeddings, ModelError> {
        let chunks: Vec<&[String]> = texts.chunks(CHUNK).collect();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(chunks.len()).max(1);
        let share = chunks.len().div_ceil(threads).max(1);
        let (done, span) = (AtomicUsize::new(0), tracing::Span::current());
        // A thousand prompts take minutes on a CPU, so progress is logged for every twentieth of them.
        let step = texts.len().div_ceil(20).max(CHUNK);
        let encode = |chunk: &&[String]| {
            let encoded = self.encode_chunk(chunk);
            let before = done.fetch_add(chunk.len(), Ordering::Relaxed);
            let done = before + chunk.len();
            if done < texts.len() && done / step > before / step {
                span.in_scope(|| tracing::info!(done, of = texts.len(), "encoding the prompts"));
            }
            encoded
        };
        let encoded = thread::scope(|scope| {
            let running: Vec<_> = chunks
                .chunks(share)
                .map(|share| scope.spawn(|| share.iter().map(encode).collect::<Vec<_>>()))
                .collect();
            running.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>()
        });
        let mut parts = Vec::new();
        for share in encoded {
            let share = share.map_err(|_| ModelError::Input("a thread of the text encoder panicked".into()))?;
            parts.extend(share.into_iter().collect::<Result<Vec<_>, _>>()?);
        }
        let tokens: Vec<_> = parts.iter().map(|part| &part.tokens).collect();
        let pooled: Vec<_> = parts.iter().filter_map(|part| part.pooled.as_ref()).collect();
        let pooled = if pooled.is_empty() { None } else { Some(Tensor::cat(&pooled, 0)?) };
        Ok(TextEmbeddings { tokens: Tensor::cat(&tokens, 0)?, pooled })
    }

    fn encode_chunk(&self, texts: &[String]) -> Result<TextEmbeddings, ModelError> {
        match &self.family {
            Encoding::Last(clip) => Ok(TextEmbeddings { tokens: clip.encode(texts)?.last_hidden_state, pooled: None }),
            Encoding::Two(clips) => {
                let (first, (second, pooled)) = (clips.0.encode(texts)?, clips.1.encode_pooled(texts)?);
                let tokens = Tensor::cat(&[&first.penultimate, &second], 2)?;
                Ok(TextEmbeddings { tokens, pooled: Some(pooled) })
            }
            Encoding::Three { clips, t5, width } => {
                let ((first, pooled_1), (second, pooled_2)) =
                    (clips.0.encode_pooled(texts)?, clips.1.encode_pooled(texts)?);
                let both = Tensor::cat(&[&first, &second], 2)?;
                let both = both.pad_with_zeros(2, 0, width - both.dim(2)?)?;
                let t5 = match t5.as_deref() {
                    Some((tokenizer, encoder)) => {
                        let ids: Vec<_> = texts.iter().map(|t| tokenizer.encode(t)).collect::<Result<_, _>>()?;
                        encoder.forward(&ids, &mut Probe::none())?
                    }
                    None => Tensor::zeros((texts.len(), T5_LENGTH, *width), both.dtype(), both.device())?,
                };
                let pooled = Some(Tensor::cat(&[&pooled_1, &pooled_2], 1)?);
                Ok(TextEmbeddings { tokens: Tensor::cat(&[&both, &t5], 1)?, pooled })
            }
        }
    }
}
