//! Turns the bytes of an image file into a model's input pixels, within a memory budget.

use bytes::Bytes;
use elbo_core::failure::FailureStage;
use elbo_data::budget::{Budget, Reservation};
use elbo_images::{ImageError, Preprocessing};

/// A model's input pixels.
#[derive(Debug)]
pub(crate) struct Picture {
    /// [S, S, 3].
    pub(crate) pixels: Vec<f32>,
    /// Their memory.
    pub(crate) share: Reservation,
}

/// Why there are no pixels.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PictureError {
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A panic, which is a defect.
    #[error("the decoder crashed on it")]
    Crashed,
}

impl PictureError {
    /// The failed stage, as the quarantine table names it.
    pub(crate) fn stage(&self) -> FailureStage {
        match self {
            Self::Image(ImageError::Resize { .. }) => FailureStage::Preprocess,
            Self::Image(_) | Self::Crashed => FailureStage::Decode,
        }
    }
}

/// Decodes and preprocesses an image, once its share of `memory` is free. The image's header tells how much it needs.
pub(crate) async fn picture(
    file: Bytes,
    preprocessing: Preprocessing,
    memory: &Budget,
) -> Result<Picture, PictureError> {
    let (header, wanted) = (file.clone(), preprocessing.clone());
    let needed = working(move || wanted.memory(&header)).await?;
    let mut share = memory.take(needed).await;
    let pixels = working(move || preprocessing.apply(&file)).await?;
    share.keep(size_of_val(pixels.as_slice()) as u64);
    Ok(Picture { pixels, share })
}

/// Computes on a blocking thread.
async fn working<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, PictureError> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| PictureError::Crashed)??)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gray bitmap in a PGM file.
    fn pgm(side: usize) -> Bytes {
        let header = format!("P5 {side} {side} 255\n").into_bytes();
        [header, vec![7; side * side]].concat().into()
    }

    #[tokio::test]
    async fn pictures_decoded_at_the_same_time_stay_within_the_budget() {
        let preprocessing = Preprocessing::stable_diffusion(64);
        let needed = preprocessing.memory(&pgm(2000)).unwrap();
        assert!(needed > 4_000_000, "{needed}");
        // Room for two and a half.
        let budget = Budget::new(needed * 5 / 2);
        let total = budget.free();
        let one = |side| picture(pgm(side), preprocessing.clone(), &budget);
        let mut decoded = futures::future::join_all([2000; 16].map(one)).await;
        assert!(decoded.iter().all(|picture| picture.as_ref().is_ok_and(|p| p.pixels.len() == 64 * 64 * 3)));
        assert!((2 * needed..=total).contains(&budget.peak()), "{} of {total}", budget.peak());
        // A prepared picture holds its own size, in units of 64 KiB.
        assert_eq!(total - budget.free(), 16 * (64 << 10));
        decoded.clear();
        assert_eq!(budget.free(), total);
        // An image that needs more than the budget is decoded alone.
        let small = Budget::new(1 << 20);
        let one = async || picture(pgm(2000), preprocessing.clone(), &small).await.is_ok();
        assert_eq!(futures::future::join(one(), one()).await, (true, true));
    }

    #[tokio::test]
    async fn an_invalid_picture_takes_no_memory() {
        let budget = Budget::new(1 << 30);
        let bomb = Bytes::from_static(b"P5 60000 60000 255\n");
        let error = picture(bomb, Preprocessing::stable_diffusion(64), &budget).await.unwrap_err();
        assert_eq!((error.stage(), budget.peak()), (FailureStage::Decode, 0));
        assert!(error.to_string().contains("16384"), "{error}");
    }
}
