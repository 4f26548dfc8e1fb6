//! Draws weights from a seed, for a network with only a configuration.
//!
//! A network's speed does not depend on its weights' values as long as activations are ordinary numbers. So weights of
//! products have variance 1 / fan-in, and norms scale by about one.

use candle_core::{Device, Tensor};

use super::error::ModelError;

/// The weight called `key`, in f32 on the CPU.
pub(super) fn drawn(seed: u64, key: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
    let fan_in: usize = shape.iter().skip(1).product();
    let (middle, spread) = match shape.len() {
        // Standard deviation of a uniform variable on [-a, a] is a / sqrt(3).
        2.. => (0.0, (3.0 / fan_in.max(1) as f32).sqrt()),
        _ if key.ends_with("weight") => (1.0, 0.1),
        _ => (0.0, 0.1),
    };
    let mut state = key.bytes().fold(seed, |hash, byte| mix(hash ^ u64::from(byte)));
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            // An f32's 24 bits of precision, as a number in [-1, 1).
            let unit = (mix(state) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            spread.mul_add(unit, middle)
        })
        .collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_keep_the_scale_and_every_name_has_its_own_weights() {
        let weight = drawn(1, "conv.weight", &[64, 32, 3, 3]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mean = weight.iter().sum::<f32>() / weight.len() as f32;
        let variance = weight.iter().map(|w| w * w).sum::<f32>() / weight.len() as f32;
        assert!(mean.abs() < 2e-3, "{mean}");
        assert!((variance * 288.0 - 1.0).abs() < 0.05, "{variance}");
        let other = drawn(1, "other.weight", &[64, 32, 3, 3]).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_ne!(weight, other);
        let norm = drawn(1, "norm.weight", &[8]).unwrap().to_vec1::<f32>().unwrap();
        assert!(norm.iter().all(|w| (0.9..=1.1).contains(w)), "{norm:?}");
    }
}
