//! Compares every kernel with plain candle operations in double precision on the CPU, and checks that results are
//! bit-identical across batches.
//!
//! The tests use the CPU's kernels, or those of the device in `ELBO_TEST_DEVICE` (`cuda:0`) with the type in
//! `ELBO_TEST_DTYPE` (f32, f16 or bf16).

use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor};
use pulp::Simd;

use super::*;

/// Where the kernels run.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || match std::env::var("ELBO_TEST_DEVICE").ok().as_deref() {
        None | Some("cpu") => Device::Cpu,
        Some(name) => gpu::open(name.strip_prefix("cuda:").unwrap().parse().unwrap()).unwrap(),
    };
    DEVICE.get_or_init(open).clone()
}

/// The type they compute in, and its distance from 1 to the next number.
fn dtype() -> (DType, f64) {
    match std::env::var("ELBO_TEST_DTYPE").ok().as_deref() {
        Some("f16") => (DType::F16, 2f64.powi(-10)),
        Some("bf16") => (DType::BF16, 2f64.powi(-7)),
        _ => (DType::F32, 2f64.powi(-23)),
    }
}

/// Values roughly in [-2, 2], different for every seed.
fn random(shape: impl Into<candle_core::Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let values: Vec<f32> = (0..shape.elem_count())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0
        })
        .collect();
    placed(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
}

/// The tensor on the kernels' device, in their type.
fn placed(t: &Tensor) -> Tensor {
    t.to_dtype(dtype().0).unwrap().to_device(&device()).unwrap()
}

/// Asserts equality up to `tolerance` times the largest magnitude, or a few roundings of the type.
fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (&wide(found), &wide(expected));
    let largest =
        |t: &Tensor| -> Result<f64> { t.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>() };
    let difference = largest(&(found - expected).unwrap()).unwrap();
    let scale = largest(expected).unwrap();
    let tolerance = tolerance.max(3.0 * dtype().1);
    assert!(difference <= tolerance * scale, "{difference} against a scale of {scale}");
}

/// The tensor in double precision on the CPU, where operations use plain candle: the reference for the kernels'
/// rounding.
fn wide(t: &Tensor) -> Tensor {
    host(t).to_dtype(DType::F64).unwrap()
}

fn host(t: &Tensor) -> Tensor {
    t.to_device(&Device::Cpu).unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    let values = host(t).to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

fn exp2(x: &[f32]) -> Vec<f32> {
    struct Powers<'a>(&'a [f32]);
    impl simd::Kernel for Powers<'_> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut powers = self.0.to_vec();
            for values in powers.chunks_mut(S::F32_LANES) {
                let power = math::exp2(simd, simd.partial_load_f32s(values));
                simd.partial_store_f32s(values, power);
            }
            powers
        }
    }
    simd::dispatch(Powers(x))
}

#[test]
fn elementary_functions_are_accurate() {
    for i in -8700..=8800 {
        let x = i as f32 / 100.0;
        let expected = f64::from(x).exp();
        assert!((f64::from(math::exp(x)) / expected - 1.0).abs() < 2e-7, "exp({x})");
    }
    let powers: Vec<f32> = (0..=126_000).map(|i| i as f32 / -1000.0).collect();
    for (&x, power) in powers.iter().zip(exp2(&powers)) {
        assert!((f64::from(power) / f64::from(x).exp2() - 1.0).abs() < 2e-7, "2^{x}: {power}");
    }
    assert_eq!(exp2(&[0.0, -1.0, -126.0]), [1.0, 0.5, f32::MIN_POSITIVE]);
    assert!(exp2(&[f32::NEG_INFINITY])[0] <= f32::MIN_POSITIVE && exp2(&[f32::NAN])[0].is_nan());
    let gaussian = |x: f64| (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI;
    let (mut integral, steps) = (0.0, 2000);
    for i in 0..5 * steps {
        let (a, h) = (f64::from(i) / f64::from(steps), 1.0 / f64::from(steps));
        integral += h / 6.0 * (gaussian(a) + 4.0 * gaussian(a + h / 2.0) + gaussian(a + h));
        let x = (a + h) as f32;
        assert!((f64::from(math::erf(x)) - integral).abs() < 5e-7, "erf({x})");
        assert_eq!(math::erf(-x), -math::erf(x));
    }
}

#[test]
fn linear_matches_plain() {
    for (seed, (rows, inputs, outputs)) in
        [(1, 1, 1), (7, 32, 96), (13, 48, 48), (64, 33, 50), (200, 1200, 17), (9, 5, 129)].into_iter().enumerate()
    {
        let seed = 10 * seed as u64;
        let (x, w) = (random((3, rows, inputs), seed), random((outputs, inputs), seed + 1));
        let (b, r) = (random(outputs, seed + 2), random((2, rows, outputs), seed + 3));
        let layer = Linear::new(&w, Some(&b)).unwrap();
        let index = [1, 0, 1];
        let plain = Linear::new(&wide(&w), Some(&wide(&b))).unwrap();
        let bare = layer.forward(&x, None).unwrap();
        assert_close(&bare, &plain.forward(&wide(&x), None).unwrap(), 2e-6);
        let found = layer.forward(&x, Some(Rows::indexed(&r, &index))).unwrap();
        let expected = plain.forward(&wide(&x), Some(Rows::indexed(&wide(&r), &index))).unwrap();
        assert_close(&found, &expected, 2e-6);
    }
}

#[test]
fn convolution_matches_plain() {
    let cases = [
        (8, 8, 32, 32, 1, Padding::Around),
        (5, 7, 3, 18, 1, Padding::Around),
        (8, 6, 8, 48, 2, Padding::Around),
        (9, 8, 12, 5, 2, Padding::After),
        (70, 65, 40, 4, 1, Padding::Around),
        (66, 64, 48, 8, 2, Padding::After),
        // Large enough for Winograd's tiles: whole strips and a remainder.
        (16, 16, 32, 48, 1, Padding::Around),
        (18, 40, 16, 80, 1, Padding::Around),
        (70, 64, 48, 16, 1, Padding::Around),
    ];
    for (seed, (h, w, inputs, outputs, stride, padding)) in cases.into_iter().enumerate() {
        let seed = 10 * seed as u64;
        let (x, k) = (random((3, h, w, inputs), seed), random((outputs, inputs, 3, 3), seed + 1));
        let bias = random(outputs, seed + 2);
        let conv = Conv2d::new(&k, Some(&bias), stride, padding).unwrap();
        let plain = Conv2d::new(&wide(&k), Some(&wide(&bias)), stride, padding).unwrap();
        let bare = conv.forward(&x, Fused::default()).unwrap();
        assert_close(&bare, &plain.forward(&wide(&x), Fused::default()).unwrap(), 2e-6);

        let fused = |cast: fn(&Tensor) -> Tensor| {
            let (w, b) = (cast(&random(inputs, seed + 3)), cast(&random(inputs, seed + 4)));
            let norm = GroupNorm::new(1, 1e-5, &w, &b).unwrap();
            let (shift, residual) = (random((2, outputs), seed + 5), random(bare.dims(), seed + 6));
            let (shift, residual) = (cast(&shift), cast(&residual));
            let fused = Fused {
                norm: Some(&norm),
                shift: Some(Rows::indexed(&shift, &[1, 1, 0])),
                residual: Some(Rows::indexed(&residual, &[2, 0, 1])),
            };
            let conv = if cast(&x).dtype() == DType::F64 { &plain } else { &conv };
            conv.forward(&cast(&x), fused).unwrap()
        };
        assert_close(&fused(Tensor::clone), &fused(wide), 2e-6);
    }
}

#[test]
fn norms_match_plain() {
    for (seed, (pixels, channels, groups)) in
        [(64, 32, 8), (1, 8, 2), (131, 48, 4), (300, 18, 3)].into_iter().enumerate()
    {
        let seed = 10 * seed as u64;
        let x = placed(&(host(&random((2, pixels, channels), seed)) + 3.0).unwrap());
        let (w, b) = (random(channels, seed + 1), random(channels, seed + 2));
        let norm = GroupNorm::new(groups, 1e-5, &w, &b).unwrap();
        let plain = GroupNorm::new(groups, 1e-5, &wide(&w), &wide(&b)).unwrap();
        for activate in [false, true] {
            let expected = plain.forward(&wide(&x), activate).unwrap();
            assert_close(&norm.forward(&x, activate).unwrap(), &expected, 2e-6);
        }
        let norm = LayerNorm::new(1e-5, &w, &b).unwrap();
        let plain = LayerNorm::new(1e-5, &wide(&w), &wide(&b)).unwrap();
        assert_close(&norm.forward(&x).unwrap(), &plain.forward(&wide(&x)).unwrap(), 2e-6);
    }
}

#[test]
fn group_norm_splits_only_between_groups() {
    let norm = GroupNorm::new(4, 1e-5, &random(32, 1), &random(32, 2)).unwrap();
    assert!(norm.split(12).unwrap().is_none());
    let (left, right) = norm.split(8).unwrap().unwrap();
    let x = random((2, 9, 32), 3);
    let part = |start, len| x.narrow(2, start, len).unwrap();
    let halves = [left.forward(&part(0, 8), false).unwrap(), right.forward(&part(8, 24), false).unwrap()];
    assert_close(&Tensor::cat(&halves, 2).unwrap(), &norm.forward(&x, false).unwrap(), 1e-6);
}

#[test]
fn activations_match_plain() {
    let x = placed(&(host(&random((5, 77, 26), 1)) * 5.0).unwrap());
    for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::GeluTanh] {
        assert_close(&activate(&x, activation).unwrap(), &activate(&wide(&x), activation).unwrap(), 5e-7);
    }
    assert_close(&geglu(&x).unwrap(), &geglu(&wide(&x)).unwrap(), 5e-7);
}

#[test]
fn attention_matches_plain() {
    for (seed, (heads, dim, queries, keys)) in [
        (4, 8, 64, 77),
        (4, 12, 16, 77),
        (2, 40, 33, 5),
        (1, 64, 7, 77),
        (2, 80, 9, 16),
        (1, 160, 5, 31),
        (3, 5, 90, 100),
        (1, 40, 50, 400),
        (2, 8, 300, 129),
    ]
    .into_iter()
    .enumerate()
    {
        let (seed, channels) = (10 * seed as u64, heads * dim);
        let q = random((3, queries, channels), seed);
        let (k, v) = (random((2, keys, channels), seed + 1), random((2, keys, channels), seed + 2));
        let cache = KeyValues::new(&k, &v, heads).unwrap();
        let found = cross_attention(&q, &cache, &[(0, 1), (0, 0), (2, 1), (1, 1)]).unwrap();
        let pick = |x: &Tensor, i: &[u32]| gather(x, i).unwrap();
        let (pq, ps) = ([0, 0, 2, 1], [1, 0, 1, 1]);
        let expected = {
            let (q, k, v) = (pick(&wide(&q), &pq), pick(&wide(&k), &ps), pick(&wide(&v), &ps));
            attention::plain(&q, &k, &v, heads, false)
        };
        assert_close(&found, &expected.unwrap(), 2e-6);

        let qkv = random((2, queries, 3 * channels), seed + 3);
        for causal in [false, true] {
            let found = self_attention(&qkv, heads, causal).unwrap();
            assert_close(&found, &self_attention(&wide(&qkv), heads, causal).unwrap(), 2e-6);
        }
    }
}

#[test]
fn feed_forward_matches_its_steps() {
    for (seed, (positions, channels, inner)) in [(64, 32, 128), (3, 7, 5), (100, 48, 33)].into_iter().enumerate() {
        let (seed, x) = (10 * seed as u64, random((2, positions, channels), seed as u64));
        let weights = [(2 * inner, channels), (channels, inner)];
        let layers = |cast: fn(&Tensor) -> Tensor| {
            let at = |shape: (usize, usize), s| Linear::new(&cast(&random(shape, seed + s)), None).unwrap();
            let (w, b) = (cast(&random(channels, seed + 3)), cast(&random(channels, seed + 4)));
            FeedForward::new(LayerNorm::new(1e-5, &w, &b).unwrap(), at(weights[0], 1), at(weights[1], 2))
        };
        let fused = layers(Tensor::clone);
        assert_eq!(bits(&fused.forward(&x).unwrap()), bits(&fused.plain(&x).unwrap()));
        assert_close(&fused.forward(&x).unwrap(), &layers(wide).forward(&wide(&x)).unwrap(), 2e-6);
    }
}

#[test]
fn adaptive_norms_and_gates_match_plain() {
    let (x, h, rows) = (random((3, 17, 24), 1), random((3, 17, 24), 2), random((3, 4 * 24), 3));
    let both = |f: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor| {
        assert_close(&f(&x, &h, &rows), &f(&wide(&x), &wide(&h), &wide(&rows)), 2e-6);
    };
    both(&|x, _, rows| Modulation::new(rows, 24).normalise(x, 1e-6, 3, 1).unwrap());
    both(&|x, h, rows| Modulation::new(rows, 24).gate(x, h, 2).unwrap());
    assert!(Modulation::new(&rows, 24).gate(&x, &h, 4).is_err());

    let (qkv, q, k) = (random((2, 9, 3 * 24), 4), random(8, 5), random(8, 6));
    let found = QueryKeyNorm::new(1e-6, &q, &k).forward(&qkv).unwrap();
    assert_close(&found, &QueryKeyNorm::new(1e-6, &wide(&q), &wide(&k)).forward(&wide(&qkv)).unwrap(), 2e-6);
}

#[test]
fn copies_match_plain() {
    let (x, y) = (random((3, 4, 5, 6), 1), random((2, 4, 5, 3), 2));
    assert_eq!(bits(&upsample_nearest2x(&x).unwrap()), bits(&shape::plain_upsample(&host(&x)).unwrap()));
    let (index, y_host) = ([1, 0, 1], host(&y));
    let joined = shape::plain_concat(&host(&x), Rows::indexed(&y_host, &index)).unwrap();
    assert_eq!(bits(&concat_channels(&x, Rows::indexed(&y, &index)).unwrap()), bits(&joined));
}

#[test]
fn an_index_list_stays_valid_while_others_are_evicted() {
    let (heads, q, k) = (2, random((3, 9, 16), 1), random((2, 7, 16), 2));
    let cache = KeyValues::new(&k, &k, heads).unwrap();
    for round in 0..40u32 {
        // The queries' list is the same in every round, the sequences' list changes each time.
        let pairs: Vec<_> = (0..6).map(|i| (i % 3, round >> i & 1)).collect();
        let found = cross_attention(&q, &cache, &pairs).unwrap();
        let (queries, sequences): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
        let [q, k] = [gather(&wide(&q), &queries).unwrap(), gather(&wide(&k), &sequences).unwrap()];
        assert_close(&found, &attention::plain(&q, &k, &k, heads, false).unwrap(), 2e-6);
    }
}

#[test]
fn mean_errors_match_plain() {
    let single = |shape: &[usize], seed| random(shape, seed).to_dtype(DType::F32).unwrap();
    let (noisy, targets, mix) = (single(&[2, 5, 4, 3], 1), single(&[2, 5, 4, 3], 2), single(&[2, 2], 3));
    // As many channels as the targets, and twice as many when the variance is predicted too.
    for (channels, seed) in [(3, 4), (6, 5)] {
        let output = random((4, 5, 4, channels), seed);
        for deviation in [Deviation::Squared, Deviation::Absolute, Deviation::Huber] {
            let points = &[0, 0, 1, 1];
            let of = MeanErrors { noisy: &noisy, targets: &targets, mix: &mix, points, deviation };
            let found = mean_errors(&output, &of).unwrap();
            let [noisy, targets, mix] = [&noisy, &targets, &mix].map(host);
            let of = MeanErrors { noisy: &noisy, targets: &targets, mix: &mix, points, deviation };
            assert_close(&found, &errors::plain(&host(&output), &of).unwrap(), 1e-6);
        }
    }
    let shape = (4, 5, 4, 3);
    let of =
        MeanErrors { noisy: &noisy, targets: &targets, mix: &mix, points: &[0, 0, 1, 2], deviation: Deviation::Huber };
    assert!(mean_errors(&random(shape, 4), &of).is_err());
    let few = MeanErrors { points: &[0, 1], ..of };
    assert!(mean_errors(&random(shape, 4), &few).is_err());
}

#[test]
fn values_come_back_from_the_device() {
    let values: Vec<f32> = (0..1000).map(|i| i as f32 / 7.0).collect();
    for len in [1000, 10, 1000, 1] {
        let tensor = upload(&values[..len], len, &device()).unwrap();
        assert_eq!(download(&tensor).unwrap(), &values[..len]);
    }
    assert!(upload(&values, 999, &device()).is_err());
}

#[test]
fn empty_inputs_give_empty_outputs() {
    let x = random((3, 5, 8), 1);
    let none = gather(&x, &[]).unwrap();
    assert_eq!(none.dims(), [0, 5, 8]);
    assert!(download(&none).unwrap().is_empty());
    assert_eq!(upload(&[], (0, 4), &device()).unwrap().dims(), [0, 4]);
    let layer = Linear::new(&random((6, 8), 2), None).unwrap();
    assert_eq!(layer.forward(&none, None).unwrap().dims(), [0, 5, 6]);
    assert_eq!(activate(&none, Activation::Silu).unwrap().dims(), [0, 5, 8]);
}

#[test]
fn a_dropped_copy_does_not_affect_others() {
    let (x, y) = (random((64, 64), 1), random((64, 64), 2));
    drop(Download::start(&x).unwrap());
    let (first, second) = (Download::start(&x).unwrap(), Download::start(&y).unwrap());
    assert_eq!(
        second.wait().unwrap(),
        host(&y).to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
    assert_eq!(
        first.wait().unwrap(),
        host(&x).to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
}

#[test]
fn an_image_gives_the_same_bits_alone_and_in_a_batch() {
    let x = random((7, 5, 9, 48), 1);
    let conv = Conv2d::new(&random((50, 48, 3, 3), 2), None, 1, Padding::Around).unwrap();
    let norm = GroupNorm::new(8, 1e-5, &random(48, 3), &random(48, 4)).unwrap();
    let fused = Fused { norm: Some(&norm), ..Fused::default() };
    let layer = Linear::new(&random((33, 48), 5), None).unwrap();
    let attend = |x: &Tensor| self_attention(&x.flatten(1, 2).unwrap(), 2, false);
    let whole = [conv.forward(&x, fused).unwrap(), layer.forward(&x, None).unwrap(), attend(&x).unwrap()];
    for b in 0..7 {
        let one = gather(&x, &[b]).unwrap();
        let alone = [conv.forward(&one, fused).unwrap(), layer.forward(&one, None).unwrap(), attend(&one).unwrap()];
        for (whole, alone) in whole.iter().zip(&alone) {
            assert_eq!(bits(&gather(whole, &[b]).unwrap()), bits(alone));
        }
    }
}

/// The bits that each kernel gives, on shapes with remainders in every dimension that it divides.
fn bits_of_every_kernel() -> Vec<(&'static str, Vec<u32>)> {
    let mut found = Vec::new();
    let mut add = |name, tensor: Result<Tensor>| found.push((name, bits(&tensor.unwrap())));
    let (x, bias) = (random((2, 101, 700), 1), random(150, 2));
    for outputs in [1, 17, 64, 150] {
        let layer = Linear::new(&random((outputs, 700), 3), Some(&bias.narrow(0, 0, outputs).unwrap())).unwrap();
        let residual = random((1, 101, outputs), 4);
        add("linear", layer.forward(&x, Some(Rows::indexed(&residual, &[0, 0]))));
    }
    let norm = GroupNorm::new(4, 1e-5, &random(48, 5), &random(48, 6)).unwrap();
    let shift = random((2, 80), 7);
    for (height, stride, padding) in [(20, 1, Padding::Around), (7, 1, Padding::Around), (9, 2, Padding::After)] {
        let conv = Conv2d::new(&random((80, 48, 3, 3), 8), Some(&random(80, 9)), stride, padding).unwrap();
        let fused = Fused { norm: Some(&norm), shift: Some(Rows::direct(&shift)), residual: None };
        add("conv2d", conv.forward(&random((2, height, 18, 48), 10), fused));
    }
    for (dim, keys) in [(40, 77), (8, 300)] {
        let (k, v) = (random((1, keys, 2 * dim), 11), random((1, keys, 2 * dim), 12));
        let cache = KeyValues::new(&k, &v, 2).unwrap();
        add("cross-attention", cross_attention(&random((1, 53, 2 * dim), 13), &cache, &[(0, 0)]));
        for causal in [false, true] {
            add("self-attention", self_attention(&random((1, 150, 6 * dim), 14), 2, causal));
        }
    }
    let x = random((2, 37, 52), 15);
    add("group-norm", GroupNorm::new(4, 1e-5, &random(52, 16), &random(52, 17)).unwrap().forward(&x, true));
    add("layer-norm", LayerNorm::new(1e-5, &random(52, 16), &random(52, 17)).unwrap().forward(&x));
    for activation in [Activation::Silu, Activation::Gelu, Activation::QuickGelu, Activation::GeluTanh] {
        add("activation", activate(&x, activation));
    }
    add("geglu", geglu(&x));
    let rows = random((2, 4 * 52), 18);
    add("adaptive-norm", Modulation::new(&rows, 52).normalise(&x, 1e-6, 3, 1));
    add("gate", Modulation::new(&rows, 52).gate(&x, &random((2, 37, 52), 19), 2));
    add("query-key-norm", QueryKeyNorm::new(1e-6, &random(13, 20), &random(13, 21)).forward(&random((2, 9, 78), 22)));
    let (noisy, targets, mix) = (random((2, 5, 4, 3), 23), random((2, 5, 4, 3), 24), random((2, 2), 25));
    let deviation = Deviation::Huber;
    let of = MeanErrors { noisy: &noisy, targets: &targets, mix: &mix, points: &[0, 1, 1], deviation };
    add("mean-errors", mean_errors(&random((3, 5, 4, 3), 26), &of));
    found
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    if !device().is_cpu() || dtype().0 != DType::F32 {
        return;
    }
    struct Lanes;
    impl simd::Kernel for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    let usual = bits_of_every_kernel();
    let available = InstructionSet::available();
    for set in InstructionSet::ALL {
        if !available.contains(&set) {
            println!("{set} can't be tested on this processor");
            continue;
        }
        let lanes = match set {
            InstructionSet::Scalar => 1,
            InstructionSet::Neon => 4,
            InstructionSet::Avx2 => 8,
            InstructionSet::Avx512 => 16,
        };
        assert_eq!(simd::with(set, || simd::dispatch(Lanes)), lanes);
        let found = simd::with(set, bits_of_every_kernel);
        assert_eq!(found.len(), usual.len());
        for (usual, found) in usual.iter().zip(found) {
            assert!(*usual == found, "{} differs with {set}", found.0);
        }
    }
}

#[test]
fn an_instruction_set_is_known_by_its_name() {
    for set in InstructionSet::available() {
        assert_eq!(set.name().parse(), Ok(set));
    }
    let unknown = "sse9".parse::<InstructionSet>().unwrap_err().to_string();
    assert!(unknown.contains("'sse9'") && unknown.contains("avx512"), "{unknown}");
    let missing = InstructionSet::ALL.into_iter().find(|set| !set.is_available()).unwrap();
    let error = missing.name().parse::<InstructionSet>().unwrap_err().to_string();
    assert!(error.contains("lacks") && error.contains("scalar"), "{error}");
}

#[test]
fn mismatched_shapes_are_errors() {
    let layer = Linear::new(&random((4, 6), 1), None).unwrap();
    assert!(layer.forward(&random((2, 5), 2), None).is_err());
    let wrong = random((2, 3), 3);
    assert!(layer.forward(&random((2, 6), 2), Some(Rows::direct(&wrong))).is_err());
    let conv = Conv2d::new(&random((4, 6, 3, 3), 1), None, 1, Padding::Around).unwrap();
    assert!(conv.forward(&random((1, 4, 4, 5), 2), Fused::default()).is_err());
    assert!(GroupNorm::new(3, 1e-5, &random(8, 1), &random(8, 2)).is_err());
    assert!(self_attention(&random((1, 4, 10), 1), 2, false).is_err());
}
