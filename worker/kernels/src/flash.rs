//! Attention of one head on the CPU, block of keys by block of keys.
//!
//! The softmax is online (Milakov & Gimelshein, 2018), with FlashAttention's loop order (Dao et al., 2022). A panel of
//! queries goes through all keys and keeps a running maximum, the sum of exponentials and the weighted values, so
//! memory does not grow with the sequence. A panel's queries are stored side by side in the lanes of its vectors. Both
//! products and the softmax between them therefore use whole vectors, however narrow a head is, and every query sees
//! its keys in the same order on every machine.

use pulp::Simd;

use super::gemm::{Tiles, all_tiles, multiply, panels};
use super::math::exp2;
use super::simd::{Kernel, outline};

/// Keys per block: a multiple of every tile's rows. Their scores for the widest panel take three quarters of a first-level
/// cache.
const BLOCK_KEYS: usize = 120;
/// Panels that go through a block of keys one after the other, while it is in the second-level cache.
const PANELS: usize = 4;
/// Floats in the widest panel's row: three vectors of AVX-512.
const WIDEST: usize = 48;

/// How one sequence's keys and values are packed. Each head has its keys `[len, dim]`, then its values as `[dim, keys]`
/// for each block of keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) heads: usize,
    /// Width of a head.
    pub(crate) dim: usize,
    /// Number of keys.
    pub(crate) len: usize,
}

impl Plan {
    fn head_len(self) -> usize {
        2 * self.len * self.dim
    }

    /// Number of values in a packed sequence.
    pub(crate) fn sequence_len(self) -> usize {
        self.heads * self.head_len()
    }
}

/// Packs one sequence whose positions are `stride` values apart.
pub(crate) struct Pack<'a> {
    pub(crate) plan: Plan,
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    /// `plan.sequence_len()` values.
    pub(crate) packed: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Plan { dim, len, .. } = self.plan;
        for (h, head) in self.packed.chunks_exact_mut(self.plan.head_len().max(1)).enumerate() {
            let (keys, values) = head.split_at_mut(len * dim);
            for (position, key) in keys.chunks_exact_mut(dim).enumerate() {
                key.copy_from_slice(&self.keys[position * self.stride + h * dim..][..dim]);
            }
            for (i, block) in values.chunks_mut(BLOCK_KEYS * dim).enumerate() {
                let from = &self.values[i * BLOCK_KEYS * self.stride + h * dim..];
                let count = block.len() / dim;
                transpose(from, self.stride, [count, dim], block, count);
            }
        }
    }
}

/// Buffers of one operation, reused from panel to panel.
pub(crate) struct Scratch {
    /// Scores of a block of keys for one panel, then their exponentials, `[keys, panel]`.
    scores: Vec<f32>,
    panels: [Panel; PANELS],
}

/// A panel of queries and what they attended to so far.
struct Panel {
    /// The queries, `[dim, panel]`.
    queries: Vec<f32>,
    /// Sums of weighted values, `[dim, panel]`.
    sums: Vec<f32>,
    /// For each query, the largest score and the sum of exponentials.
    largest: [f32; WIDEST],
    total: [f32; WIDEST],
}

impl Scratch {
    pub(crate) fn new(plan: Plan) -> Self {
        let zeros = |rows: usize| vec![0.0; rows * WIDEST];
        let panel =
            |_| Panel { queries: zeros(plan.dim), sums: zeros(plan.dim), largest: [0.0; WIDEST], total: [0.0; WIDEST] };
        Self { scores: zeros(BLOCK_KEYS.min(plan.len)), panels: std::array::from_fn(panel) }
    }
}

/// All heads of one image's queries, against each of some packed sequences.
pub(crate) struct Attend<'a> {
    pub(crate) plan: Plan,
    /// Queries `[queries, heads * dim]`, positions `stride` values apart.
    pub(crate) q: &'a [f32],
    pub(crate) queries: usize,
    pub(crate) stride: usize,
    /// Query `i` sees keys `0..=i` only.
    pub(crate) causal: bool,
    /// The packed sequences.
    pub(crate) sequences: &'a [&'a [f32]],
    pub(crate) scratch: &'a mut Scratch,
    /// `[sequences, queries, heads * dim]`.
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { plan: Plan { heads, dim, len }, queries, causal, scratch, .. } = self;
        let channels = heads * dim;
        let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
        let mut all = panels::<S>(queries.div_ceil(S::F32_LANES))
            .map(|(first, vectors)| (first * S::F32_LANES, vectors * S::F32_LANES));
        loop {
            let mut group = [(0, 0); PANELS];
            let count = group.iter_mut().zip(&mut all).map(|(place, panel)| *place = panel).count();
            let group = &group[..count];
            if group.is_empty() {
                return;
            }
            for h in 0..heads {
                for (panel, &(first, width)) in scratch.panels.iter_mut().zip(group) {
                    let used = width.min(queries - first);
                    let q = &mut panel.queries[..dim * width];
                    if used < width {
                        q.fill(0.0);
                    }
                    transpose(&self.q[first * self.stride + h * dim..], self.stride, [used, dim], q, width);
                    q.iter_mut().for_each(|q| *q *= scale);
                }
                for (i, sequence) in self.sequences.iter().enumerate() {
                    let head = &sequence[h * self.plan.head_len()..][..self.plan.head_len()];
                    let (keys, values) = head.split_at(len * dim);
                    for block in (0..len).step_by(BLOCK_KEYS) {
                        let count = BLOCK_KEYS.min(len - block);
                        for (panel, &(first, width)) in scratch.panels.iter_mut().zip(group) {
                            let step = Step {
                                dim,
                                keys: &keys[block * dim..][..count * dim],
                                values: &values[block * dim..][..count * dim],
                                order: causal.then_some((block, first)),
                                begins: block == 0,
                                scores: &mut scratch.scores[..count * width],
                                panel,
                            };
                            match width / S::F32_LANES {
                                1 => outline(simd, Vectors::<1>(step)),
                                2 => outline(simd, Vectors::<2>(step)),
                                _ => outline(simd, Vectors::<3>(step)),
                            }
                        }
                    }
                    for (panel, &(first, width)) in scratch.panels.iter_mut().zip(group) {
                        for sums in panel.sums[..dim * width].chunks_exact_mut(width) {
                            sums.iter_mut().zip(&panel.total).for_each(|(sum, total)| *sum /= total);
                        }
                        let out = &mut self.out[(i * queries + first) * channels + h * dim..];
                        transpose(&panel.sums, width, [dim, width.min(queries - first)], out, channels);
                    }
                }
            }
        }
    }
}

/// A panel of queries against a block of keys of one head.
struct Step<'a> {
    dim: usize,
    keys: &'a [f32],
    values: &'a [f32],
    /// Positions of the first key and the first query, if a query sees no later keys.
    order: Option<(usize, usize)>,
    /// Whether this is the first block.
    begins: bool,
    scores: &'a mut [f32],
    panel: &'a mut Panel,
}

/// A panel of `NV` vectors.
struct Vectors<'a, const NV: usize>(Step<'a>);

impl<const NV: usize> Kernel for Vectors<'_, NV> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Step { dim, keys, values, order, begins, scores, panel } = self.0;
        let width = NV * S::F32_LANES;
        let (queries, sums) = (&panel.queries[..dim * width], &mut panel.sums[..dim * width]);
        let count = keys.len() / dim;
        outline(simd, Product::<NV> { a: keys, rows: count, inner: dim, b: queries, add: false, out: scores });
        if let Some((key, query)) = order {
            hide(scores, width, key, query);
        }

        let (mut largest, mut total) = ([simd.splat_f32s(f32::NEG_INFINITY); NV], [simd.splat_f32s(0.0); NV]);
        if !begins {
            (largest, total) = (vectors::<S, NV>(&panel.largest)[0], vectors::<S, NV>(&panel.total)[0]);
        }
        let before = largest;
        for row in vectors::<S, NV>(scores) {
            for v in 0..NV {
                largest[v] = simd.max_f32s(largest[v], row[v]);
            }
        }
        if !begins {
            let mut factor = before;
            for v in 0..NV {
                factor[v] = exp2(simd, simd.sub_f32s(before[v], largest[v]));
                total[v] = simd.mul_f32s(total[v], factor[v]);
            }
            for row in vectors_mut::<S, NV>(sums) {
                for v in 0..NV {
                    row[v] = simd.mul_f32s(row[v], factor[v]);
                }
            }
        }
        for row in vectors_mut::<S, NV>(scores) {
            for v in 0..NV {
                row[v] = exp2(simd, simd.sub_f32s(row[v], largest[v]));
                total[v] = simd.add_f32s(total[v], row[v]);
            }
        }
        outline(simd, Product::<NV> { a: values, rows: dim, inner: count, b: scores, add: !begins, out: sums });
        vectors_mut::<S, NV>(&mut panel.largest)[0] = largest;
        vectors_mut::<S, NV>(&mut panel.total)[0] = total;
    }
}

/// Hides the scores of keys that come after a query. `key` and `query` are the positions of the first ones.
fn hide(scores: &mut [f32], width: usize, key: usize, query: usize) {
    for (j, row) in scores.chunks_exact_mut(width).enumerate() {
        let hidden = (key + j).saturating_sub(query).min(width);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

#[inline(always)]
fn vectors<S: Simd, const NV: usize>(rows: &[f32]) -> &[[S::f32s; NV]] {
    S::as_simd_f32s(rows).0.as_chunks::<NV>().0
}

#[inline(always)]
fn vectors_mut<S: Simd, const NV: usize>(rows: &mut [f32]) -> &mut [[S::f32s; NV]] {
    S::as_mut_simd_f32s(rows).0.as_chunks_mut::<NV>().0
}

/// `out[m] = sum_k a[m, k] b[k]`, as a separate function so that it can use all registers.
struct Product<'a, const NV: usize> {
    /// `rows` rows of `inner` values.
    a: &'a [f32],
    rows: usize,
    inner: usize,
    /// `inner` rows of `NV` vectors.
    b: &'a [f32],
    /// Whether the result is added to what `out` holds.
    add: bool,
    /// `rows` rows of `NV` vectors.
    out: &'a mut [f32],
}

impl<const NV: usize> Kernel for Product<'_, NV> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        all_tiles(simd, &mut self);
    }
}

impl<const NV: usize> Tiles for Product<'_, NV> {
    #[inline(always)]
    fn tiles<S: Simd, const MR: usize>(&mut self, simd: S, mut m: usize) -> usize {
        while m + MR <= self.rows {
            let mut rows = [&self.a[..0]; MR];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = &self.a[(m + r) * self.inner..][..self.inner];
            }
            if let Some(out) = vectors_mut::<S, NV>(self.out)[m..].first_chunk_mut::<MR>() {
                let sums = if self.add { *out } else { [[simd.splat_f32s(0.0); NV]; MR] };
                *out = multiply(simd, sums, &rows, self.b);
            }
            m += MR;
        }
        m
    }
}

/// `to[c, r] = from[r, c]` for `r < rows`, `c < columns`; rows of `from` and `to` are one stride apart.
#[inline(always)]
fn transpose(from: &[f32], stride: usize, [rows, columns]: [usize; 2], to: &mut [f32], to_stride: usize) {
    const SIDE: usize = 4;
    let (whole_rows, whole_columns) = (rows / SIDE * SIDE, columns / SIDE * SIDE);
    for r in (0..whole_rows).step_by(SIDE) {
        for c in (0..whole_columns).step_by(SIDE) {
            let mut square = [[0.0; SIDE]; SIDE];
            for (i, line) in square.iter_mut().enumerate() {
                line.copy_from_slice(&from[(r + i) * stride + c..][..SIDE]);
            }
            for j in 0..SIDE {
                let line: [f32; SIDE] = std::array::from_fn(|i| square[i][j]);
                to[(c + j) * to_stride + r..][..SIDE].copy_from_slice(&line);
            }
        }
    }
    for r in 0..rows {
        for c in if r < whole_rows { whole_columns } else { 0 }..columns {
            to[c * to_stride + r] = from[r * stride + c];
        }
    }
}
