//! Multi-head attention, `softmax(Q K^T / sqrt(d)) V` per image and head.
//!
//! Keys (transposed) and values are packed for the matrix product; a tile of queries is scored against all keys, so the
//! scores in memory are bounded by the tile however long the sequences are. The keys and values of a prompt are the same
//! for every evaluation with that prompt: [`KeyValues`] packs them once.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use pulp::Simd;

use super::cpu::{full_precision, is_cpu_f32, values, with_values};
use super::gemm::{Gemm, PackedView, pack_rows, pack_transposed, packed_len};
use super::math::{Kernel, dispatch, exp, fold, max};
use super::profile::{Part, timed};

/// Scores kept at once: about a first-level cache's half.
const TILE_SCORES: usize = 6 * 1024;
/// Score rows are padded to this many columns.
const ALIGN: usize = 16;

/// Keys and values of `N` sequences, ready for attention.
#[derive(Debug)]
pub struct KeyValues {
    heads: usize,
    /// Width of a head.
    dim: usize,
    /// Keys of a sequence.
    len: usize,
    count: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Packed(Vec<f32>),
    Plain { keys: Tensor, values: Tensor },
}

impl KeyValues {
    /// Packs keys and values, both `[N, L, heads * d]`.
    pub fn new(keys: &Tensor, values: &Tensor, heads: usize) -> Result<Self> {
        let (count, len, channels) = keys.dims3()?;
        if keys.dims() != values.dims() || heads == 0 || channels % heads != 0 {
            bail!("{heads} heads over keys {:?} and values {:?}", keys.shape(), values.shape());
        }
        let dim = channels / heads;
        let plan = Plan { heads, dim, len };
        let store = if is_cpu_f32(keys) && is_cpu_f32(values) {
            let (keys, values) = (keys.contiguous()?, values.contiguous()?);
            let mut data = vec![0.0; count * plan.sequence_len()];
            with_values(&keys, |k| {
                with_values(&values, |v| {
                    for (i, data) in data.chunks_exact_mut(plan.sequence_len().max(1)).enumerate() {
                        let (k, v) = (&k[i * len * channels..], &v[i * len * channels..]);
                        plan.pack(k, v, channels, data);
                    }
                    Ok(())
                })
            })?;
            Store::Packed(data)
        } else {
            Store::Plain { keys: keys.clone(), values: values.clone() }
        };
        Ok(Self { heads, dim, len, count, store })
    }
}

/// Attends queries to cached sequences.
///
/// `q [Q, L, heads * d]`; `pairs[b] = (row of q, sequence)`; gives `[B, L, heads * d]`.
pub fn cross_attention(q: &Tensor, cache: &KeyValues, pairs: &[(u32, u32)]) -> Result<Tensor> {
    let (rows, _, channels) = q.dims3()?;
    if channels != cache.heads * cache.dim {
        bail!("queries {:?} do not fit {} heads of {}", q.shape(), cache.heads, cache.dim);
    }
    if let Some((query, sequence)) = pairs.iter().find(|(q, s)| *q as usize >= rows || *s as usize >= cache.count) {
        bail!("no query row {query} or sequence {sequence} among {rows} and {}", cache.count);
    }
    let flops = 4 * pairs.len() * q.dim(1)? * cache.len * channels;
    timed(q, Part::Attention, "cross-attention", flops, || match &cache.store {
        Store::Packed(packed) => q.contiguous()?.apply_op1_no_bwd(&CrossOp { cache, packed, pairs }),
        Store::Plain { keys, values } => {
            #[cfg(feature = "cuda")]
            if crate::cuda::attention::fits(cache.dim) {
                on_gpu!(q, gpu => gpu.cross_attention(q, keys, values, cache.heads, pairs));
            }
            let column = |f: fn(&(u32, u32)) -> u32| Tensor::from_iter(pairs.iter().map(f), q.device());
            let (queries, sequences) = (column(|p| p.0)?, column(|p| p.1)?);
            let q = q.index_select(&queries, 0)?;
            let (k, v) = (keys.index_select(&sequences, 0)?, values.index_select(&sequences, 0)?);
            plain(&q, &k, &v, cache.heads, false)
        }
    })
}

/// Self-attention over `qkv [B, L, 3 heads d]` (queries, keys, values side by side), giving `[B, L, heads d]`.
///
/// With `causal`, position `i` attends to positions `0..=i` only.
pub fn self_attention(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (_, len, width) = qkv.dims3()?;
    if heads == 0 || width % (3 * heads) != 0 {
        bail!("{:?} does not divide into queries, keys and values of {heads} heads", qkv.shape());
    }
    timed(qkv, Part::Attention, "self-attention", 4 * qkv.elem_count() / 3 * len, || {
        #[cfg(feature = "cuda")]
        if crate::cuda::attention::fits(width / 3 / heads) {
            on_gpu!(qkv, gpu => gpu.self_attention(qkv, heads, causal));
        }
        if is_cpu_f32(qkv) {
            let plan = Plan { heads, dim: width / 3 / heads, len };
            return qkv.contiguous()?.apply_op1_no_bwd(&SelfOp { plan, causal });
        }
        let parts = qkv.chunk(3, D::Minus1)?;
        plain(&parts[0], &parts[1], &parts[2], heads, causal)
    })
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (batch, len, channels) = q.dims3()?;
    let dim = channels / heads;
    let split = |x: &Tensor| x.reshape((batch, x.dim(1)?, heads, dim))?.transpose(1, 2)?.contiguous();
    let scores = split(q)?.matmul(&split(k)?.t()?)?;
    let mut scores = (full_precision(&scores)? / (dim as f64).sqrt())?;
    if causal {
        let hidden = (0..len * len).map(|i| if i % len > i / len { f32::NEG_INFINITY } else { 0.0 });
        let mask = Tensor::from_iter(hidden, q.device())?.reshape((len, len))?;
        scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
    }
    let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
    weights.to_dtype(v.dtype())?.matmul(&split(v)?)?.transpose(1, 2)?.reshape((batch, len, channels))
}

/// How one sequence's keys and values are packed: per head K^T `[d, keys]`, then V `[keys, d]`.
#[derive(Clone, Copy, Debug)]
struct Plan {
    heads: usize,
    dim: usize,
    /// Keys.
    len: usize,
}

impl Plan {
    fn columns(self) -> usize {
        self.len.next_multiple_of(ALIGN)
    }

    fn keys_len(self) -> usize {
        packed_len(self.dim, self.columns())
    }

    fn head_len(self) -> usize {
        self.keys_len() + packed_len(self.len, self.dim)
    }

    fn sequence_len(self) -> usize {
        self.heads * self.head_len()
    }

    /// Packs one sequence whose positions are `stride` values apart.
    fn pack(self, keys: &[f32], values: &[f32], stride: usize, data: &mut [f32]) {
        for (h, data) in data.chunks_exact_mut(self.head_len()).enumerate() {
            let (packed_keys, packed_values) = data.split_at_mut(self.keys_len());
            let (first, end) = (h * self.dim, (h + 1) * self.dim);
            pack_transposed(self.dim, self.columns(), packed_keys, |n| {
                let position = n * stride;
                (n < self.len).then(|| &keys[position + first..position + end])
            });
            pack_rows(self.len, self.dim, packed_values, |k| &values[k * stride + first..k * stride + end]);
        }
    }

    /// Queries scored at once.
    fn tile(self, queries: usize) -> usize {
        (TILE_SCORES / self.columns().max(1) / 8 * 8).clamp(8, 64).min(queries.max(1))
    }
}

struct CrossOp<'a> {
    cache: &'a KeyValues,
    packed: &'a [f32],
    pairs: &'a [(u32, u32)],
}

impl CustomOp1 for CrossOp<'_> {
    fn name(&self) -> &'static str {
        "cross-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let q = values(storage, layout)?;
        let (_, queries, channels) = layout.shape().dims3()?;
        let plan = Plan { heads: self.cache.heads, dim: self.cache.dim, len: self.cache.len };
        let image = queries * channels;
        let mut out = vec![0.0; self.pairs.len() * image];
        let mut scratch = Scratch::new(plan, queries, channels);
        for (&(query, sequence), out) in self.pairs.iter().zip(out.chunks_exact_mut(image.max(1))) {
            dispatch(Attend {
                plan,
                q: &q[query as usize * image..][..image],
                packed: &self.packed[sequence as usize * plan.sequence_len()..],
                causal: false,
                scratch: &mut scratch,
                out,
            });
        }
        Ok((CpuStorage::F32(out), Shape::from((self.pairs.len(), queries, channels))))
    }
}

struct SelfOp {
    plan: Plan,
    causal: bool,
}

impl CustomOp1 for SelfOp {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = values(storage, layout)?;
        let (batch, len, width) = layout.shape().dims3()?;
        let (plan, channels) = (self.plan, width / 3);
        let mut out = vec![0.0; batch * len * channels];
        let mut packed = vec![0.0; plan.sequence_len()];
        let mut scratch = Scratch::new(plan, len, width);
        let images = qkv.chunks_exact((len * width).max(1));
        for (qkv, out) in images.zip(out.chunks_exact_mut((len * channels).max(1))) {
            plan.pack(&qkv[channels..], &qkv[2 * channels..], width, &mut packed);
            dispatch(Attend { plan, q: qkv, packed: &packed, causal: self.causal, scratch: &mut scratch, out });
        }
        Ok((CpuStorage::F32(out), Shape::from((batch, len, channels))))
    }
}

/// Buffers of one operation, reused from image to image.
struct Scratch {
    queries: usize,
    tile: usize,
    /// A tile's scores, then weights.
    scores: Vec<f32>,
    /// Offsets of the queries.
    query_rows: Vec<usize>,
    /// Offsets of a tile's score rows.
    score_rows: Vec<usize>,
    /// Sum of each score row's exponentials.
    sums: Vec<f32>,
}

impl Scratch {
    fn new(plan: Plan, queries: usize, stride: usize) -> Self {
        let tile = plan.tile(queries);
        Self {
            queries,
            tile,
            scores: vec![0.0; tile * plan.columns()],
            query_rows: (0..queries).map(|i| i * stride).collect(),
            score_rows: (0..tile).map(|i| i * plan.columns()).collect(),
            sums: vec![0.0; tile],
        }
    }
}

/// All heads of one image against one packed sequence.
struct Attend<'a> {
    plan: Plan,
    q: &'a [f32],
    packed: &'a [f32],
    causal: bool,
    scratch: &'a mut Scratch,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (plan, scratch) = (self.plan, self.scratch);
        let channels = plan.heads * plan.dim;
        let columns = plan.columns();
        let scale = 1.0 / (plan.dim as f32).sqrt();
        for (h, head) in self.packed.chunks_exact(plan.head_len()).take(plan.heads).enumerate() {
            let (keys, values) = head.split_at(plan.keys_len());
            for first in (0..scratch.queries).step_by(scratch.tile) {
                let rows = scratch.tile.min(scratch.queries - first);
                Gemm {
                    a: &self.q[h * plan.dim..],
                    rows: &scratch.query_rows[first..first + rows],
                    segments: &[0],
                    segment_len: plan.dim,
                    b: PackedView { k: plan.dim, n: columns, data: keys },
                    bias: None,
                    residual: None,
                    out: &mut scratch.scores,
                    stride: columns,
                }
                .run_within(simd);
                let tile = scratch.scores.chunks_exact_mut(columns).zip(&mut scratch.sums);
                for (i, (row, total)) in tile.take(rows).enumerate() {
                    let visible = if self.causal { first + i + 1 } else { plan.len };
                    row[visible..].fill(f32::NEG_INFINITY);
                    *total = exponentials(row, scale);
                }
                let out = &mut self.out[first * channels + h * plan.dim..];
                Gemm {
                    a: &scratch.scores,
                    rows: &scratch.score_rows[..rows],
                    segments: &[0],
                    segment_len: plan.len,
                    b: PackedView { k: plan.len, n: plan.dim, data: values },
                    bias: None,
                    residual: None,
                    out,
                    stride: channels,
                }
                .run_within(simd);
                for (i, total) in scratch.sums[..rows].iter().enumerate() {
                    let inverse = 1.0 / total;
                    for v in &mut out[i * channels..][..plan.dim] {
                        *v *= inverse;
                    }
                }
            }
        }
    }
}

/// Replaces scores `s` by `exp(scale (s - max))` and returns their sum.
#[inline(always)]
fn exponentials(row: &mut [f32], scale: f32) -> f32 {
    let largest = max(row);
    let mut sums = [0.0f32; ALIGN];
    for chunk in row.as_chunks_mut::<ALIGN>().0 {
        for (v, sum) in chunk.iter_mut().zip(&mut sums) {
            *v = exp((*v - largest) * scale);
            *sum += *v;
        }
    }
    fold(sums, |a, b| a + b)
}
