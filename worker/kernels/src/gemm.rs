//! The matrix product behind linear layers, convolutions and attention.
//!
//! `out[m, n] = bias[n] + residual[m, n] + sum_k A[m, k] B[k, n]`, where a row of A is a base offset into a buffer plus
//! a list of contiguous segments. A linear layer has one segment. A 3x3 convolution over a padded channels-last image
//! has three (three neighbouring pixels each), so it is an implicit product that never writes a patch matrix.
//!
//! B is packed once into panels of a few vectors of columns. A tile of rows by one panel stays in registers during the
//! loop over the inner dimension. Remaining rows use smaller tiles, whose elements see the same operations in the same
//! order.

use pulp::Simd;

use super::simd::{Kernel, dispatch, outline};

/// Vectors of columns in the widest panel. Of 32 registers, 24 accumulate 8 rows by 3 vectors; of AVX2's 16, 12
/// accumulate 6 rows by 2, which leaves room for a row of B and a value of A.
const fn panel_vectors<S: Simd>() -> usize {
    if has_many_registers::<S>() { 3 } else { 2 }
}

/// Whether a tile of 8 rows by 3 vectors fits the registers.
const fn has_many_registers<S: Simd>() -> bool {
    S::REGISTER_COUNT >= 32
}

/// Block size of the inner dimension, so that a panel's part stays in the first-level cache.
const fn block_k<S: Simd>() -> usize {
    if has_many_registers::<S>() { 224 } else { 320 }
}

/// Rows per block for one block of the inner dimension, so that they stay in the second-level cache. A multiple of every
/// tile's rows.
pub(crate) const BLOCK_M: usize = 192;
/// From so many vectors of columns on, rows of A are copied next to each other before they are multiplied.
const COPY_VECTORS: usize = 16;

/// Floats in a cache line.
const LINE: usize = 16;

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
        dispatch(Pack { k, n, at })
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
    /// The panels; columns that fill up the last vector are zero.
    pub(crate) data: &'a [f32],
}

struct Pack<F> {
    k: usize,
    n: usize,
    at: F,
}

impl<F: Fn(usize, usize) -> f32> Kernel for Pack<F> {
    type Output = Packed;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Packed {
        let Self { k, n, at } = self;
        let vectors = n.div_ceil(S::F32_LANES);
        let len = k * vectors * S::F32_LANES;
        // Aligned loads never straddle two lines.
        let mut data = vec![0.0; len + LINE];
        let start = data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        for (first, width) in panels::<S>(vectors) {
            let (column, width) = (first * S::F32_LANES, width * S::F32_LANES);
            let panel = &mut data[start + column * k..][..width * k];
            for n in column..n.min(column + width) {
                let to = panel[n - column..].iter_mut().step_by(width);
                to.enumerate().for_each(|(k, to)| *to = at(k, n));
            }
        }
        Packed { k, n, data, start }
    }
}

/// First vector and number of vectors of each panel; widths differ by at most one.
#[inline(always)]
pub(crate) fn panels<S: Simd>(vectors: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = vectors.div_ceil(panel_vectors::<S>()).max(1);
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
}

impl Kernel for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { a, rows, segments, segment_len, b, bias, residual, out, stride } = self;
        let vectors = b.n.div_ceil(S::F32_LANES);
        let copies = segments.len() > 1 || vectors >= COPY_VECTORS;
        let mut copy = Vec::new();
        let mut copied = [0; BLOCK_M];
        for m0 in (0..rows.len()).step_by(BLOCK_M) {
            let rows = &rows[m0..rows.len().min(m0 + BLOCK_M)];
            for k0 in (0..b.k).step_by(block_k::<S>()) {
                let len = (b.k - k0).min(block_k::<S>());
                let (a, rows, offset) = if copies {
                    copy_rows(&mut copy, a, rows, &segments[k0 / segment_len..], segment_len, k0 % segment_len, len);
                    copied.iter_mut().enumerate().for_each(|(row, offset)| *offset = row * len);
                    (&copy[..], &copied[..rows.len()], 0)
                } else {
                    (a, rows, k0)
                };
                for (first, width) in panels::<S>(vectors) {
                    let (column, width) = (first * S::F32_LANES, width * S::F32_LANES);
                    let columns = width.min(b.n - column);
                    let start = m0 * stride + column;
                    let block = Block {
                        a,
                        rows,
                        offset,
                        panel: &b.data[column * b.k + k0 * width..][..len * width],
                        columns,
                        bias: bias.map(|bias| &bias[column..][..columns]),
                        adds: k0 > 0,
                        residual: residual.filter(|_| k0 + len == b.k).map(|residual| &residual[start..]),
                        out: &mut out[start..],
                        stride,
                    };
                    block.run(simd, len);
                }
            }
        }
    }
}

/// Appends `len` values of each row next to each other, so that few pages and no two lines of one cache set are read again
/// and again, whatever the distance between rows.
#[inline(always)]
fn copy_rows(
    copy: &mut Vec<f32>,
    a: &[f32],
    rows: &[usize],
    segments: &[usize],
    segment_len: usize,
    within: usize,
    len: usize,
) {
    copy.clear();
    copy.reserve(rows.len() * len);
    for row in rows {
        let (mut within, mut left) = (within, len);
        for segment in segments {
            let part = (segment_len - within).min(left);
            copy.extend_from_slice(&a[row + segment + within..][..part]);
            (within, left) = (0, left - part);
            if left == 0 {
                break;
            }
        }
    }
}

/// Some rows of A times a panel of B, over a part of the inner dimension.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    /// The buffer that holds A's rows.
    pub(crate) a: &'a [f32],
    /// Where each row is, from `offset` on.
    pub(crate) rows: &'a [usize],
    pub(crate) offset: usize,
    /// The panel's part, row by row.
    pub(crate) panel: &'a [f32],
    /// The panel's columns; its last vector may have fewer than a whole one.
    pub(crate) columns: usize,
    /// Added to every row, unless `adds`.
    pub(crate) bias: Option<&'a [f32]>,
    /// Whether the product is added to what `out` holds.
    pub(crate) adds: bool,
    /// Added to the result, laid out like `out`.
    pub(crate) residual: Option<&'a [f32]>,
    /// The result: row `m` is at `m * stride`.
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

impl Block<'_> {
    /// Runs the product of `len` values of each row.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(self, simd: S, len: usize) {
        let vectors = self.columns.div_ceil(S::F32_LANES);
        match (vectors, self.columns == vectors * S::F32_LANES) {
            (1, true) => outline(simd, Panel::<1, true>(self, len)),
            (1, false) => outline(simd, Panel::<1, false>(self, len)),
            (2, true) => outline(simd, Panel::<2, true>(self, len)),
            (2, false) => outline(simd, Panel::<2, false>(self, len)),
            (_, true) => outline(simd, Panel::<3, true>(self, len)),
            (_, false) => outline(simd, Panel::<3, false>(self, len)),
        }
    }
}

/// `NV` vectors of columns; unless `WHOLE`, the last one is partly beyond the last column. Making this a compile-time
/// parameter keeps the sums of whole panels in registers throughout.
struct Panel<'a, const NV: usize, const WHOLE: bool>(Block<'a>, usize);

impl<const NV: usize, const WHOLE: bool> Kernel for Panel<'_, NV, WHOLE> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        all_tiles(simd, &mut self);
    }
}

/// Rows that are worked on in tiles.
pub(crate) trait Tiles {
    /// Works on whole tiles of `MR` rows from row `m` on; returns the first row not done.
    fn tiles<S: Simd, const MR: usize>(&mut self, simd: S, m: usize) -> usize;
}

/// Works on all rows, most of them in the tallest tiles that the registers hold.
#[inline(always)]
pub(crate) fn all_tiles<S: Simd>(simd: S, rows: &mut impl Tiles) {
    let mut m = 0;
    if has_many_registers::<S>() {
        m = rows.tiles::<S, 8>(simd, m);
    } else {
        m = rows.tiles::<S, 6>(simd, m);
    }
    m = rows.tiles::<S, 4>(simd, m);
    m = rows.tiles::<S, 2>(simd, m);
    rows.tiles::<S, 1>(simd, m);
}

impl<const NV: usize, const WHOLE: bool> Tiles for Panel<'_, NV, WHOLE> {
    #[inline(always)]
    fn tiles<S: Simd, const MR: usize>(&mut self, simd: S, mut m: usize) -> usize {
        let Self(block, len) = self;
        let stride = block.stride;
        while let Some(rows) = block.rows[m..].first_chunk::<MR>() {
            let a: [&[f32]; MR] = std::array::from_fn(|r| &block.a[rows[r] + block.offset..][..*len]);
            let out = &mut block.out[m * stride..];
            let mut sums = [[simd.splat_f32s(0.0); NV]; MR];
            if block.adds {
                for (r, sums) in sums.iter_mut().enumerate() {
                    *sums = load::<S, NV, WHOLE>(simd, &out[r * stride..][..block.columns]);
                }
            } else if let Some(bias) = block.bias {
                sums = [load::<S, NV, WHOLE>(simd, bias); MR];
            }
            let sums = multiply(simd, sums, &a, block.panel);
            let residual = block.residual.map(|residual| &residual[m * stride..]);
            if WHOLE {
                finish(simd, sums, residual, out, stride);
            } else {
                finish_partly(simd, &sums, residual, out, stride, block.columns);
            }
            m += MR;
        }
        m
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

/// The inner loop: `sums[r][v] + sum_k a[r][k] * b[k][v]`, k ascending.
///
/// Steps of four values keep what is checked and counted for a step small beside its arithmetic.
#[inline(always)]
pub(crate) fn multiply<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    mut sums: [[S::f32s; NV]; MR],
    a: &[&[f32]; MR],
    b: &[f32],
) -> [[S::f32s; NV]; MR] {
    const STEP: usize = 4;
    let (steps, rest) = S::as_simd_f32s(b).0.as_chunks::<NV>().0.as_chunks::<STEP>();
    let (mut a_steps, mut a_rest) = ([&[[0.0; STEP]; 0][..]; MR], [&[0.0; 0][..]; MR]);
    for r in 0..MR {
        let (steps_of_row, rest_of_row) = a[r].as_chunks::<STEP>();
        (a_steps[r], a_rest[r]) = (&steps_of_row[..steps.len()], &rest_of_row[..rest.len()]);
    }
    for (i, b) in steps.iter().enumerate() {
        for k in 0..STEP {
            for r in 0..MR {
                let a = simd.splat_f32s(a_steps[r][i][k]);
                for v in 0..NV {
                    sums[r][v] = simd.mul_add_f32s(a, b[k][v], sums[r][v]);
                }
            }
        }
    }
    for (k, b) in rest.iter().enumerate() {
        for r in 0..MR {
            let a = simd.splat_f32s(a_rest[r][k]);
            for v in 0..NV {
                sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
            }
        }
    }
    sums
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
