//! The operations that the models consist of, on channels-last (NHWC) tensors.
//!
//! Convolutions and linear layers dominate an evaluation of a latent diffusion UNet. With a tensor library's general
//! operations, a CPU core spends most of its time on repacking, transposing and unfused passes. The operations here
//! keep one layout throughout, pack every weight once when it is loaded, and fuse the steps around a product (bias,
//! time shift, residual, the normalisation before a convolution) into it. Each is a candle `CustomOp` for f32 on the
//! CPU and has a counterpart on CUDA devices (feature `cuda`). Other devices and data types use plain candle
//! operations.
//!
//! Two rules hold for every CPU kernel:
//!
//! - **Single-threaded.** An operation runs on the calling thread. The engine runs sub-batches in parallel, which
//!   scales better than splitting each small operation.
//! - **Independent of the batch.** The order of floating point operations for an output element does not depend on the
//!   batch size, the element's place in the batch, or the width of the vector registers. Every tile size accumulates
//!   over the inner dimension in the same order with fused multiply-add, and reductions stay within an image or a row.
//!   So scores are bit-identical however a job is divided into batches.

/// Runs an operation on the GPU and returns its result, if `$x` is on one and has a type its kernels support.
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
#[cfg(feature = "cuda")]
mod gpu_timer;
mod linear;
mod math;
mod norm;
pub mod peak;
pub mod profile;
mod shape;
mod simd;
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
pub use simd::{InstructionSet, InstructionSetError};
