//! Turns the bytes of an image file into the pixels a model takes: decode, resize, crop, convert to RGB, normalise.
//!
//! Every model family was trained on images prepared in its own way ([`Preprocessing`]), with Pillow and torchvision.
//! Predictions depend on the pixels, so this crate reproduces that preparation to within rounding. How each kind of
//! input is handled: | input | handling |
//! |---|---|
//! | gray, bilevel | resized as gray, then copied to R, G and B |
//! | palette | converted to its colours, *then* resized (Pillow resizes palette images by nearest neighbour) |
//! | alpha | resized with premultiplied alpha, then alpha is dropped, so no background shows through; families that
//! convert to RGB before resizing drop it first | | one transparent colour (PNG) | treated as opaque: only a palette's
//! transparency counts as alpha, as in Pillow |
//! | 16 bits | the high byte |
//! | 32-bit float RGB TIFF | [0, 1] to 8 bits, clamped; 32-bit gray TIFF is refused |
//! | CMYK, YCCK JPEG | families that convert to RGB last resize the CMYK channels; converted to RGB by multiplying ink
//! and black, without a colour profile |
//! | orientation (EXIF, else XMP) | applied first |
//! | animation | only the first frame is used |
//!
//! The format is detected from the content, not from the file's name. Colour profiles are not applied, as in the
//! reference.
//!
//! **How close.** `tests/pillow.rs` compares with Pillow 13 and torchvision 0.29. In units of 1/255, every difference
//! has a mean under 1 and a maximum under 4. PNG, WebP (lossy too) and GIF differ only by rounding in the resize, and
//! so do CMYK and JPEG with whole or horizontally repeated chroma (4:4:4, 4:1:1). JPEG 4:2:0 has a mean of 0.35 (its
//! chroma is rounded after each direction, in libjpeg once), 4:2:2 and 4:4:0 have 0.19; without resizing, some pixels
//! are off by 3. The exception is JPEG at most four pixels wide: libjpeg also repeats subsampled chroma down the
//! columns, while we interpolate. There the mean is 1.1 and the maximum 4 in the fixtures, and up to 12 and 45 in pure
//! noise.
//!
//! **How fast.** zune-jpeg decodes at 0.8 to 1.2 times the speed of Pillow on a core with AVX2, and needs neither C nor
//! an assembler. With the resize we are two to six times as fast as Pillow (BENCHMARKS.md). A binding to libjpeg-turbo
//! would gain up to a fifth of that, but its build needs cmake and nasm.
//!
//! **Not done: decoding at a fraction of the size** (the DCT's, Pillow's `draft`). It would change what the model sees.
//! For a 12-megapixel photograph resized to 512, decoding at half the size changes pixels by up to 13/255 (mean 0.14)
//! and at a quarter by 17; resized to 224, half the size changes them by 6, a quarter by 8 and an eighth by 13.

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

/// Maximum size of a file to decode, in bytes. Callers need not fetch more.
pub const MAX_FILE_BYTES: usize = 256 << 20;

/// Maximum side of an image to decode, in pixels.
pub const MAX_SIDE: u32 = 16_384;

/// Maximum number of pixels of an image to decode. This many RGB pixels fill [`MAX_ALLOC`], and Pillow refuses more.
pub const MAX_PIXELS: u64 = MAX_ALLOC / 3;

/// Maximum memory to decode one image, in bytes, since a file of a few KB may claim to hold gigabytes. It covers the
/// decoded pixels, and the coefficients of a JPEG in several scans (progressive): six more bytes a pixel, so such a
/// file may have 59 megapixels. Dropping alpha briefly takes three quarters of it again.
pub const MAX_ALLOC: u64 = 512 << 20;

/// How an image becomes a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Resizes the short side and crops the centre, rounding like torchvision; converts to RGB last. Stable Diffusion,
    /// OpenCLIP.
    CropThenRgb,
    /// Converts to RGB first; resizes the short side and crops the centre, rounding like transformers. CLIP.
    RgbThenCrop,
    /// Converts to RGB first; halves by averaging while at least twice the target size, then resizes the short side and
    /// crops the centre (Dhariwal & Nichol, NeurIPS 2021, `center_crop_arr`). DiT.
    HalveThenCrop,
    /// Converts to RGB first; resizes both sides, whatever the aspect ratio. SigLIP.
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

/// How to prepare an image for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessing {
    /// Side of the square in pixels.
    pub size: u32,
    /// How the image becomes a square.
    pub fit: Fit,
    /// How pixels are interpolated.
    pub filter: Filter,
    /// Subtracted from R, G and B in [0, 1].
    pub mean: [f32; 3],
    /// R, G and B are then divided by this.
    pub std: [f32; 3],
}

impl Preprocessing {
    /// For Stable Diffusion, as in the reference: values in [-1, 1].
    pub fn stable_diffusion(size: u32) -> Self {
        Self { size, fit: Fit::CropThenRgb, filter: Filter::Bicubic, mean: [0.5; 3], std: [0.5; 3] }
    }

    /// For DiT: values in [-1, 1].
    pub fn dit(size: u32) -> Self {
        Self { fit: Fit::HalveThenCrop, ..Self::stable_diffusion(size) }
    }

    /// For CLIP; the mean and standard deviation come from the checkpoint.
    pub fn clip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::RgbThenCrop, filter, mean, std }
    }

    /// For OpenCLIP, likewise.
    pub fn open_clip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::CropThenRgb, filter, mean, std }
    }

    /// For SigLIP, likewise.
    pub fn siglip(size: u32, filter: Filter, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { size, fit: Fit::Squash, filter, mean, std }
    }

    /// The memory [`Preprocessing::apply`] takes besides the file, in bytes, estimated from the file's header. Fails if
    /// the header is enough to tell that decoding would fail.
    ///
    /// It counts the decoded pixels, what the decoder holds besides them, and copies in other colours or another size.
    pub fn memory(&self, bytes: &[u8]) -> Result<u64, ImageError> {
        let Extent { width, height, channels, decoding } = decode::probe(bytes)?;
        let pixels = u64::from(width) * u64::from(height);
        let has_more_than_colours = channels.is_multiple_of(2);
        let colours = if channels < 3 { pixels } else { 3 * pixels };
        let copied = match self.fit {
            Fit::RgbThenCrop | Fit::Squash if has_more_than_colours => colours,
            Fit::CropThenRgb | Fit::RgbThenCrop | Fit::Squash => 0,
            // A turned copy, or the copies at a half and a quarter of the size.
            Fit::HalveThenCrop => colours,
        };
        let size = u64::from(self.size);
        // The copy resized in one direction, and its turned copy.
        let narrow = 2 * size * u64::from(width.max(height)) * channels;
        // The output: three bytes and three floats a pixel.
        Ok(decoding.max(pixels * channels + copied + narrow) + 15 * size * size)
    }

    /// Decodes an image file and brings it to `[size, size, 3]` (row, column, channel), normalised.
    ///
    /// ```
    /// // A gray image of one black pixel.
    /// let file = b"P5 1 1 255 \x00";
    /// let pixels = elbo_images::Preprocessing::stable_diffusion(8).apply(file)?;
    /// assert_eq!((pixels.len(), pixels[0]), (8 * 8 * 3, -1.0));
    /// # Ok::<_, elbo_images::ImageError>(())
    /// ```
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

    /// The normalised value for each of the 256 values of a channel.
    fn normalised(&self, channel: usize) -> [f32; 256] {
        std::array::from_fn(|value| (value as f32 / 255.0 - self.mean[channel]) / self.std[channel])
    }
}

/// The size and memory of a picture, from its header.
#[derive(Clone, Copy, Debug)]
struct Extent {
    width: u32,
    height: u32,
    /// Channels of one byte each, as decoded.
    channels: u64,
    /// Peak memory while decoding, in bytes.
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

/// An image that can't be used. The error concerns this sample only.
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
    /// The format is unknown.
    #[error(
        "decoding the image: the file is {what}; put a JPEG, PNG, WebP, GIF, BMP, TIFF or PNM in its place, or remove it from the dataset"
    )]
    NotAnImage {
        /// What it looks like.
        what: Cow<'static, str>,
    },
    /// A side exceeds [`MAX_SIDE`], the pixels exceed [`MAX_PIXELS`], or decoding takes more than [`MAX_ALLOC`] bytes.
    #[error(
        "decoding the image: {width} x {height} pixels are too many (at most {MAX_SIDE} a side, {MAX_PIXELS} in all and {} MiB of memory); \
         save the image smaller, or remove it from the dataset", MAX_ALLOC >> 20
    )]
    TooLarge {
        /// Width according to the file.
        width: u32,
        /// Height according to the file.
        height: u32,
    },
    /// The file is damaged or of an unsupported kind.
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
    /// The image can't be resized to the requested size.
    #[error("resizing a {width} x {height} image to {size}: {reason}; use a --size between 1 and {MAX_SIDE}")]
    Resize {
        /// Width as decoded.
        width: u32,
        /// Height as decoded.
        height: u32,
        /// Requested side.
        size: u32,
        /// The cause.
        reason: String,
    },
}

/// A library's error message. It may quote the file, so shorten it and remove control characters.
fn account(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let (said, rest) = text.split_at(text.floor_char_boundary(200));
    let said: String = said.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    if rest.is_empty() { said } else { said + "…" }
}

/// Refuses an image before memory is allocated for it.
fn check_size(format: &'static str, width: u32, height: u32, bytes_per_pixel: u64) -> Result<(), ImageError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(ImageError::Decode { format, reason: format!("a size of {width} x {height} holds no pixels") });
    }
    let fits = width.max(height) <= MAX_SIDE && pixels <= MAX_PIXELS && pixels * bytes_per_pixel <= MAX_ALLOC;
    if fits { Ok(()) } else { Err(ImageError::TooLarge { width, height }) }
}
