//! The arithmetic that a core can do.

use std::hint::black_box;
use std::time::Instant;

use pulp::Simd;

use super::simd::{Kernel, dispatch};

/// Steps of one measurement: some milliseconds.
const STEPS: usize = 1 << 20;
/// Measurements.
const REPEATS: usize = 8;
/// Sums that don't wait for each other: more than a multiply-add's latency times the number at a time.
const SUMS: usize = 12;

/// Floating point operations per second of fused multiply-adds in registers on the calling thread, with the instruction
/// set in use: no product can be faster. The best of several measurements.
pub fn flops_per_second() -> f64 {
    let measure = || {
        let started = Instant::now();
        let flops = dispatch(MultiplyAdds);
        flops / started.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(|_| measure()).fold(0.0, f64::max)
}

struct MultiplyAdds;

impl Kernel for MultiplyAdds {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let (factor, term) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(0.001)));
        let mut sums: [_; SUMS] = std::array::from_fn(|i| simd.splat_f32s(i as f32));
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, factor, term);
            }
        }
        black_box(sums);
        (2 * STEPS * SUMS * S::F32_LANES) as f64
    }
}
