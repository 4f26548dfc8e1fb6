//! Weight names: diffusers', or those of the original DiT checkpoints.

use crate::checkpoint::Weights;

/// The library whose weight names are used. The two also differ in a norm's epsilon and in the timestep sinusoid's
/// frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// DiTPipeline's `transformer/`: every block has its own embedders.
    Diffusers,
    /// facebookresearch/DiT: all blocks share one pair of embedders.
    Original,
}

impl Names {
    pub(super) fn of(weights: &Weights) -> Self {
        if weights.at("x_embedder.proj").has("weight") { Self::Original } else { Self::Diffusers }
    }

    /// The patch embedding's convolution.
    pub(super) fn patch(self) -> &'static str {
        match self {
            Self::Diffusers => "pos_embed.proj",
            Self::Original => "x_embedder.proj",
        }
    }

    /// The blocks.
    pub(super) fn blocks(self) -> &'static str {
        match self {
            Self::Diffusers => "transformer_blocks",
            Self::Original => "blocks",
        }
    }

    /// Modulation, attention's output, feed-forward's two layers.
    pub(super) fn block(self) -> [&'static str; 4] {
        match self {
            Self::Diffusers => ["norm1.linear", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"],
            Self::Original => ["adaLN_modulation.1", "attn.proj", "mlp.fc1", "mlp.fc2"],
        }
    }

    /// Modulation and projection of the last layer.
    pub(super) fn last(self) -> [&'static str; 2] {
        match self {
            Self::Diffusers => ["proj_out_1", "proj_out_2"],
            Self::Original => ["final_layer.adaLN_modulation.1", "final_layer.linear"],
        }
    }

    /// Subtracted from the number of frequencies in the timestep sinusoid's exponent.
    pub(super) fn freq_shift(self) -> f64 {
        match self {
            Self::Diffusers => 1.0,
            Self::Original => 0.0,
        }
    }
}
