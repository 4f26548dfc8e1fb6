//! Bytes of an image file to pixels of 8 bits.

use std::io::Cursor;

use fast_image_resize::PixelType;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{ImageError, MAX_ALLOC, MAX_SIDE};

/// Pixels of 8 bits, interleaved by channel, row by row.
pub(super) struct Pixels {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) kind: PixelType,
    pub(super) data: Vec<u8>,
}

impl Pixels {
    /// R, G and B of every pixel, without alpha.
    pub(super) fn into_rgb(self) -> Self {
        let channels = self.kind.size();
        if channels == 3 {
            return self;
        }
        let pixels = self.data.chunks_exact(channels);
        let data = match channels {
            1 | 2 => pixels.flat_map(|pixel| [pixel[0]; 3]).collect(),
            _ => pixels.flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
        };
        Self { kind: PixelType::U8x3, data, ..self }
    }
}

/// The first image of a file, upright.
pub(super) fn decode(bytes: &[u8]) -> Result<DynamicImage, ImageError> {
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
pub(super) fn eight_bits(image: DynamicImage) -> Pixels {
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
