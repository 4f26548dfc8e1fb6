//! Decodes the bytes of an image file to 8-bit pixels.

use std::borrow::Cow;
use std::io::{Cursor, ErrorKind};

use image::error::LimitErrorKind;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use crate::orientation::Metadata;
use crate::pixels::{Colour, Pixels, Turn, look_like};
use crate::{Extent, ImageError, MAX_ALLOC, MAX_FILE_BYTES, MAX_SIDE, account, check_size, jpeg};

/// Decodes the first image of a file and finds how to bring it upright.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Pixels, Turn), ImageError> {
    match format_of(bytes)? {
        ImageFormat::Jpeg => jpeg::decode(bytes),
        format => other(bytes, format),
    }
}

/// Reads from a file's header how much memory decoding takes, before allocating any.
pub(crate) fn probe(bytes: &[u8]) -> Result<Extent, ImageError> {
    match format_of(bytes)? {
        ImageFormat::Jpeg => jpeg::probe(bytes),
        format => {
            let decoder = open(bytes, format)?;
            let ((width, height), colour) = (decoder.dimensions(), decoder.color_type());
            let pixels = u64::from(width) * u64::from(height);
            let channels = u64::from(colour.channel_count());
            let decoded = pixels * u64::from(colour.bytes_per_pixel());
            // These decoders hold a second copy of the picture besides their output.
            let twice = matches!(format, ImageFormat::WebP | ImageFormat::Gif | ImageFormat::Tiff);
            let others = if twice { decoded } else { 0 };
            let converted = if decoded == pixels * channels { 0 } else { pixels * channels };
            let keyed =
                if is_colour_keyed_png(bytes, format) && colour.has_alpha() { pixels * (channels - 1) } else { 0 };
            let decoding = decoded + others.max(converted).max(keyed);
            Ok(Extent { width, height, channels, decoding })
        }
    }
}

fn format_of(bytes: &[u8]) -> Result<ImageFormat, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::Empty);
    }
    if bytes.len() > MAX_FILE_BYTES {
        return Err(ImageError::FileTooLarge { bytes: bytes.len() as u64 });
    }
    match image::guess_format(bytes) {
        // BigTIFF (8-byte offsets): `guess_format` doesn't know it, but the TIFF decoder reads it.
        Err(_) if bytes.starts_with(b"II+\0") || bytes.starts_with(b"MM\0+") => Ok(ImageFormat::Tiff),
        Ok(format) if format == ImageFormat::Jpeg || format.reading_enabled() => Ok(format),
        _ => Err(ImageError::NotAnImage { what: look_like(bytes) }),
    }
}

/// Reads a header and refuses images that are too large.
fn open(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder + '_, ImageError> {
    let fail = |error| from_library(format, error);
    if format == ImageFormat::WebP && is_truncated_riff(bytes) {
        return Err(ImageError::Truncated { format: name(format) });
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_ALLOC);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(fail)?;
    let (width, height) = decoder.dimensions();
    check_size(name(format), width, height, u64::from(decoder.color_type().bytes_per_pixel()))?;
    Ok(decoder)
}

fn other(bytes: &[u8], format: ImageFormat) -> Result<(Pixels, Turn), ImageError> {
    let mut decoder = open(bytes, format)?;
    let turn = metadata(bytes, format, &mut decoder).turn();
    let pixels = eight_bits(DynamicImage::from_decoder(decoder).map_err(|error| from_library(format, error))?);
    let pixels = if is_colour_keyed_png(bytes, format) { pixels.into_gray_or_rgb() } else { pixels };
    Ok((pixels, turn))
}

/// The metadata of a file, for the formats that have any.
fn metadata<'a>(bytes: &'a [u8], format: ImageFormat, decoder: &mut impl ImageDecoder) -> Metadata<'a> {
    match format {
        ImageFormat::Png => Metadata::of_png(bytes),
        ImageFormat::Tiff => Metadata::of_tiff(bytes),
        ImageFormat::WebP => {
            let own = |part: image::ImageResult<Option<Vec<u8>>>| part.ok().flatten().map(Cow::from);
            Metadata { exif: own(decoder.exif_metadata()), xmp: own(decoder.xmp_metadata()) }
        }
        _ => Metadata::default(),
    }
}

/// Whether the file is shorter than its container says. A WebP stores its orientation last, so no other check would
/// notice that it is missing.
fn is_truncated_riff(bytes: &[u8]) -> bool {
    let size = bytes.get(4..).and_then(|rest| rest.first_chunk());
    size.is_none_or(|&size| bytes.len() as u64 - 8 < u64::from(u32::from_le_bytes(size)))
}

/// Whether a PNG can have one transparent colour instead of an alpha channel (its colour type is gray or RGB). Pillow
/// keeps the colours of such files unchanged.
fn is_colour_keyed_png(bytes: &[u8], format: ImageFormat) -> bool {
    format == ImageFormat::Png && matches!(bytes.get(25), Some(0 | 2))
}

fn from_library(format: ImageFormat, error: image::ImageError) -> ImageError {
    let format = name(format);
    match error {
        image::ImageError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => ImageError::Truncated { format },
        image::ImageError::Limits(e) => {
            let reason = match e.kind() {
                LimitErrorKind::DimensionError => format!("it is more than {MAX_SIDE} pixels wide or high"),
                _ => format!("it takes more than {} MiB of memory", MAX_ALLOC >> 20),
            };
            ImageError::Decode { format, reason }
        }
        error => ImageError::Decode { format, reason: account(error) },
    }
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Gif => "GIF",
        ImageFormat::WebP => "WebP",
        ImageFormat::Tiff => "TIFF",
        ImageFormat::Bmp => "BMP",
        ImageFormat::Pnm => "PNM",
        _ => "image",
    }
}

/// Converts the image to 8 bits and keeps its channels, since resizing needs alpha.
fn eight_bits(image: DynamicImage) -> Pixels {
    let (width, height) = (image.width(), image.height());
    let high = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect();
    let (colour, data) = match image {
        DynamicImage::ImageLuma8(image) => (Colour::Gray, image.into_raw()),
        DynamicImage::ImageLumaA8(image) => (Colour::GrayAlpha, image.into_raw()),
        DynamicImage::ImageRgb8(image) => (Colour::Rgb, image.into_raw()),
        DynamicImage::ImageRgba8(image) => (Colour::Rgba, image.into_raw()),
        DynamicImage::ImageLuma16(image) => (Colour::Gray, high(image.into_raw())),
        DynamicImage::ImageLumaA16(image) => (Colour::GrayAlpha, high(image.into_raw())),
        DynamicImage::ImageRgb16(image) => (Colour::Rgb, high(image.into_raw())),
        DynamicImage::ImageRgba16(image) => (Colour::Rgba, high(image.into_raw())),
        other if other.color().has_alpha() => (Colour::Rgba, other.into_rgba8().into_raw()),
        other => (Colour::Rgb, other.into_rgb8().into_raw()),
    };
    Pixels { width, height, colour, data }
}
