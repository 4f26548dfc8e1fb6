//! The models against reference numbers of PyTorch, diffusers and transformers, computed in double precision.
//!
//! `fixtures/<name>/reference.json` gives the formula of every tensor and what f32 itself loses; the tolerances here are a
//! few times that. `digits-sd` and `digits-dit` are trained; the others have random weights and imitate each family's
//! switches, every bias and norm included.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

mod errors;
mod layers;
mod loading;
mod reference;
mod stages;
mod text;
mod variants;
mod weights;

/// A test per fixture.
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
