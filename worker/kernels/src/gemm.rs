//! The matrix product behind linear layers, convolutions and attention.
//!
//! `out[m, n] = bias[n] + residual[m, n] + sum_k A[m, k] B[k, n]`, where a row of A is a base offset into a buffer plus
//! a list of contiguous segments. A linear layer has one segment. A 3x3 convolution over a padded channels-last image
//! has three (three neighbouring pixels each), so it is an implicit product that never writes a patch matrix.
//!
//! B is packed once into panels of up to three vectors of columns. A tile of rows by one panel stays in registers
//! during the loop over the inner dimension. Remaining rows use smaller tiles, whose elements see the same operations
//! in the same order.

use pulp::Simd;

use super::math::{Kernel, dispatch, lanes, outline};

/// Vectors of columns in the widest panel: with eight rows, 24 of AVX-512's 32 registers accumulate.
const PANEL_VECTORS: usize = 3;
/// Block size of the inner dimension, so that a panel's part stays in the first-level cache.
const BLOCK_K: usize = 224;
/// Rows per block for one block of the inner dimension.
const BLOCK_M: usize = 192;

/// Matrix B `[k, n]`, packed in panels of columns.
#[derive(Debug)]
pub(crate) struct Packed {
    k: usize,
    n: usize,
    data: Vec<f32>,
    start: usize,
}

impl Packed {
    /// Packs the matrix whose element in row `k` and column `n` is `at(k, n)`.
    pub(crate) fn new(k: usize, n: usize, at: impl Fn(usize, usize) -> f32) -> Self {
        const LINE: usize = 16; // floats in a cache line: aligned loads never straddle two
        let len = packed_len(k, n);
        let mut data = vec![0.0; len + LINE];
        let start = data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let columns: Vec<f32> = (0..n).flat_map(|n| (0..k).map(move |k| (k, n))).map(|(k, n)| at(k, n)).collect();
        let column = |n: usize| columns.get(n * k..(n + 1) * k);
        pack_transposed(k, n, &mut data[start..start + len], column);
        Self { k, n, data, start }
    }

    /// The values of column `n`, starting at the first row.
    pub(crate) fn column(&self, n: usize) -> impl Iterator<Item = f32> {
        let lanes = lanes();
        let panel = panels(self.n.div_ceil(lanes)).find(|(first, vectors)| n < (first + vectors) * lanes);
        let (first, width) = panel.map_or((0, 1), |(first, vectors)| (first * lanes, vectors * lanes));
        let values = &self.data[self.start + first * self.k + n - first..];
        values.iter().copied().step_by(width).take(self.k)
    }

    /// A borrowed view.
    pub(crate) fn view(&self) -> PackedView<'_> {
        PackedView { k: self.k, n: self.n, data: &self.data[self.start..] }
    }
}

/// A packed matrix within a larger buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedView<'a> {
    /// Rows of B.
    pub(crate) k: usize,
    /// Columns of B.
    pub(crate) n: usize,
    /// The panels, at least `packed_len(k, n)` values.
    pub(crate) data: &'a [f32],
}

/// Number of values in a packed matrix.
fn packed_len(k: usize, n: usize) -> usize {
    k * n.next_multiple_of(lanes())
}

/// Packs a `[k, n]` matrix whose columns are `column(n)`; missing columns are zero.
fn pack_transposed<'a>(k: usize, n: usize, data: &mut [f32], column: impl Fn(usize) -> Option<&'a [f32]>) {
    let lanes = lanes();
    for (first, vectors) in panels(n.div_ceil(lanes)) {
        let (width, first) = (vectors * lanes, first * lanes);
        let panel = &mut data[first * k..][..width * k];
        for j in 0..width {
            let to = panel[j..].iter_mut().step_by(width);
            match column(first + j).filter(|_| first + j < n) {
                Some(column) => to.zip(column).for_each(|(to, from)| *to = *from),
                None => to.for_each(|to| *to = 0.0),
            }
        }
    }
}

/// First vector and number of vectors of each panel; widths differ by at most one.
pub(crate) fn panels(vectors: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = vectors.div_ceil(PANEL_VECTORS).max(1);
    let (base, extra) = (vectors / count, vectors % count);
    (0..count).map(move |i| (i * base + i.min(extra), base + usize::from(i < extra)))
}

/// One product; see the module documentation.
pub(crate) struct Gemm<'a> {
    /// The buffer that holds A's rows.
    pub(crate) a: &'a [f32],
    /// Offset of each row of A.
    pub(crate) rows: &'a [usize],
    /// Offset of each segment from its row's offset.
    pub(crate) segments: &'a [usize],
    /// Length of every segment; segments x length is `b.k`.
    pub(crate) segment_len: usize,
    /// The packed matrix B.
    pub(crate) b: PackedView<'a>,
    /// Added to every row, `[n]`.
    pub(crate) bias: Option<&'a [f32]>,
    /// Added to the result, laid out like `out`.
    pub(crate) residual: Option<&'a [f32]>,
    /// The result: row `m` is at `m * stride`.
    pub(crate) out: &'a mut [f32],
    /// Distance between rows of `out` and `residual`.
    pub(crate) stride: usize,
}

impl Gemm<'_> {
    /// Runs the product on the calling thread.
    pub(crate) fn run(self) {
        dispatch(self);
    }

    /// Runs the product within another kernel.
    #[inline(always)]
    pub(crate) fn run_within<S: Simd>(mut self, simd: S) {
        let (k, vectors) = (self.b.k, self.b.n.div_ceil(S::F32_LANES));
        for m0 in (0..self.rows.len()).step_by(BLOCK_M) {
            let m1 = (m0 + BLOCK_M).min(self.rows.len());
            for k0 in (0..k).step_by(BLOCK_K) {
                let k1 = (k0 + BLOCK_K).min(k);
                let (segment, within) = (k0 / self.segment_len, k0 % self.segment_len);
                for (first, width) in panels(vectors) {
                    let part = Part { gemm: &mut self, m0, m1, k0, k1, segment, within, first };
                    let whole = (first + width) * S::F32_LANES <= part.gemm.b.n;
                    match (width, whole) {
                        (1, true) => outline(simd, Panel::<1, true>(part)),
                        (1, false) => outline(simd, Panel::<1, false>(part)),
                        (2, true) => outline(simd, Panel::<2, true>(part)),
                        (2, false) => outline(simd, Panel::<2, false>(part)),
                        (_, true) => outline(simd, Panel::<PANEL_VECTORS, true>(part)),
                        (_, false) => outline(simd, Panel::<PANEL_VECTORS, false>(part)),
                    }
                }
            }
        }
    }
}

impl Kernel for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.run_within(simd);
    }
}

/// Rows `m0..m1` times the panel that starts at vector `first`, over `k0..k1` of the inner dimension.
struct Part<'p, 'g> {
    gemm: &'p mut Gemm<'g>,
    m0: usize,
    m1: usize,
    k0: usize,
    k1: usize,
    /// The segment that contains `k0`, and the position in it.
    segment: usize,
    within: usize,
    first: usize,
}

/// `NV` vectors of columns; unless `WHOLE`, the last one is partly beyond the last column. Making this a compile-time
/// parameter keeps the sums of whole panels in registers throughout.
struct Panel<'p, 'g, const NV: usize, const WHOLE: bool>(Part<'p, 'g>);

impl<const NV: usize, const WHOLE: bool> Kernel for Panel<'_, '_, NV, WHOLE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut part = self.0;
        let mut m = part.m0;
        if S::F32_LANES >= 16 {
            m = part.tiles::<S, 8, NV, WHOLE>(simd, m);
        }
        m = part.tiles::<S, 4, NV, WHOLE>(simd, m);
        m = part.tiles::<S, 2, NV, WHOLE>(simd, m);
        part.tiles::<S, 1, NV, WHOLE>(simd, m);
    }
}

impl Part<'_, '_> {
    /// Works on whole tiles of `MR` rows from row `m` on; returns the first row not done.
    #[inline(always)]
    fn tiles<S: Simd, const MR: usize, const NV: usize, const WHOLE: bool>(&mut self, simd: S, mut m: usize) -> usize {
        let all = self.gemm.rows;
        while m + MR <= self.m1 {
            if let Some(rows) = all[m..].first_chunk::<MR>() {
                self.tile::<S, MR, NV, WHOLE>(simd, m, rows);
            }
            m += MR;
        }
        m
    }

    #[inline(always)]
    fn tile<S: Simd, const MR: usize, const NV: usize, const WHOLE: bool>(
        &mut self,
        simd: S,
        m: usize,
        rows: &[usize; MR],
    ) {
        let gemm = &mut *self.gemm;
        let (k, n, width) = (gemm.b.k, gemm.b.n, NV * S::F32_LANES);
        let column = self.first * S::F32_LANES;
        let columns = if WHOLE { width } else { n - column };
        let panel = &gemm.b.data[column * k..][..width * k];

        let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
        if self.k0 > 0 {
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = load::<S, NV, WHOLE>(simd, &gemm.out[(m + r) * gemm.stride + column..][..columns]);
            }
        } else if let Some(bias) = gemm.bias {
            acc = [load::<S, NV, WHOLE>(simd, &bias[column..][..columns]); MR];
        }

        let (mut k0, mut within) = (self.k0, self.within);
        for segment in &gemm.segments[self.segment..] {
            let len = (gemm.segment_len - within).min(self.k1 - k0);
            let offset = segment + within;
            let b = &panel[k0 * width..][..len * width];
            let mut a = [&gemm.a[..0]; MR];
            for (a, row) in a.iter_mut().zip(rows) {
                *a = &gemm.a[row + offset..][..len];
            }
            multiply(simd, &mut acc, &a, b, len);
            (k0, within) = (k0 + len, 0);
            if k0 == self.k1 {
                break;
            }
        }

        let start = m * gemm.stride + column;
        let out = &mut gemm.out[start..];
        let residual = gemm.residual.filter(|_| self.k1 == k).map(|r| &r[start..]);
        if WHOLE {
            finish(simd, acc, residual, out, gemm.stride);
        } else {
            finish_partly(simd, &acc, residual, out, gemm.stride, columns);
        }
    }
}

/// Adds the residual and writes a tile of whole vectors. The simple loops keep the sums in registers.
#[inline(always)]
fn finish<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    mut acc: [[S::f32s; NV]; MR],
    residual: Option<&[f32]>,
    out: &mut [f32],
    stride: usize,
) {
    let width = NV * S::F32_LANES;
    if let Some(residual) = residual {
        for r in 0..MR {
            let values = S::as_simd_f32s(&residual[r * stride..][..width]).0;
            for v in 0..NV {
                acc[r][v] = simd.add_f32s(acc[r][v], values[v]);
            }
        }
    }
    for r in 0..MR {
        let values = S::as_mut_simd_f32s(&mut out[r * stride..][..width]).0;
        if let Some(values) = values.first_chunk_mut::<NV>() {
            *values = acc[r];
        }
    }
}

/// The same for a tile whose last vector is partly beyond the last column.
#[inline(always)]
fn finish_partly<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    acc: &[[S::f32s; NV]; MR],
    residual: Option<&[f32]>,
    out: &mut [f32],
    stride: usize,
    columns: usize,
) {
    for (r, acc) in acc.iter().enumerate() {
        for (v, &sum) in acc.iter().enumerate() {
            let lanes = v * S::F32_LANES..columns.min((v + 1) * S::F32_LANES);
            let added = residual.map(|residual| &residual[r * stride..][lanes.clone()]);
            let sum = match added {
                Some(added) => simd.add_f32s(sum, simd.partial_load_f32s(added)),
                None => sum,
            };
            simd.partial_store_f32s(&mut out[r * stride..][lanes], sum);
        }
    }
}

/// The inner loop: `acc[r][v] += a[r][k] * b[k][v]`, k ascending.
///
/// Slices are cut to `len` values first, so that the loop has no bounds checks.
#[inline(always)]
pub(crate) fn multiply<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    acc: &mut [[S::f32s; NV]; MR],
    a: &[&[f32]; MR],
    b: &[f32],
    len: usize,
) {
    let b = &S::as_simd_f32s(b).0.as_chunks::<NV>().0[..len];
    let mut cut = [&a[0][..0]; MR];
    for (cut, a) in cut.iter_mut().zip(a) {
        *cut = &a[..len];
    }
    let (a, mut sums) = (cut, *acc);
    for k in 0..len {
        let b = b[k];
        for r in 0..MR {
            let a = simd.splat_f32s(a[r][k]);
            for v in 0..NV {
                sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
            }
        }
    }
    *acc = sums;
}

#[inline(always)]
fn load<S: Simd, const NV: usize, const WHOLE: bool>(simd: S, from: &[f32]) -> [S::f32s; NV] {
    let mut vectors = [simd.splat_f32s(0.0); NV];
    if WHOLE {
        let from = S::as_simd_f32s(&from[..NV * S::F32_LANES]).0;
        if let Some(from) = from.first_chunk::<NV>() {
            vectors = *from;
        }
    } else {
        for (vector, from) in vectors.iter_mut().zip(from.chunks(S::F32_LANES)) {
            *vector = simd.partial_load_f32s(from);
        }
    }
    vectors
}
