//! 3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, CVPR 2016): 16 multiplications for
//! four outputs, where direct convolution takes 36.
//!
//! Tiles of 4x4 input pixels, two apart, are transformed by `B^T d B`. A matrix product over the channels follows for
//! each of the 16 positions in a tile, with kernels transformed by `G g G^T`. `A^T m A` of the 16 results gives 2x2
//! outputs. B and A contain only 0, 1 and -1 and G only halves besides, so the only loss of precision comes from a few
//! more additions.
//!
//! Transformed kernels would take 16/9 of the memory of the weights. They are made block by block as they are used, which
//! costs little beside the products of all tiles of a strip, and reads less memory.

#![expect(
    clippy::needless_range_loop,
    reason = "a closure would be compiled as a function without the vector instructions"
)]

use pulp::Simd;

use super::gemm::{Block, PackedView, panels};
use super::simd::{Kernel, dispatch, outline};

/// Positions in a tile.
const POSITIONS: usize = 16;
/// Pixels of a kernel.
const TAPS: usize = 9;
/// Tiles per strip: enough that transforming the kernels costs little compared to multiplying with them.
const TILES: usize = 64;
/// Input channels per block: its transformed inputs stay in the second-level cache.
const BLOCK_CHANNELS: usize = 64;
/// Input and output channels must be multiples of this, the width of the widest vectors.
const CHANNELS: usize = 16;
/// Minimum number of tiles in an image for the transforms to pay off.
const LEAST_TILES: usize = 64;

/// Whether to use this method for outputs of this size.
pub(crate) fn suits(inputs: usize, outputs: usize, height: usize, width: usize) -> bool {
    inputs.is_multiple_of(CHANNELS)
        && outputs.is_multiple_of(CHANNELS)
        && height.is_multiple_of(2)
        && width.is_multiple_of(2)
        && height * width / 4 >= LEAST_TILES
}

/// A strip of an image: some of its output rows.
pub(crate) struct Strip<'a> {
    /// The padded input for the outputs, `[rows + 2, width + 2, Cin]`.
    pub(crate) padded: &'a [f32],
    /// Output rows and columns; both even.
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Added to every output, `[Cout]`.
    pub(crate) bias: &'a [f32],
    /// Added to the outputs, laid out like them.
    pub(crate) residual: Option<&'a [f32]>,
    /// `[rows, width, Cout]`.
    pub(crate) out: &'a mut [f32],
}

/// Transformed kernels, inputs and products of a strip, reused from strip to strip.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    kernels: Vec<f32>,
    inputs: Vec<f32>,
    products: Vec<f32>,
}

/// Output rows per strip.
pub(crate) fn strip(width: usize, height: usize) -> usize {
    (2 * TILES.div_ceil(width / 2)).min(height)
}

/// A strip's convolution.
pub(crate) struct Convolve<'a> {
    /// The kernels of all inputs and outputs, packed as a product over `(y, x, channel)`.
    pub(crate) kernels: PackedView<'a>,
    pub(crate) strip: Strip<'a>,
    pub(crate) scratch: &'a mut Scratch,
}

impl Convolve<'_> {
    /// Convolves the strip.
    pub(crate) fn run(self) {
        dispatch(self);
    }
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { kernels, strip, scratch: Scratch { kernels: transformed, inputs, products } } = self;
        let (channels, outputs) = (kernels.k / TAPS, kernels.n);
        let tiles = strip.rows / 2 * (strip.width / 2);
        products.resize(POSITIONS * tiles * outputs, 0.0);
        for first in (0..channels).step_by(BLOCK_CHANNELS) {
            let len = BLOCK_CHANNELS.min(channels - first);
            inputs.resize(POSITIONS * tiles * len, 0.0);
            let rows: Vec<usize> = (0..tiles).map(|tile| tile * len).collect();
            outline(simd, ToTiles { strip: &strip, channels, first, len, out: inputs });
            for (column, width) in panels::<S>(outputs / S::F32_LANES) {
                let (column, width) = (column * S::F32_LANES, width * S::F32_LANES);
                transformed.resize(POSITIONS * len * width, 0.0);
                let panel = &kernels.data[column * kernels.k..][..kernels.k * width];
                outline(simd, OfKernels { panel, channels, first, len, out: transformed });
                for position in 0..POSITIONS {
                    let block = Block {
                        a: &inputs[position * tiles * len..][..tiles * len],
                        rows: &rows,
                        offset: 0,
                        panel: &transformed[position * len * width..][..len * width],
                        columns: width,
                        bias: None,
                        adds: first > 0,
                        residual: None,
                        out: &mut products[position * tiles * outputs + column..],
                        stride: outputs,
                    };
                    block.run(simd, len);
                }
            }
        }
        outline(simd, FromTiles { strip, channels: outputs, products });
    }
}

/// `G g G^T` of some input channels and a panel of output channels, position by position.
struct OfKernels<'a> {
    /// `[9, channels]` rows of the panel.
    panel: &'a [f32],
    channels: usize,
    /// The first input channel and how many.
    first: usize,
    len: usize,
    /// `[16, len]` rows of the panel.
    out: &'a mut [f32],
}

impl Kernel for OfKernels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { panel, channels, first, len, out } = self;
        let width = panel.len() / (TAPS * channels);
        let rows = len * width;
        let taps: [&[S::f32s]; TAPS] =
            std::array::from_fn(|tap| S::as_simd_f32s(&panel[(tap * channels + first) * width..][..rows]).0);
        let mut planes = out.chunks_exact_mut(rows);
        let planes: [&mut [S::f32s]; POSITIONS] =
            std::array::from_fn(|_| S::as_mut_simd_f32s(planes.next().unwrap_or_default()).0);
        let zero = simd.splat_f32s(0.0);
        for i in 0..rows / S::F32_LANES {
            // The columns of G g, then its rows times G^T.
            let mut columns = [[zero; 4]; 3];
            for x in 0..3 {
                columns[x] = of_kernel(simd, [taps[x][i], taps[3 + x][i], taps[6 + x][i]]);
            }
            for y in 0..4 {
                let row = of_kernel(simd, [columns[0][y], columns[1][y], columns[2][y]]);
                for x in 0..4 {
                    planes[4 * y + x][i] = row[x];
                }
            }
        }
    }
}

/// `B^T d B` of every tile and of some channels, position by position.
struct ToTiles<'a, 's> {
    strip: &'a Strip<'s>,
    channels: usize,
    /// The first channel and how many.
    first: usize,
    len: usize,
    /// `[16, tiles, len]`.
    out: &'a mut [f32],
}

impl Kernel for ToTiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { strip, channels, first, len, out } = self;
        let (lanes, across) = (S::F32_LANES, strip.width / 2);
        let (tiles, row) = (strip.rows / 2 * across, (strip.width + 2) * channels);
        let mut planes = out.chunks_exact_mut(tiles * len);
        let planes: [&mut [f32]; POSITIONS] = std::array::from_fn(|_| planes.next().unwrap_or_default());
        let zero = simd.splat_f32s(0.0);
        for tile in 0..tiles {
            let corner = 2 * (tile / across) * row + 2 * (tile % across) * channels + first;
            for c in (0..len).step_by(lanes) {
                // The columns of B^T d, then its rows times B.
                let mut columns = [[zero; 4]; 4];
                for x in 0..4 {
                    let mut pixels = [zero; 4];
                    for y in 0..4 {
                        pixels[y] = vector::<S>(strip.padded, corner + y * row + x * channels + c);
                    }
                    columns[x] = input(simd, pixels);
                }
                for y in 0..4 {
                    let values = input(simd, [columns[0][y], columns[1][y], columns[2][y], columns[3][y]]);
                    for x in 0..4 {
                        let to = &mut planes[4 * y + x][tile * len + c..][..lanes];
                        S::as_mut_simd_f32s(to).0[0] = values[x];
                    }
                }
            }
        }
    }
}

/// `A^T m A` of every tile and channel, with bias and residual.
struct FromTiles<'a> {
    strip: Strip<'a>,
    channels: usize,
    /// `[16, tiles, Cout]`.
    products: &'a [f32],
}

impl Kernel for FromTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { strip, channels, products } = self;
        let (lanes, across) = (S::F32_LANES, strip.width / 2);
        let (tiles, row) = (strip.rows / 2 * across, strip.width * channels);
        let zero = simd.splat_f32s(0.0);
        for tile in 0..tiles {
            let corner = 2 * (tile / across) * row + 2 * (tile % across) * channels;
            for c in (0..channels).step_by(lanes) {
                let mut columns = [[zero; 2]; 4];
                for x in 0..4 {
                    let mut sums = [zero; 4];
                    for y in 0..4 {
                        sums[y] = vector::<S>(products, ((4 * y + x) * tiles + tile) * channels + c);
                    }
                    columns[x] = output(simd, sums);
                }
                let bias = vector::<S>(strip.bias, c);
                for y in 0..2 {
                    let values = output(simd, [columns[0][y], columns[1][y], columns[2][y], columns[3][y]]);
                    for x in 0..2 {
                        let place = corner + y * row + x * channels + c;
                        let mut value = simd.add_f32s(values[x], bias);
                        if let Some(residual) = strip.residual {
                            value = simd.add_f32s(value, vector::<S>(residual, place));
                        }
                        S::as_mut_simd_f32s(&mut strip.out[place..][..lanes]).0[0] = value;
                    }
                }
            }
        }
    }
}

/// The vector that begins at `index`.
#[inline(always)]
fn vector<S: Simd>(values: &[f32], index: usize) -> S::f32s {
    S::as_simd_f32s(&values[index..][..S::F32_LANES]).0[0]
}

/// `G g` of a column.
#[inline(always)]
fn of_kernel<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; 4] {
    let half = simd.splat_f32s(0.5);
    let outer = simd.add_f32s(g[0], g[2]);
    let [sum, difference] = [simd.add_f32s(outer, g[1]), simd.sub_f32s(outer, g[1])];
    [g[0], simd.mul_f32s(sum, half), simd.mul_f32s(difference, half), g[2]]
}

/// `B^T d` of a column.
#[inline(always)]
fn input<S: Simd>(simd: S, d: [S::f32s; 4]) -> [S::f32s; 4] {
    [simd.sub_f32s(d[0], d[2]), simd.add_f32s(d[1], d[2]), simd.sub_f32s(d[2], d[1]), simd.sub_f32s(d[1], d[3])]
}

/// `A^T m` of a column.
#[inline(always)]
fn output<S: Simd>(simd: S, m: [S::f32s; 4]) -> [S::f32s; 2] {
    let (sum, difference) = (simd.add_f32s(m[1], m[2]), simd.sub_f32s(m[1], m[2]));
    [simd.add_f32s(m[0], sum), simd.sub_f32s(difference, m[3])]
}
