//! One block: image and text tokens attend to each other, then go through separate feed-forwards.

use candle_core::{Result, Tensor};
use elbo_kernels::{Activation, Linear, Modulation, QueryKeyNorm, activate, self_attention};

use super::config::MmditConfig;
use crate::checkpoint::Params;
use crate::error::ModelError;
use crate::layers::{joined, linear};
use crate::probe::Probe;

/// diffusers' epsilon of all norms.
pub(super) const EPS: f64 = 1e-6;

/// JointTransformerBlock.
#[derive(Debug)]
pub(super) struct Block {
    heads: usize,
    width: usize,
    image: Stream,
    /// The image's additional attention to itself only.
    second: Option<Attention>,
    text: TextStream,
}

/// The text's half of a block.
#[derive(Debug)]
enum TextStream {
    Whole(Box<Stream>),
    /// In the last block the text is only attended to.
    Read {
        modulation: Linear,
        qkv: Projection,
    },
}

/// One half of a block.
#[derive(Debug)]
struct Stream {
    /// Computes shift, scale and gate of the attention, of the feed-forward, and of the second attention.
    modulation: Linear,
    attention: Attention,
    up: Linear,
    down: Linear,
}

#[derive(Debug)]
struct Attention {
    qkv: Projection,
    out: Linear,
}

/// Computes queries, keys and values side by side.
#[derive(Debug)]
struct Projection {
    linear: Linear,
    norm: Option<QueryKeyNorm>,
}

/// Weight names of an attention: projections, norms, output.
struct Names {
    qkv: [&'static str; 3],
    norms: [&'static str; 2],
    out: &'static str,
}

const IMAGE: Names = Names { qkv: ["to_q", "to_k", "to_v"], norms: ["norm_q", "norm_k"], out: "to_out.0" };
const TEXT: Names = Names {
    qkv: ["add_q_proj", "add_k_proj", "add_v_proj"],
    norms: ["norm_added_q", "norm_added_k"],
    out: "to_add_out",
};

impl Projection {
    fn load(p: &Params<'_>, names: &Names, config: &MmditConfig) -> std::result::Result<Self, ModelError> {
        let (width, dim) = (config.width(), config.attention_head_dim);
        let norm = |name: &str| p.at(name).get("weight", &[dim]);
        let norm = if config.normalises_heads() {
            Some(QueryKeyNorm::new(EPS, &norm(names.norms[0])?, &norm(names.norms[1])?))
        } else {
            None
        };
        Ok(Self { linear: joined(&names.qkv.map(|name| p.at(name)), width, width, true)?, norm })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.linear.forward(x, None)?;
        match &self.norm {
            Some(norm) => norm.forward(&qkv),
            None => Ok(qkv),
        }
    }
}

impl Attention {
    fn load(p: &Params<'_>, names: &Names, config: &MmditConfig) -> std::result::Result<Self, ModelError> {
        let out = linear(&p.at(names.out), config.width(), config.width())?;
        Ok(Self { qkv: Projection::load(p, names, config)?, out })
    }
}

impl Stream {
    fn load(
        p: &Params<'_>,
        names: &Names,
        modulation: (&str, usize),
        feed_forward: &str,
        config: &MmditConfig,
    ) -> std::result::Result<Self, ModelError> {
        let (width, feed_forward) = (config.width(), p.at(feed_forward));
        Ok(Self {
            modulation: linear(&p.at(modulation.0), width, modulation.1 * width)?,
            attention: Attention::load(&p.at("attn"), names, config)?,
            up: linear(&feed_forward.at("net.0.proj"), width, 4 * width)?,
            down: linear(&feed_forward.at("net.2"), 4 * width, width)?,
        })
    }

    /// `x` after the feed-forward.
    fn feed_forward(
        &self,
        x: &Tensor,
        modulation: Modulation<'_>,
        probe: &mut Probe<'_>,
        name: &str,
    ) -> Result<Tensor> {
        let normal = modulation.normalise(x, EPS, 3, 4)?;
        let h = self.down.forward(&activate(&self.up.forward(&normal, None)?, Activation::GeluTanh)?, None)?;
        probe.see(|| name.to_owned(), &h);
        modulation.gate(x, &h, 5)
    }
}

impl Block {
    /// Loads block `index`; the last one drops the text.
    pub(super) fn load(p: &Params<'_>, index: usize, config: &MmditConfig) -> std::result::Result<Self, ModelError> {
        let (width, last) = (config.width(), index + 1 == config.num_layers);
        let dual = config.dual_attention_layers.contains(&index);
        let rows = if dual { 9 } else { 6 };
        let text = if !last {
            let stream = Stream::load(p, &TEXT, ("norm1_context.linear", 6), "ff_context", config)?;
            TextStream::Whole(Box::new(stream))
        } else {
            TextStream::Read {
                modulation: linear(&p.at("norm1_context.linear"), width, 2 * width)?,
                qkv: Projection::load(&p.at("attn"), &TEXT, config)?,
            }
        };
        Ok(Self {
            heads: config.num_attention_heads,
            width,
            image: Stream::load(p, &IMAGE, ("norm1.linear", rows), "ff", config)?,
            second: if dual { Some(Attention::load(&p.at("attn2"), &IMAGE, config)?) } else { None },
            text,
        })
    }

    /// Image tokens `x [B, L, D]` and text tokens `[B, M, D]` after the block; `embedding [B, D]` is activated. The
    /// last block returns the text unchanged.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        text: &Tensor,
        embedding: &Tensor,
        probe: &mut Probe<'_>,
        name: &str,
    ) -> Result<(Tensor, Tensor)> {
        let len = x.dim(1)?;
        let image_rows = self.image.modulation.forward(embedding, None)?;
        let modulation = Modulation::new(&image_rows, self.width);
        let normal = modulation.normalise(x, EPS, 0, 1)?;
        probe.see(|| format!("{name}.norm1"), &normal);
        let (text_rows, text_normal, text_qkv) = match &self.text {
            TextStream::Whole(stream) => {
                let rows = stream.modulation.forward(embedding, None)?;
                let normal = Modulation::new(&rows, self.width).normalise(text, EPS, 0, 1)?;
                (rows, normal, &stream.attention.qkv)
            }
            TextStream::Read { modulation, qkv } => {
                // This norm stores its scale before its shift.
                let rows = modulation.forward(embedding, None)?;
                let normal = Modulation::new(&rows, self.width).normalise(text, EPS, 1, 0)?;
                (rows, normal, qkv)
            }
        };
        let qkv = Tensor::cat(&[self.image.attention.qkv.forward(&normal)?, text_qkv.forward(&text_normal)?], 1)?;
        let attended = self_attention(&qkv, self.heads, false)?;
        let h = self.image.attention.out.forward(&attended.narrow(1, 0, len)?.contiguous()?, None)?;
        probe.see(|| format!("{name}.attn"), &h);
        let mut new = modulation.gate(x, &h, 2)?;
        if let Some(second) = &self.second {
            let qkv = second.qkv.forward(&modulation.normalise(x, EPS, 6, 7)?)?;
            let h = second.out.forward(&self_attention(&qkv, self.heads, false)?, None)?;
            new = modulation.gate(&new, &h, 8)?;
        }
        let new = self.image.feed_forward(&new, modulation, probe, &format!("{name}.ff"))?;
        let text = match &self.text {
            TextStream::Whole(stream) => {
                let modulation = Modulation::new(&text_rows, self.width);
                let h = attended.narrow(1, len, text.dim(1)?)?.contiguous()?;
                let text = modulation.gate(text, &stream.attention.out.forward(&h, None)?, 2)?;
                stream.feed_forward(&text, modulation, probe, &format!("{name}.ff_context"))?
            }
            TextStream::Read { .. } => text.clone(),
        };
        Ok((new, text))
    }
}
