//! Multi-head attention, `softmax(Q K^T / sqrt(d)) V` per image and head.
//!
//! On the CPU it runs head by head and block by block (`flash`). A prompt's keys and values are the same for all its
//! evaluations, so [`KeyValues`] packs them once.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

use super::cpu::{full_precision, is_cpu_f32, values, with_values};
use super::flash::{Attend, Pack, Plan, Scratch};
use super::profile::{Part, timed};
use super::simd::dispatch;

/// Keys and values of `N` sequences, ready for attention.
#[derive(Debug)]
pub struct KeyValues {
    heads: usize,
    /// Width of a head.
    dim: usize,
    /// Number of keys in a sequence.
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
        if keys.dims() != values.dims() || heads == 0 || channels == 0 || channels % heads != 0 {
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
                        let (keys, values) = (&k[i * len * channels..], &v[i * len * channels..]);
                        dispatch(Pack { plan, keys, values, stride: channels, packed: data });
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
/// `q` is `[Q, L, heads * d]`, `pairs[b]` is `(row of q, sequence)`, and the result is `[B, L, heads * d]`.
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
        Store::Packed(packed) => {
            let plan = Plan { heads: cache.heads, dim: cache.dim, len: cache.len };
            q.contiguous()?.apply_op1_no_bwd(&CrossOp { plan, packed, pairs })
        }
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

/// Self-attention over `qkv [B, L, 3 heads d]` (queries, keys, values side by side); returns `[B, L, heads d]`.
///
/// With `causal`, position `i` attends to positions `0..=i` only.
pub fn self_attention(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (_, len, width) = qkv.dims3()?;
    if heads == 0 || width == 0 || width % (3 * heads) != 0 {
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
    /// Maximum number of scores computed at once, since candle's GPU kernels count them in 32 bits.
    const MOST_SCORES: usize = i32::MAX as usize;
    let (batch, len, _) = q.dims3()?;
    let at_once = (MOST_SCORES / (heads * len * k.dim(1)?).max(1)).max(1);
    if batch <= at_once {
        return plain_at_once(q, k, v, heads, causal);
    }
    let parts = (0..batch).step_by(at_once).map(|first| {
        let part = |x: &Tensor| x.narrow(0, first, at_once.min(batch - first));
        plain_at_once(&part(q)?, &part(k)?, &part(v)?, heads, causal)
    });
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
}

fn plain_at_once(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
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

struct CrossOp<'a> {
    plan: Plan,
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
        let (plan, image) = (self.plan, queries * channels);
        let mut out = vec![0.0; self.pairs.len() * image];
        let mut scratch = Scratch::new(plan);
        let mut rest = &mut out[..];
        // Pairs that share queries are adjacent, so the queries are laid out once for all of them.
        for pairs in self.pairs.chunk_by(|a, b| a.0 == b.0) {
            let (out, after) = rest.split_at_mut(pairs.len() * image);
            rest = after;
            let sequence = |&(_, s): &(u32, u32)| &self.packed[s as usize * plan.sequence_len()..];
            dispatch(Attend {
                plan,
                q: &q[pairs[0].0 as usize * image..][..image],
                queries,
                stride: channels,
                causal: false,
                sequences: &pairs.iter().map(sequence).collect::<Vec<_>>(),
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
        let mut scratch = Scratch::new(plan);
        let images = qkv.chunks_exact((len * width).max(1));
        for (qkv, out) in images.zip(out.chunks_exact_mut((len * channels).max(1))) {
            let (keys, values) = (&qkv[channels..], &qkv[2 * channels..]);
            dispatch(Pack { plan, keys, values, stride: width, packed: &mut packed });
            dispatch(Attend {
                plan,
                q: qkv,
                queries: len,
                stride: width,
                causal: self.causal,
                sequences: &[&packed],
                scratch: &mut scratch,
                out,
            });
        }
        Ok((CpuStorage::F32(out), Shape::from((batch, len, channels))))
    }
}
