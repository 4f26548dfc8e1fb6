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
//! | one transparent colour (PNG) | that colour: only a palette's transparency is alpha, as for Pillow |
//! | 16 bits | the high byte |
//! | 32-bit float RGB TIFF | [0, 1] to 8 bits, clamped; gray TIFF of 32 bits is refused |
//! | CMYK, YCCK JPEG | resized as it is where a family converts to RGB last; RGB by multiplying ink and black, without a colour profile |
//! | orientation (EXIF, else XMP) | applied first |
//! | animation | its first frame |
//!
//! The format is read from the content; a file's name says nothing. Colour profiles are not applied, as in the reference.
//!
//! **How close.** `tests/pillow.rs` compares with Pillow 13 and torchvision 0.29, in 1/255: everything has a mean under 1 and a maximum under 4.
//! PNG, WebP (lossy too) and GIF differ by rounding of the resize. So does JPEG with whole or horizontally repeated chroma (4:4:4, 4:1:1) and CMYK; 4:2:0
//! has a mean of 0.35 (its chroma is rounded after either direction, in libjpeg once), 4:2:2 and 4:4:0 of 0.19; pixels of 3 off occur unresized. The
//! exception: in JPEG at most four pixels wide, libjpeg repeats subsampled chroma down the columns too, and we
//! interpolate: a mean of 1.1 and a maximum of 4 in the fixtures, up to 12 and 45 in pure noise.
//!
//! **How fast.** zune-jpeg decodes at 0.8 to 1.2 times the speed of Pillow on a core with AVX2, and needs neither C nor an assembler; with the resize we are
//! two to six times as fast as Pillow (BENCHMARKS.md). A binding of libjpeg-turbo would gain up to a fifth of that, at the price of cmake and nasm to build.
//!
//! **Not done: decoding at a fraction of the size** (the DCT's, Pillow's `draft`). It would change what the model sees: of a 12-megapixel photograph
//! brought to 512, half the size moves a pixel by 13/255 (mean 0.14), a quarter by 17; brought to 224, by 6, 8 and, an eighth, 13.

mod decode;
mod jpeg;
mod orientation;
mod pixels;
mod resize;
mod tiff;

use std::borrow::Cow;

use self::decode::decode;
use self::pixels::{Pixels, Turn};
use self::resize::fit_to;

/// The size of a file that is decoded, in bytes. Callers need not fetch more.
pub const MAX_FILE_BYTES: usize = 256 << 20;

/// The longest side of an image that is decoded, in pixels.
pub const MAX_SIDE: u32 = 16_384;

/// The pixels of an image that is decoded: RGB of so many fills [`MAX_ALLOC`], and Pillow refuses more.
pub const MAX_PIXELS: u64 = MAX_ALLOC / 3;

/// The memory one image may take to decode, in bytes: a file of a few KB may claim to hold gigabytes. Counted are the pixels as decoded,
/// and the coefficients of a JPEG in several scans (progressive): six bytes more a pixel, so that such a one may have 59 megapixels. Dropping alpha takes three
/// quarters of it again, for a moment.
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

    /// The memory [`Preprocessing::apply`] takes beside the file, in bytes, as the file's header says; an error where that is
    /// enough to tell that it fails.
    ///
    /// Counted are the pixels as decoded, what the decoder holds beside them, and copies in other colours or another size.
    pub fn memory(&self, bytes: &[u8]) -> Result<u64, ImageError> {
        let Extent { width, height, channels, decoding } = decode::probe(bytes)?;
        let pixels = u64::from(width) * u64::from(height);
        let has_more_than_colours = channels.is_multiple_of(2);
        let colours = if channels < 3 { pixels } else { 3 * pixels };
        let copied = match self.fit {
            Fit::RgbThenCrop | Fit::Squash if has_more_than_colours => colours,
            Fit::CropThenRgb | Fit::RgbThenCrop | Fit::Squash => 0,
            // Turned, or half of it and a quarter.
            Fit::HalveThenCrop => colours,
        };
        let size = u64::from(self.size);
        // Resized in one direction, and turned.
        let narrow = 2 * size * u64::from(width.max(height)) * channels;
        // Three bytes and three floats a pixel.
        Ok(decoding.max(pixels * channels + copied + narrow) + 15 * size * size)
    }

    /// Decodes an image file and brings it to `[size, size, 3]` (row, column, channel), normalised.
    pub fn apply(&self, bytes: &[u8]) -> Result<Vec<f32>, ImageError> {
        self.prepare(Picture::decode(bytes)?)
    }

    /// Brings a decoded image to `[size, size, 3]` (row, column, channel), normalised.
    pub fn prepare(&self, picture: Picture) -> Result<Vec<f32>, ImageError> {
        let Picture { mut pixels, turn } = picture;
        if self.fit != Fit::CropThenRgb {
            pixels = pixels.into_gray_or_rgb();
        }
        let rgb = fit_to(pixels, turn, self.size, self.fit, self.filter)?.into_rgb();
        let [r, g, b] = std::array::from_fn(|c| self.normalised(c));
        let normalise =
            |&[red, green, blue]: &[u8; 3]| [r[usize::from(red)], g[usize::from(green)], b[usize::from(blue)]];
        Ok(rgb.data.as_chunks().0.iter().map(normalise).collect::<Vec<_>>().into_flattened())
    }

    /// What each of the 256 values of a channel becomes.
    fn normalised(&self, channel: usize) -> [f32; 256] {
        std::array::from_fn(|value| (value as f32 / 255.0 - self.mean[channel]) / self.std[channel])
    }
}

/// What a header says of a picture.
#[derive(Clone, Copy, Debug)]
struct Extent {
    width: u32,
    height: u32,
    /// Of a byte each, as decoded.
    channels: u64,
    /// Bytes that are held at once while it is decoded.
    decoding: u64,
}

/// A decoded image.
#[derive(Debug)]
pub struct Picture {
    pixels: Pixels,
    turn: Turn,
}

impl Picture {
    /// Decodes the first image of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        decode(bytes).map(|(pixels, turn)| Self { pixels, turn })
    }
}

/// An image that can't be used. It is the sample's fault, and no other sample's.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is empty.
    #[error("decoding the image: the file is empty; replace it, or remove it from the dataset")]
    Empty,
    /// The file is larger than [`MAX_FILE_BYTES`].
    #[error(
        "decoding the image: the file has {bytes} bytes, more than {MAX_FILE_BYTES}; save the image smaller, or remove it from the dataset"
    )]
    FileTooLarge {
        /// Size of the file.
        bytes: u64,
    },
    /// Of no known format.
    #[error(
        "decoding the image: the file is {what}; put a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM in its place, or remove it from the dataset"
    )]
    NotAnImage {
        /// What it looks like.
        what: Cow<'static, str>,
    },
    /// Wider or higher than [`MAX_SIDE`], of more than [`MAX_PIXELS`], or more than [`MAX_ALLOC`] bytes.
    #[error(
        "decoding the image: {width} x {height} pixels are too many (at most {MAX_SIDE} a side, {MAX_PIXELS} in all and {} MiB of memory); \
         save the image smaller, or remove it from the dataset", MAX_ALLOC >> 20
    )]
    TooLarge {
        /// Width as the file says.
        width: u32,
        /// Height as the file says.
        height: u32,
    },
    /// Damaged, or of a kind that isn't supported.
    #[error("decoding the image ({format}): {reason}; replace the file, or remove it from the dataset")]
    Decode {
        /// Format of the file.
        format: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The end of the file is missing.
    #[error("decoding the image ({format}): the file is truncated; replace it, or remove it from the dataset")]
    Truncated {
        /// Format of the file.
        format: &'static str,
    },
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
            Self::Resize { .. } => "preprocess",
            _ => "decode",
        }
    }
}

/// What a library says of a file, which it may quote: cut where it is long, and without what a terminal would obey.
fn account(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let (said, rest) = text.split_at(text.floor_char_boundary(200));
    let said: String = said.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if rest.is_empty() { said } else { said + "…" }
}

/// Refuses an image before memory is taken for it.
fn check_size(format: &'static str, width: u32, height: u32, bytes_per_pixel: u64) -> Result<(), ImageError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(ImageError::Decode { format, reason: format!("a size of {width} x {height} holds no pixels") });
    }
    let fits = width.max(height) <= MAX_SIDE && pixels <= MAX_PIXELS && pixels * bytes_per_pixel <= MAX_ALLOC;
    if fits { Ok(()) } else { Err(ImageError::TooLarge { width, height }) }
}
