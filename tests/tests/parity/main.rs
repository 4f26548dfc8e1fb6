//! The models compared with reference numbers of PyTorch, diffusers and transformers in double precision.
//!
//! `fixtures/<name>/reference.json` gives the formula of every tensor and the loss of f32 itself; the tolerances here are a
//! few times that loss. `digits-sd` and `digits-dit` are trained. The others have random weights and cover each family's
//! options, including every bias and norm.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

mod candle;
mod errors;
mod layers;
mod loading;
mod reference;
mod stages;
mod text;
mod variants;
mod weights;

/// Defines one test per fixture.
macro_rules! for_each {
    ($check:path: $($test:ident $fixture:literal),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                $check($fixture);
            }
        )*
    };
}
pub(crate) use for_each;
