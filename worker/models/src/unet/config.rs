//! The UNet's checked settings, as far as they decide its layers.

mod file;

use std::path::Path;

use crate::error::ModelError;
use crate::settings::read_json;

/// One resolution level of the UNet.
#[derive(Clone, Debug)]
pub(super) struct Level {
    /// Channels.
    pub(super) channels: usize,
    /// Attention heads.
    pub(super) heads: usize,
    /// Width of the text embedding.
    pub(super) text: usize,
    /// Whether a block's first attention is also to the prompt. This does not apply to the middle.
    pub(super) only_cross: bool,
    /// For each resnet on the way down, the number of blocks in the transformer after it, if there is one.
    pub(super) down: Vec<Option<usize>>,
    /// The same for the way up, which has one more resnet.
    pub(super) up: Vec<Option<usize>>,
}

/// The part between the way down and the way up, as wide as the coarsest level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Middle {
    /// Nothing (BK-SDM, small and tiny).
    Nothing,
    /// A resnet (SSD-1B).
    Resnet,
    /// Two resnets, and between them a transformer of this many blocks.
    Transformer(usize),
}

/// SDXL's additional embedding of the pooled text and six sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextTime {
    /// Width of one size's sinusoid.
    pub(super) width: usize,
    /// Width of the pooled text and the six sinusoids together.
    pub(super) inputs: usize,
}

/// A UNet2DConditionModel's settings, checked.
///
/// `upcast_attention`, `resnet_out_scale_factor` and `mid_block_only_cross_attention` have no effect on these blocks in f32,
/// and `use_linear_projection` only changes a weight's stored shape.
#[derive(Clone, Debug)]
pub(super) struct UnetConfig {
    /// Height and width of the latents the model was trained on.
    pub(super) sample_size: usize,
    /// Channels of the latents.
    pub(super) in_channels: usize,
    /// Channels of the output.
    pub(super) out_channels: usize,
    /// Groups of every group norm.
    pub(super) groups: usize,
    /// Epsilon of the resnets' norms.
    pub(super) eps: f64,
    /// Whether cosines come before sines in the time embedding.
    pub(super) flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the time embedding's exponent.
    pub(super) freq_shift: f64,
    /// Width of the guidance scale's sinusoid, for a model that takes a guidance scale as input (LCM).
    pub(super) guidance: Option<usize>,
    /// Additional conditioning.
    pub(super) text_time: Option<TextTime>,
    /// The levels, from finest to coarsest.
    pub(super) levels: Vec<Level>,
    /// The part below the coarsest level.
    pub(super) middle: Middle,
}

impl UnetConfig {
    /// Reads and checks a `config.json`.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        file::checked(path, read_json(path)?)
    }
}
