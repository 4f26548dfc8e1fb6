//! The operations the models are made of, on channels-last (NHWC) tensors.
//!
//! One evaluation of a latent diffusion UNet is dominated by convolutions and linear layers, and a tensor library's
//! general operations lose most of a CPU core's arithmetic to repacking, transposing and unfused passes. The operations
//! here keep one layout throughout, pack every weight once at load, and fuse what surrounds a product (bias, time shift,
//! residual, the normalisation in front of a convolution) into it. Each is a candle `CustomOp` for f32 on the CPU and has a twin on
//! CUDA devices (feature `cuda`); on any other device or data type it is spelled in plain candle operations.
//!
//! Two rules hold for every CPU kernel:
//!
//! - **Single-threaded.** An operation runs on the calling thread. The engine runs sub-batches side by side, which
//!   scales better than splitting each small operation.
//! - **Independent of the batch.** The order of floating point operations behind an output element depends on neither
//!   the batch size, the element's place in it, nor the width of the vector registers. Every tile size accumulates over
//!   the inner dimension in the same order with fused multiply-add, and reductions stay within an image or a row.
//!   Scores are thus bit-identical however a job is cut into batches.

/// Returns what a GPU makes of an operation, if `$x` is on one and of a type its kernels know.
macro_rules! on_gpu {
    ($x:expr, $gpu:ident => $run:expr) => {
        #[cfg(feature = "cuda")]
        if let Some($gpu) = $crate::cuda::Gpu::of($x)? {
            return $run;
        }
    };
}

mod activation;
mod adaptive;
mod attention;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod errors;
mod feed_forward;
mod flash;
mod gemm;
pub mod gpu;
mod linear;
mod math;
mod norm;
pub mod profile;
mod shape;
#[cfg(test)]
mod tests;
mod unavailable;
mod winograd;

pub use activation::{Activation, activate, geglu};
pub use adaptive::{Modulation, QueryKeyNorm};
pub use attention::{KeyValues, cross_attention, self_attention};
pub use conv::{Conv2d, Fused, Padding};
pub use cpu::Rows;
pub use errors::{Deviation, MeanErrors, mean_errors};
pub use feed_forward::FeedForward;
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm};
pub use shape::{Download, concat_channels, download, gather, upload, upsample_nearest2x};
