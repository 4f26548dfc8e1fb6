//! 3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, CVPR 2016): 16 multiplications for
//! four outputs, where direct convolution takes 36.
//!
//! Tiles of 4x4 input pixels, two apart, are transformed by `B^T d B`. A matrix product over the channels follows for
//! each of the 16 positions in a tile, with kernels that were transformed once by `G g G^T`. `A^T m A` of the 16
//! results gives 2x2 outputs. B and A contain only 0, 1 and -1, so the only loss of precision comes from a few more
//! additions.

use pulp::Simd;

use super::gemm::{Gemm, Packed};
use super::math::{Kernel, dispatch, outline};

/// Positions in a tile.
const POSITIONS: usize = 16;
/// Tiles per block: enough that reading the kernels costs little compared to multiplying with them.
const TILES: usize = 64;
/// Input and output channels must be multiples of this, the width of the widest vectors.
const CHANNELS: usize = 16;
/// Minimum number of tiles in an image for the transforms to pay off.
const LEAST_TILES: usize = 64;

/// Transformed kernels.
#[derive(Debug)]
pub(crate) struct Winograd {
    inputs: usize,
    outputs: usize,
    /// `[Cin, Cout]` for every position.
    kernels: Vec<Packed>,
}

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

/// Transformed inputs and products of a strip, reused from strip to strip.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    inputs: Vec<f32>,
    products: Vec<f32>,
    rows: Vec<usize>,
}

impl Winograd {
    /// Transforms the kernels of a convolution that is packed as a product over `(y, x, channel)`.
    pub(crate) fn new(inputs: usize, outputs: usize, packed: &Packed) -> Self {
        let mut transformed = vec![0.0; POSITIONS * outputs * inputs];
        for n in 0..outputs {
            let kernel: Vec<f32> = packed.column(n).collect();
            for c in 0..inputs {
                let g = std::array::from_fn(|y| std::array::from_fn(|x| f64::from(kernel[(3 * y + x) * inputs + c])));
                for (position, value) in of_kernel(g).into_iter().enumerate() {
                    transformed[(position * outputs + n) * inputs + c] = value as f32;
                }
            }
        }
        let of_position = |position: &[f32]| Packed::new(inputs, outputs, |c, n| position[n * inputs + c]);
        Self { inputs, outputs, kernels: transformed.chunks_exact(outputs * inputs).map(of_position).collect() }
    }

    /// Output rows per strip.
    pub(crate) fn strip(width: usize, height: usize) -> usize {
        (2 * TILES.div_ceil(width / 2)).min(height)
    }

    /// Convolves a strip.
    pub(crate) fn run(&self, strip: Strip<'_>, scratch: &mut Scratch) {
        let tiles = strip.rows / 2 * (strip.width / 2);
        scratch.inputs.resize(POSITIONS * tiles * self.inputs, 0.0);
        scratch.products.resize(POSITIONS * tiles * self.outputs, 0.0);
        scratch.rows.clear();
        scratch.rows.extend((0..tiles).map(|tile| tile * self.inputs));
        dispatch(Convolve { winograd: self, strip, scratch, tiles });
    }
}

struct Convolve<'a> {
    winograd: &'a Winograd,
    strip: Strip<'a>,
    scratch: &'a mut Scratch,
    tiles: usize,
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { winograd, strip, scratch, tiles } = self;
        let (inputs, outputs) = (winograd.inputs, winograd.outputs);
        outline(simd, ToTiles { strip: &strip, channels: inputs, out: &mut scratch.inputs });
        for (position, kernel) in winograd.kernels.iter().enumerate() {
            Gemm {
                a: &scratch.inputs[position * tiles * inputs..][..tiles * inputs],
                rows: &scratch.rows,
                segments: &[0],
                segment_len: inputs,
                b: kernel.view(),
                bias: None,
                residual: None,
                out: &mut scratch.products[position * tiles * outputs..][..tiles * outputs],
                stride: outputs,
            }
            .run_within(simd);
        }
        outline(simd, FromTiles { strip, channels: outputs, products: &scratch.products });
    }
}

/// `B^T d B` of every tile and channel, position by position.
struct ToTiles<'a, 's> {
    strip: &'a Strip<'s>,
    channels: usize,
    /// `[16, tiles, Cin]`.
    out: &'a mut [f32],
}

impl Kernel for ToTiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { strip, channels, out } = self;
        let (lanes, across) = (S::F32_LANES, strip.width / 2);
        let (tiles, row) = (strip.rows / 2 * across, (strip.width + 2) * channels);
        let mut planes = out.chunks_exact_mut(tiles * channels);
        let planes: [&mut [f32]; POSITIONS] = std::array::from_fn(|_| planes.next().unwrap_or_default());
        for tile in 0..tiles {
            let corner = 2 * (tile / across) * row + 2 * (tile % across) * channels;
            for c in (0..channels).step_by(lanes) {
                let at = |y: usize, x: usize| {
                    let from = &strip.padded[corner + y * row + x * channels + c..][..lanes];
                    S::as_simd_f32s(from).0[0]
                };
                // The columns of B^T d, then its rows times B.
                let columns: [_; 4] = [0, 1, 2, 3].map(|x| input(simd, [at(0, x), at(1, x), at(2, x), at(3, x)]));
                for y in 0..4 {
                    for (x, value) in input(simd, columns.map(|column| column[y])).into_iter().enumerate() {
                        let to = &mut planes[4 * y + x][tile * channels + c..][..lanes];
                        S::as_mut_simd_f32s(to).0[0] = value;
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
        for tile in 0..tiles {
            let corner = 2 * (tile / across) * row + 2 * (tile % across) * channels;
            for c in (0..channels).step_by(lanes) {
                let at = |position: usize| {
                    let from = &products[(position * tiles + tile) * channels + c..][..lanes];
                    S::as_simd_f32s(from).0[0]
                };
                let columns = [0, 1, 2, 3].map(|x| output(simd, [at(x), at(4 + x), at(8 + x), at(12 + x)]));
                let bias = S::as_simd_f32s(&strip.bias[c..][..lanes]).0[0];
                for y in 0..2 {
                    for (x, value) in output(simd, columns.map(|column| column[y])).into_iter().enumerate() {
                        let place = corner + y * row + x * channels + c;
                        let mut value = simd.add_f32s(value, bias);
                        if let Some(residual) = strip.residual {
                            let residual = S::as_simd_f32s(&residual[place..][..lanes]).0[0];
                            value = simd.add_f32s(value, residual);
                        }
                        S::as_mut_simd_f32s(&mut strip.out[place..][..lanes]).0[0] = value;
                    }
                }
            }
        }
    }
}

/// `G g G^T`, row by row.
fn of_kernel(g: [[f64; 3]; 3]) -> [f64; POSITIONS] {
    let column = |[a, b, c]: [f64; 3]| [a, (a + b + c) / 2.0, (a - b + c) / 2.0, c];
    let rows: [[f64; 4]; 3] = g.map(column);
    let of_column: [[f64; 4]; 4] = std::array::from_fn(|x| column(rows.map(|row| row[x])));
    std::array::from_fn(|position| of_column[position % 4][position / 4])
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
