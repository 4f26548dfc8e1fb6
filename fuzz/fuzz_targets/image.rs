//! Any bytes: an image of the right size and finite values, or an error that names its stage. Never a panic, a hang or memory without bound.
#![no_main]

use elbo_images::Preprocessing;
use libfuzzer_sys::fuzz_target;

const SIZE: u32 = 8;

fuzz_target!(|bytes: &[u8]| {
    // One that crops in the file's own colours, one that halves in RGB: together they take every path.
    for preprocessing in [Preprocessing::stable_diffusion(SIZE), Preprocessing::dit(SIZE)] {
        match preprocessing.apply(bytes) {
            Ok(values) => {
                assert_eq!(values.len(), (SIZE * SIZE * 3) as usize);
                assert!(values.iter().all(|value| (-1.0..=1.0).contains(value)));
            }
            Err(error) => assert!(matches!(error.stage(), "decode" | "preprocess")),
        }
    }
});
