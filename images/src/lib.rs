//! Bytes of an image file to the pixels a model takes: decode, resize, crop, RGB, normalise.
//!
//! Every family of models was trained on images prepared in its own way ([`Preprocessing`]), with Pillow and torchvision.
//! A prediction moves with its pixels, so the same is done here to within rounding. What an input becomes:
//!
//! | input | becomes |
//! |---|---|
//! | gray, bilevel | resized as gray, then the same in R, G and B |
//! | palette | its colours, *then* resized (Pillow resizes palette images by nearest neighbour) |
//! | alpha | resized with premultiplied alpha, then dropped: no background shows through; where a family converts to RGB before it resizes, dropped first |
//! | 16 bits | the high byte |
//! | 32-bit float RGB TIFF | [0, 1] to 8 bits, clamped; gray TIFF of 32 bits is refused |
//! | CMYK, YCCK JPEG | RGB by multiplying ink and black, without a colour profile |
//! | EXIF orientation | applied first |
//! | animation | its first frame |
//!
//! The format is read from the content; a file's name says nothing. Colour profiles are not applied, as in the reference.

mod decode;
mod resize;

use self::decode::{decode, eight_bits};
use self::resize::fit_to;

/// The longest side of an image that is decoded, in pixels.
pub const MAX_SIDE: u32 = 16_384;

/// The memory one image may take to decode, in bytes: a file of a few KB may claim to hold gigabytes.
pub const MAX_ALLOC: u64 = 512 << 20;

/// How an image becomes a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The short side is resized and the centre cropped, as torchvision rounds; RGB comes last. Stable Diffusion, OpenCLIP.
    CropThenRgb,
    /// RGB first; the short side is resized and the centre cropped, as transformers rounds. CLIP.
    RgbThenCrop,
    /// RGB first; halved by averaging while twice as large as asked for, then the short side is resized and the centre
    /// cropped (Dhariwal & Nichol, NeurIPS 2021, `center_crop_arr`). DiT.
    HalveThenCrop,
    /// RGB first; both sides are resized, whatever the aspect ratio. SigLIP.
    Squash,
}

/// How pixels are interpolated, always antialiased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle two source pixels wide.
    Bilinear,
    /// Catmull and Rom's cubic.
    Bicubic,
}

/// What a model wants done to an image before it sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessing {
    /// Side of the square in pixels.
    pub size: u32,
    /// How the image becomes a square.
    pub fit: Fit,
    /// How its pixels are interpolated.
    pub filter: Filter,
    /// Subtracted from R, G and B in [0, 1].
    pub mean: [f32; 3],
    /// What R, G and B are then divided by.
    pub std: [f32; 3],
}

impl Preprocessing {
    /// Stable Diffusion's, as in the reference: values in [-1, 1].
    pub fn stable_diffusion(size: u32) -> Self {
        Self { size, fit: Fit::CropThenRgb, filter: Filter::Bicubic, mean: [0.5; 3], std: [0.5; 3] }
    }

    /// DiT's: values in [-1, 1].
    pub fn dit(size: u32) -> Self {
        Self { fit: Fit::HalveThenCrop, ..Self::stable_diffusion(size) }
    }

    /// CLIP's; see the checkpoint for its mean and standard deviation.
    pub fn clip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::RgbThenCrop, filter, mean, std }
    }

    /// OpenCLIP's, likewise.
    pub fn open_clip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::CropThenRgb, filter, mean, std }
    }

    /// SigLIP's, likewise.
    pub fn siglip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::Squash, filter, mean, std }
    }

    /// Decodes an image file and brings it to `[size, size, 3]` (row, column, channel), normalised.
    pub fn apply(&self, bytes: &[u8]) -> Result<Vec<f32>, ImageError> {
        let mut pixels = eight_bits(decode(bytes)?);
        if self.fit != Fit::CropThenRgb {
            pixels = pixels.into_rgb();
        }
        let rgb = fit_to(pixels, self.size, self.fit, self.filter)?.into_rgb();
        let channels = (0..3).cycle();
        Ok(rgb.data.iter().zip(channels).map(|(v, c)| (f32::from(*v) / 255.0 - self.mean[c]) / self.std[c]).collect())
    }
}

/// An image that can't be used. It is the sample's fault, and no other sample's.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is empty.
    #[error("decoding the image: the file is empty; replace it, or remove it from the dataset")]
    Empty,
    /// Not an image of a known format, damaged, or larger than [`MAX_SIDE`] or [`MAX_ALLOC`].
    #[error("decoding the image: {0}; replace the file, or remove it from the dataset")]
    Decode(#[from] image::ImageError),
    /// The end of the file is missing.
    #[error("decoding the image: the file is truncated; replace it, or remove it from the dataset")]
    Truncated,
    /// The pixels can't be brought to the size asked for.
    #[error("resizing a {width} x {height} image to {size}: {reason}; use a --size between 1 and {MAX_SIDE}")]
    Resize {
        /// Width as decoded.
        width: u32,
        /// Height as decoded.
        height: u32,
        /// Side asked for.
        size: u32,
        /// Why not.
        reason: String,
    },
}

impl ImageError {
    /// What was being done: `decode` or `preprocess`, as the quarantine table names it.
    pub fn stage(&self) -> &'static str {
        match self {
            Self::Empty | Self::Decode(_) | Self::Truncated => "decode",
            Self::Resize { .. } => "preprocess",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/preprocess");
        std::fs::read(directory.join(name)).unwrap()
    }

    fn stable_diffusion(bytes: &[u8], size: u32) -> Result<Vec<f32>, ImageError> {
        Preprocessing::stable_diffusion(size).apply(bytes)
    }

    /// Compares with what Pillow makes of the same file (tests/fixtures/preprocess/make.py), in 1/255.
    fn assert_like_pillow(image: &str, size: u32) {
        assert_like(image, &format!("{size}"), &Preprocessing::stable_diffusion(size));
    }

    fn assert_like(image: &str, variant: &str, preprocessing: &Preprocessing) {
        let expected = fixture(&format!("{}.{variant}.bin", image.split('.').next().unwrap()));
        let actual = preprocessing.apply(&fixture(image)).unwrap();
        assert_eq!(actual.len(), expected.len(), "{image}");
        let Preprocessing { mean, std, .. } = preprocessing;
        let actual = actual.iter().zip((0..3).cycle()).map(|(v, c)| (v * std[c] + mean[c]) * 255.0);
        let differences = actual.zip(&expected).map(|(a, e)| (a - f32::from(*e)).abs());
        let (max, sum) = differences.fold((0.0f32, 0.0f32), |(max, sum), d| (max.max(d), sum + d));
        let mean = sum / expected.len() as f32;
        println!("{image} as {variant}: mean {mean:.3}, max {max:.1}");
        assert!(mean < 1.0 && max < 4.0, "{image} as {variant}: mean {mean}, max {max}");
    }

    #[test]
    fn landscape_and_portrait_are_resized_and_cropped_as_pillow_does() {
        assert_like_pillow("landscape.png", 32);
        assert_like_pillow("portrait.png", 32);
        // Enlarging, with an odd margin.
        assert_like_pillow("portrait.png", 64);
    }

    #[test]
    fn an_image_of_the_right_size_is_only_cropped() {
        let expected = fixture("landscape.41.bin");
        let actual = stable_diffusion(&fixture("landscape.png"), 41).unwrap();
        let exact = expected.iter().map(|&e| f32::from(e) / 255.0 * 2.0 - 1.0);
        assert!(actual.iter().copied().eq(exact));
    }

    #[test]
    fn every_kind_of_pixel_becomes_rgb() {
        for image in
            ["gray.png", "palette.png", "alpha.png", "gray_alpha.png", "gray16.png", "rgb16.png", "bilevel.png"]
        {
            assert_like_pillow(image, 32);
        }
        assert_like_pillow("cmyk.jpg", 32);
        assert_like_pillow("lossless.webp", 32);
    }

    #[test]
    fn exif_orientation_is_applied() {
        assert_like_pillow("rotated.jpg", 32);
    }

    #[test]
    fn dit_images_are_halved_and_cropped_as_its_own_code_does() {
        for (image, size) in [("landscape.png", 16), ("portrait.png", 32), ("alpha.png", 12), ("palette.png", 15)] {
            assert_like(image, &format!("dit.{size}"), &Preprocessing::dit(size));
        }
    }

    #[test]
    fn clip_images_are_cropped_as_transformers_does() {
        let (mean, std) = ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]);
        for image in ["landscape.png", "portrait.png", "alpha.png", "palette.png", "gray_alpha.png"] {
            assert_like(image, "clip.32", &Preprocessing::clip(32, Filter::Bicubic, mean, std));
        }
        assert_like("landscape.png", "clip-bilinear.30", &Preprocessing::clip(30, Filter::Bilinear, mean, std));
    }

    #[test]
    fn siglip_images_are_squashed_as_transformers_does() {
        let siglip = |size, filter| Preprocessing::siglip(size, filter, [0.5; 3], [0.5; 3]);
        for image in ["landscape.png", "alpha.png"] {
            assert_like(image, "siglip.32", &siglip(32, Filter::Bicubic));
        }
        assert_like("portrait.png", "siglip-bilinear.24", &siglip(24, Filter::Bilinear));
    }

    #[test]
    fn values_span_minus_one_to_one() {
        let mut black = b"P5 2 1 255 ".to_vec();
        black.extend([0, 255]);
        assert_eq!(stable_diffusion(&black, 1).unwrap(), [-1.0; 3]);
        let mut white = b"P5 1 2 255 ".to_vec();
        white.extend([255, 0]);
        assert_eq!(stable_diffusion(&white, 1).unwrap(), [1.0; 3]);
    }

    #[test]
    fn what_is_no_image_fails_at_the_decode_stage() {
        let jpeg = fixture("rotated.jpg");
        let png = fixture("landscape.png");
        let bad: [&[u8]; 5] = [b"", b"hello, world", &png[..png.len() / 2], &jpeg[..jpeg.len() / 2], &jpeg[..20]];
        for bytes in bad {
            let error = stable_diffusion(bytes, 32).unwrap_err();
            assert_eq!(error.stage(), "decode", "{error}");
            assert!(error.to_string().contains("remove it from the dataset"), "{error}");
        }
    }

    #[test]
    fn claimed_sizes_are_checked_before_memory_is_taken() {
        for header in ["P6 100000 100000 255 ", "P6 16384 16384 255 ", "P6 17000 1 255 "] {
            assert_eq!(stable_diffusion(header.as_bytes(), 32).unwrap_err().stage(), "decode", "{header}");
        }
    }

    #[test]
    fn an_extreme_aspect_ratio_costs_no_more_than_the_crop() {
        let mut line = b"P5 16384 1 255 ".to_vec();
        line.extend((0..16384).map(|x| (x / 64) as u8));
        assert_eq!(stable_diffusion(&line, 512).unwrap().len(), 512 * 512 * 3);
    }

    #[test]
    fn impossible_sizes_fail_at_the_preprocess_stage() {
        for size in [0, MAX_SIDE + 1] {
            assert_eq!(stable_diffusion(&fixture("gray.png"), size).unwrap_err().stage(), "preprocess");
        }
    }
}
