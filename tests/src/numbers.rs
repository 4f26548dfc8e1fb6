//! Comparing tensors with references.

use candle_core::{DType, Device, Tensor};

/// A tensor stored `[.., C, H, W]`, as `[.., H, W, C]`.
pub fn channels_last(tensor: &Tensor) -> Tensor {
    let rank = tensor.rank();
    let mut order: Vec<usize> = (0..rank).collect();
    order[rank - 3..].rotate_left(1);
    tensor.permute(order).and_then(|t| t.contiguous()).expect("an image")
}

/// The values in double precision.
pub fn flat(tensor: &Tensor) -> Vec<f64> {
    let wide = tensor.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.flatten_all());
    wide.and_then(|t| t.to_vec1()).expect("numbers")
}

/// The bits of every f32.
pub fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32 numbers");
    values.into_iter().map(f32::to_bits).collect()
}

/// The largest difference, relative to the largest magnitude expected.
pub fn difference(name: &str, found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let (found, expected) = (flat(found), flat(expected));
    let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    found.iter().zip(&expected).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / scale
}

/// Asserts that the largest difference is at most `tolerance` times the largest magnitude.
pub fn assert_close(name: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let difference = difference(name, found, expected);
    println!("{name}: {difference:.2e}");
    assert!(difference <= tolerance, "{name}: {difference}");
}
