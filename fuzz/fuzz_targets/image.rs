//! Decodes and prepares any bytes. The result is an image of the right size with finite values, or an error that says
//! what is wrong; never a panic, a hang or unbounded memory use.
#![no_main]

use elbo_images::Preprocessing;
use libfuzzer_sys::fuzz_target;

const SIZE: u32 = 8;

fuzz_target!(|bytes: &[u8]| {
    // The first crops in the file's own colours, the second halves in RGB. Together they cover every path.
    for preprocessing in [Preprocessing::stable_diffusion(SIZE), Preprocessing::dit(SIZE)] {
        match preprocessing.apply(bytes) {
            Ok(values) => {
                assert_eq!(values.len(), (SIZE * SIZE * 3) as usize);
                assert!(values.iter().all(|value| (-1.0..=1.0).contains(value)));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
});
