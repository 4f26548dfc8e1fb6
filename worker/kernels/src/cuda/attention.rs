//! Attention on the device.

use candle_core::{DType, Result, Tensor, bail};

use super::Gpu;
use super::memory::Pointer;

/// Per kernel: its head width and, for half precision and for f32, the queries per block and the bytes of shared
/// memory. See the table at the top of `worker/kernels/cuda/attention.cu`.
const TILES: [(usize, [(usize, u32); 2]); 8] = [
    (16, [(128, 18_432), (64, 32_768)]),
    (32, [(128, 30_720), (64, 45_056)]),
    (48, [(128, 43_008), (64, 57_344)]),
    (64, [(128, 55_296), (64, 69_632)]),
    (80, [(128, 67_584), (64, 81_920)]),
    (96, [(128, 53_248), (64, 94_208)]),
    (128, [(128, 69_632), (64, 76_800)]),
    (160, [(64, 64_512), (64, 93_184)]),
];
/// Threads per block.
const THREADS: u32 = 128;

/// Whether there is a kernel for this head width.
pub(crate) fn fits(dim: usize) -> bool {
    TILES.iter().any(|(width, _)| dim <= *width)
}

/// Where sequences of queries, keys or values are in a tensor.
#[derive(Clone, Copy, Debug)]
struct Sequences {
    /// Address of the first sequence.
    start: Pointer,
    /// Which sequence each image takes; its own position if null.
    rows: Pointer,
    /// Positions in a sequence.
    len: usize,
    /// Distance in values between positions, then between sequences.
    stride: usize,
    image: usize,
}

impl Gpu {
    /// Self-attention over `qkv [B, L, 3 heads d]`; returns `[B, L, heads d]`.
    pub(crate) fn self_attention(&self, qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
        let qkv = qkv.contiguous()?;
        let (images, len, width) = qkv.dims3()?;
        let channels = width / 3;
        let start = self.pointer(&qkv)?;
        let part = |part: usize| start + (part * channels * qkv.dtype().size_in_bytes()) as u64;
        let sequences = |start| Sequences { start, rows: 0, len, stride: width, image: len * width };
        let [q, k] = [sequences(part(0)), sequences(part(1))];
        self.attention(q, k, part(2), [images, heads, channels / heads], causal, qkv.dtype())
    }

    /// Attends `q [Q, L, heads d]` to `keys` and `values [N, L', heads d]`; `pairs[b] = (row of q, sequence)`.
    pub(crate) fn cross_attention(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        heads: usize,
        pairs: &[(u32, u32)],
    ) -> Result<Tensor> {
        let (q, keys, values) = (q.contiguous()?, keys.contiguous()?, values.contiguous()?);
        let ((_, q_len, channels), (_, kv_len, _), dtype) = (q.dims3()?, keys.dims3()?, q.dtype());
        let rows = |of: fn(&(u32, u32)) -> u32| self.indices(&pairs.iter().map(of).collect::<Vec<_>>());
        let sequences = |start, rows, len| Sequences { start, rows, len, stride: channels, image: len * channels };
        let (of_queries, of_sequences) = (rows(|pair| pair.0)?, rows(|pair| pair.1)?);
        let queries = sequences(self.pointer(&q)?, of_queries.pointer, q_len);
        let start = self.operand(Some(&keys), dtype, keys.elem_count())?;
        let sequences = sequences(start, of_sequences.pointer, kv_len);
        let values = self.operand(Some(&values), dtype, keys.elem_count())?;
        self.attention(queries, sequences, values, [pairs.len(), heads, channels / heads], false, dtype)
    }

    /// Attends queries to keys, for `[images, heads, d]`. The values are laid out like the keys.
    fn attention(
        &self,
        q: Sequences,
        k: Sequences,
        values: Pointer,
        [images, heads, dim]: [usize; 3],
        causal: bool,
        dtype: DType,
    ) -> Result<Tensor> {
        let Some((width, tiles)) = TILES.iter().find(|(width, _)| dim <= *width) else {
            bail!("heads of {dim} channels are too wide for the device's kernels");
        };
        let (queries, shared) = tiles[usize::from(dtype == DType::F32)];
        let (out, to) = self.output(dtype, (images, q.len, heads * dim))?;
        self.kernel(&format!("attention_d{width}"), dtype)?
            .pointers(&[q.start, q.rows, k.start, values, k.rows, to])
            .sizes(&[images, q.len, k.len, heads, dim, q.stride, k.stride])?
            .long(q.image)
            .long(k.image)
            .float(1.0 / (dim as f64).sqrt())
            .flag(causal)
            .run([q.len.div_ceil(queries), heads, images], THREADS, shared)?;
        Ok(out)
    }
}
