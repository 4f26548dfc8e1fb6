//! Bytes of an image file to the pixels a VAE takes: decode, resize, crop, RGB, [-1, 1].
//!
//! The reference does this with Pillow and torchvision: resize the short side to S (antialiased bicubic), centre crop S x S,
//! convert to RGB *after* the crop. A prediction moves with its pixels, so the same is done here to within rounding. What an
//! input becomes:
//!
//! | input | becomes |
//! |---|---|
//! | gray, bilevel | resized as gray, then the same in R, G and B |
//! | palette | its colours, *then* resized (Pillow resizes palette images by nearest neighbour) |
//! | alpha | resized with premultiplied alpha, then alpha is dropped: no background shows through |
//! | 16 bits | the high byte |
//! | 32-bit float RGB TIFF | [0, 1] to 8 bits, clamped; gray TIFF of 32 bits is refused |
//! | CMYK, YCCK JPEG | RGB by multiplying ink and black, without a colour profile |
//! | EXIF orientation | applied first |
//! | animation | its first frame |
//!
//! The format is read from the content; a file's name says nothing. Colour profiles are not applied, as in the reference.

use std::error::Error;
use std::io::Cursor;

use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, MulDiv, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

/// The longest side of an image that is decoded, in pixels.
pub const MAX_SIDE: u32 = 16_384;

/// The memory one image may take to decode, in bytes: a file of a few KB may claim to hold gigabytes.
pub const MAX_ALLOC: u64 = 512 << 20;

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

/// Pixels of 8 bits, interleaved by channel, row by row.
struct Pixels {
    width: u32,
    height: u32,
    kind: PixelType,
    data: Vec<u8>,
}

/// Decodes an image file and brings it to `[size, size, 3]` (row, column, channel) in [-1, 1].
pub fn decode_and_resize(bytes: &[u8], size: u32) -> Result<Vec<f32>, ImageError> {
    let pixels = eight_bits(decode(bytes)?);
    let cropped = resize_and_crop(pixels, size)?;
    Ok(rgb(&cropped).map(|value| f32::from(value) / 255.0 * 2.0 - 1.0).collect())
}

fn decode(bytes: &[u8]) -> Result<DynamicImage, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::Empty);
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_ALLOC);
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(image::ImageError::IoError)?;
    if reader.format() == Some(ImageFormat::Jpeg) && is_truncated_jpeg(bytes) {
        return Err(ImageError::Truncated);
    }
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder()?;
    limits.reserve(decoder.total_bytes())?;
    // Damaged metadata is no reason to give up an image.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Whether a JPEG's last scan has no end: the decoder would paint what is missing gray.
fn is_truncated_jpeg(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|pair| pair == marker);
    // Neither marker occurs within compressed data, where a byte FF is followed by 00 or a restart marker.
    match (last([0xFF, 0xDA]), last([0xFF, 0xD9])) {
        (Some(scan), Some(end)) => end < scan,
        _ => true,
    }
}

/// The image in 8 bits with its own channels: alpha must still be there when it is resized.
fn eight_bits(image: DynamicImage) -> Pixels {
    let (width, height) = (image.width(), image.height());
    let high = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect();
    let (kind, data) = match image {
        DynamicImage::ImageLuma8(image) => (PixelType::U8, image.into_raw()),
        DynamicImage::ImageLumaA8(image) => (PixelType::U8x2, image.into_raw()),
        DynamicImage::ImageRgb8(image) => (PixelType::U8x3, image.into_raw()),
        DynamicImage::ImageRgba8(image) => (PixelType::U8x4, image.into_raw()),
        DynamicImage::ImageLuma16(image) => (PixelType::U8, high(image.into_raw())),
        DynamicImage::ImageLumaA16(image) => (PixelType::U8x2, high(image.into_raw())),
        DynamicImage::ImageRgb16(image) => (PixelType::U8x3, high(image.into_raw())),
        DynamicImage::ImageRgba16(image) => (PixelType::U8x4, high(image.into_raw())),
        other if other.color().has_alpha() => (PixelType::U8x4, other.into_rgba8().into_raw()),
        other => (PixelType::U8x3, other.into_rgb8().into_raw()),
    };
    Pixels { width, height, kind, data }
}

/// The size after the short side became `size`: the long side is `int(size * long / short)`, as torchvision has it.
fn resized(width: u32, height: u32, size: u32) -> (u32, u32) {
    let long = |long: u32, short: u32| (f64::from(size) * f64::from(long) / f64::from(short)) as u32;
    if width <= height { (size, long(height, width)) } else { (long(width, height), size) }
}

/// Where a centre crop starts: `round((side - size) / 2)`, halves to even as Python rounds.
fn offset(side: u32, size: u32) -> u32 {
    (f64::from(side - size) / 2.0).round_ties_even() as u32
}

/// Only the part of the resized image that the crop keeps is computed, from all the pixels that bear on it. The result is
/// that of resizing first and cropping then, at a cost that an extreme aspect ratio can't blow up.
fn resize_and_crop(pixels: Pixels, size: u32) -> Result<Pixels, ImageError> {
    let Pixels { width, height, kind, .. } = pixels;
    let fail = |reason: String| ImageError::Resize { width, height, size, reason };
    if !(1..=MAX_SIDE).contains(&size) {
        return Err(fail("no such size is possible".into()));
    }
    if width == 0 || height == 0 {
        return Err(fail("it has no pixels".into()));
    }
    let (new_width, new_height) = resized(width, height, size);
    let (left, top) = (offset(new_width, size), offset(new_height, size));
    if (new_width, new_height) == (width, height) {
        return Ok(crop(&pixels, left, top, size));
    }
    let columns = source_span(left, size, width, new_width);
    let rows = source_span(top, size, height, new_height);
    let data = convolve(pixels, columns, rows, size).map_err(|e| fail(e.to_string()))?;
    Ok(Pixels { width: size, height: size, kind, data })
}

/// Resamples the given spans of columns and rows to `size` x `size`: horizontally, then vertically, in 8 bits between.
///
/// This is Pillow's order. The other one, the library's own for 8 bits, clips other overshoots at sharp edges.
fn convolve(pixels: Pixels, columns: (f64, f64), rows: (f64, f64), size: u32) -> Result<Vec<u8>, Box<dyn Error>> {
    let Pixels { width, height, kind, data } = pixels;
    let mut resizer = Resizer::new();
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).use_alpha(false);
    let mut source = Image::from_vec_u8(width, height, data, kind)?;
    let has_alpha = matches!(kind, PixelType::U8x2 | PixelType::U8x4);
    if has_alpha {
        MulDiv::new().multiply_alpha_inplace(&mut source)?;
    }
    let mut narrow = Image::new(size, height, kind);
    resizer.resize(&source, &mut narrow, &options.crop(columns.0, 0.0, columns.1, f64::from(height)))?;
    let mut target = Image::new(size, size, kind);
    resizer.resize(&narrow, &mut target, &options.crop(0.0, rows.0, f64::from(size), rows.1))?;
    let mut data = target.into_vec();
    if has_alpha {
        data.chunks_exact_mut(kind.size()).for_each(divide_by_alpha);
    }
    Ok(data)
}

/// Undoes the premultiplication of one pixel, rounding down as Pillow does: alpha amplifies what rounding leaves.
fn divide_by_alpha(pixel: &mut [u8]) {
    if let Some((&mut alpha @ 1..=254, colours)) = pixel.split_last_mut() {
        for colour in colours {
            *colour = (u16::from(*colour) * 255 / u16::from(alpha)).min(255) as u8;
        }
    }
}

/// Start and length, in source pixels, of `size` pixels from `start` on of an axis resized from `from` to `to` pixels.
fn source_span(start: u32, size: u32, from: u32, to: u32) -> (f64, f64) {
    let from = f64::from(from);
    let scale = from / f64::from(to);
    let start = f64::from(start) * scale;
    (start, (f64::from(size) * scale).min(from - start))
}

fn crop(pixels: &Pixels, left: u32, top: u32, size: u32) -> Pixels {
    let channels = pixels.kind.size();
    let (stride, row) = (pixels.width as usize * channels, size as usize * channels);
    let first = top as usize * stride + left as usize * channels;
    let rows = (0..size as usize).map(|y| first + y * stride);
    let data = rows.flat_map(|start| &pixels.data[start..start + row]).copied().collect();
    Pixels { width: size, height: size, kind: pixels.kind, data }
}

/// R, G and B of every pixel.
fn rgb(pixels: &Pixels) -> impl Iterator<Item = u8> {
    let channels = pixels.kind.size();
    pixels.data.chunks_exact(channels).flat_map(move |pixel| match channels {
        1 | 2 => [pixel[0]; 3],
        _ => [pixel[0], pixel[1], pixel[2]],
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/preprocess");
        std::fs::read(directory.join(name)).unwrap()
    }

    /// Compares with what Pillow makes of the same file (tests/fixtures/preprocess/make.py), in 1/255.
    fn assert_like_pillow(image: &str, size: u32) {
        let expected = fixture(&format!("{}.{size}.bin", image.split('.').next().unwrap()));
        let actual = decode_and_resize(&fixture(image), size).unwrap();
        assert_eq!(actual.len(), expected.len(), "{image}");
        let differences = actual.iter().zip(&expected).map(|(a, e)| ((a + 1.0) * 127.5 - f32::from(*e)).abs());
        let (max, sum) = differences.fold((0.0f32, 0.0f32), |(max, sum), d| (max.max(d), sum + d));
        let mean = sum / expected.len() as f32;
        println!("{image} at {size}: mean {mean:.3}, max {max:.1}");
        assert!(mean < 1.0 && max < 4.0, "{image} at {size}: mean {mean}, max {max}");
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
        let actual = decode_and_resize(&fixture("landscape.png"), 41).unwrap();
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
    fn values_span_minus_one_to_one() {
        let mut black = b"P5 2 1 255 ".to_vec();
        black.extend([0, 255]);
        assert_eq!(decode_and_resize(&black, 1).unwrap(), [-1.0; 3]);
        let mut white = b"P5 1 2 255 ".to_vec();
        white.extend([255, 0]);
        assert_eq!(decode_and_resize(&white, 1).unwrap(), [1.0; 3]);
    }

    #[test]
    fn margins_are_rounded_as_python_rounds() {
        // round(0.5) = 0, round(1.5) = 2, round(2.5) = 2, round(2) = 2.
        assert_eq!([33, 35, 37, 36].map(|side| offset(side, 32)), [0, 2, 2, 2]);
        assert_eq!(resized(100, 333, 32), (32, 106));
    }

    #[test]
    fn what_is_no_image_fails_at_the_decode_stage() {
        let jpeg = fixture("rotated.jpg");
        let png = fixture("landscape.png");
        let bad: [&[u8]; 5] = [b"", b"hello, world", &png[..png.len() / 2], &jpeg[..jpeg.len() / 2], &jpeg[..20]];
        for bytes in bad {
            let error = decode_and_resize(bytes, 32).unwrap_err();
            assert_eq!(error.stage(), "decode", "{error}");
            assert!(error.to_string().contains("remove it from the dataset"), "{error}");
        }
    }

    #[test]
    fn claimed_sizes_are_checked_before_memory_is_taken() {
        for header in ["P6 100000 100000 255 ", "P6 16384 16384 255 ", "P6 17000 1 255 "] {
            assert_eq!(decode_and_resize(header.as_bytes(), 32).unwrap_err().stage(), "decode", "{header}");
        }
    }

    #[test]
    fn an_extreme_aspect_ratio_costs_no_more_than_the_crop() {
        let mut line = b"P5 16384 1 255 ".to_vec();
        line.extend((0..16384).map(|x| (x / 64) as u8));
        assert_eq!(decode_and_resize(&line, 512).unwrap().len(), 512 * 512 * 3);
    }

    #[test]
    fn impossible_sizes_fail_at_the_preprocess_stage() {
        for size in [0, MAX_SIDE + 1] {
            assert_eq!(decode_and_resize(&fixture("gray.png"), size).unwrap_err().stage(), "preprocess");
        }
    }
}
