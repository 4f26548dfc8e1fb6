//! Branch-free elementary functions that vectorise when inlined into a SIMD kernel.
//!
//! They work on scalars with explicit fused multiply-adds, so every register width (and a loop's remainder) gives the
//! same bits. libm's functions are calls, which would keep the loops around them from vectorising.

use pulp::Simd;

/// 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// e^x with a relative error below 2e-7 on [-87, 88]; inputs outside are clamped, NaN stays NaN.
///
/// Cody and Waite's reduction by multiples of ln 2 in two parts, then Cephes' expf polynomial.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    y * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// 2^x with a relative error below 2e-7 for x from -126 to 0; smaller x count as -126, NaN stays NaN.
///
/// 2^n from the exponent bits, times a minimax polynomial for the rest in [-1/2, 1/2].
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    use std::f32::consts::LN_2;
    const POLYNOMIAL: [f32; 6] = [1.330_060_5e-3, 9.669_691e-3, 5.550_558_5e-2, 0.240_222_83, LN_2, 1.0];
    let least = simd.splat_f32s(-126.0);
    let x = simd.select_f32s(simd.less_than_f32s(x, least), least, x);
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let rest = simd.sub_f32s(x, simd.sub_f32s(shifted, simd.splat_f32s(ROUND)));
    let mut power = simd.splat_f32s(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        power = simd.mul_add_f32s(power, rest, simd.splat_f32s(*c));
    }
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(power), exponent))
}

/// x * sigmoid(x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// x * sigmoid(1.702 x), CLIP's original approximation of GELU.
#[inline(always)]
pub(crate) fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// x * Phi(x) with the exact normal distribution function (torch's default GELU).
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// GELU's tanh approximation (Hendrycks & Gimpel, 2016), which is `x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 1.595_769;
    x / (1.0 + exp(-TWICE_ROOT * x * (x * x).mul_add(0.044_715, 1.0)))
}

/// The error function, absolute error below 5e-7: the odd rational minimax approximation on [-4, 4] used by XLA and Eigen.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = if x < -4.0 { -4.0 } else { x };
    let x = if x > 4.0 { 4.0 } else { x };
    let s = x * x;
    let mut a = -2.726_142_3e-10f32;
    a = a.mul_add(s, 2.770_681_4e-8);
    a = a.mul_add(s, -2.101_024e-6);
    a = a.mul_add(s, -5.692_506_5e-5);
    a = a.mul_add(s, -7.349_906e-4);
    a = a.mul_add(s, -2.954_6e-3);
    a = a.mul_add(s, -1.609_603_3e-2);
    let mut b = -1.456_607_2e-5f32;
    b = b.mul_add(s, -2.133_740_6e-4);
    b = b.mul_add(s, -1.682_827e-3);
    b = b.mul_add(s, -7.373_329e-3);
    b = b.mul_add(s, -1.426_473_9e-2);
    x * a / b
}

/// Sum of a slice in sixteen partial sums, in the same order on every machine.
#[inline(always)]
pub(crate) fn sum(values: &[f32], map: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += map(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += map(v);
    }
    fold(lanes, |a, b| a + b)
}

/// Reduces sixteen lanes pairwise; the compiler turns the fixed loops into shuffles.
#[inline(always)]
pub(crate) fn fold(lanes: [f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = f(lanes[i], lanes[i + 8]);
    }
    for i in 0..4 {
        four[i] = f(eight[i], eight[i + 4]);
    }
    f(f(four[0], four[2]), f(four[1], four[3]))
}
