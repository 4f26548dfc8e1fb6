//! Decodes JPEG with zune-jpeg directly, not through the `image` crate, which copies the file, reads its headers two
//! more times, fills damaged parts with gray, and converts CMYK to RGB before we can resize it.
//!
//! Walking the markers detects a file that ends before its image does. The decoder detects a file that was cut and then
//! closed with an end marker, unless only the last few blocks are missing. A progressive file that was cut this way is
//! a coarser picture, and we accept it as libjpeg does.

use std::borrow::Cow;
use std::ops::Range;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::orientation::Metadata;
use crate::pixels::{Colour, Pixels, Turn};
use crate::{Extent, ImageError, account, check_size};

/// Reads from a JPEG's headers how much memory decoding takes.
pub(crate) fn probe(bytes: &[u8]) -> Result<Extent, ImageError> {
    let outline = Outline::of(bytes);
    let Header { width, height, colour, .. } = Header::read(&mut decoder(bytes, &outline), &outline)?;
    let (width, height, channels) = (width as u32, height as u32, colour.channels() as u64);
    let pixels = u64::from(width) * u64::from(height);
    let copied = if outline.is_baseline() { bytes.len() as u64 } else { 0 };
    Ok(Extent { width, height, channels, decoding: pixels * channels * outline.bytes_per_value() + copied })
}

/// Decodes the pixels of a JPEG and finds how to bring them upright.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Pixels, Turn), ImageError> {
    let outline = Outline::of(bytes);
    let turn = outline.metadata(bytes).turn();
    let bytes = match outline.end {
        // At an end marker the decoder fills in missing data; at the end of the input it fails. So cut the end marker
        // off, and pad with zeros because the decoder reads eight bytes ahead.
        Some(end) if outline.is_baseline() => Cow::Owned([&bytes[..end], &[0; 16]].concat()),
        _ => Cow::Borrowed(bytes),
    };
    let mut decoder = decoder(&bytes, &outline);
    let Header { width, height, stored, colour, wanted } = Header::read(&mut decoder, &outline)?;
    decoder.set_options(outline.options().jpeg_set_out_colorspace(wanted));
    let mut data = decoder.decode().map_err(|e| fail(account(e)))?;
    if data.len() != width * height * colour.channels() {
        return Err(fail("its picture has another size than its header says".into()));
    }
    if stored == ColorSpace::YCCK {
        data.as_chunks_mut().0.iter_mut().for_each(ycck_to_inverted_cmyk);
    }
    let pixels = Pixels { width: width as u32, height: height as u32, colour, data };
    Ok((pixels, turn))
}

fn fail(reason: String) -> ImageError {
    ImageError::Decode { format: "JPEG", reason }
}

fn decoder<'a>(bytes: &'a [u8], outline: &Outline) -> JpegDecoder<ZCursor<&'a [u8]>> {
    JpegDecoder::new_with_options(ZCursor::new(bytes), outline.options())
}

/// The picture as the headers describe it.
struct Header {
    width: usize,
    height: usize,
    stored: ColorSpace,
    colour: Colour,
    /// The colour space to request from the decoder.
    wanted: ColorSpace,
}

impl Header {
    /// Reads the headers and refuses truncated or too large images.
    fn read(decoder: &mut JpegDecoder<ZCursor<&[u8]>>, outline: &Outline) -> Result<Self, ImageError> {
        if outline.end.is_none() {
            return Err(ImageError::Truncated { format: "JPEG" });
        }
        decoder.decode_headers().map_err(|e| fail(account(e)))?;
        let (Some((width, height)), Some(stored)) = (decoder.dimensions(), decoder.input_colorspace()) else {
            return Err(fail("it has no picture".into()));
        };
        let (colour, wanted) = match stored {
            ColorSpace::Luma => (Colour::Gray, stored),
            ColorSpace::CMYK | ColorSpace::YCCK => (Colour::InvertedCmyk, stored),
            ColorSpace::RGB | ColorSpace::YCbCr => (Colour::Rgb, ColorSpace::RGB),
            other => return Err(fail(format!("colours stored as {other:?} are not supported"))),
        };
        let bytes_per_pixel = colour.channels() as u64 * outline.bytes_per_value();
        check_size("JPEG", width as u32, height as u32, bytes_per_pixel)?;
        Ok(Self { width, height, stored, colour, wanted })
    }
}

/// Converts luma and chroma to C, M and Y (JFIF, in 16-bit fixed point like libjpeg); ink is 255 - RGB.
fn ycck_to_inverted_cmyk(pixel: &mut [u8; 4]) {
    let [y, cb, cr] = [pixel[0], pixel[1], pixel[2]].map(i32::from);
    let (cb, cr, half) = (cb - 128, cr - 128, 1 << 15);
    let r = y + ((91_881 * cr + half) >> 16);
    let g = y + ((-22_554 * cb - 46_802 * cr + half) >> 16);
    let b = y + ((116_130 * cb + half) >> 16);
    for (value, colour) in pixel.iter_mut().zip([r, g, b]) {
        *value = 255 - colour.clamp(0, 255) as u8;
    }
}

/// What the markers of a file tell without decoding it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outline {
    /// Where the image's end marker is, if there is one. Data after it is ignored.
    end: Option<usize>,
    progressive: bool,
    /// Whether there are stray bytes between segments.
    padded: bool,
    scans: u32,
    /// Where EXIF and XMP are, in parts of at most 64 KB.
    application: Vec<Range<usize>>,
}

/// The start of EXIF data in a JPEG.
const EXIF: &[u8] = b"Exif\0\0";
/// The start of XMP data in a JPEG.
const XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";

impl Outline {
    fn is_baseline(&self) -> bool {
        self.scans == 1 && !self.progressive
    }

    /// If a picture has several scans, the decoder keeps the coefficients, two bytes each, until the last scan.
    fn bytes_per_value(&self) -> u64 {
        if self.scans > 1 { 3 } else { 1 }
    }

    /// EXIF, joined if it is stored in several parts, and the last XMP.
    fn metadata<'a>(&self, bytes: &'a [u8]) -> Metadata<'a> {
        let parts = || self.application.iter().map(|part| &bytes[part.clone()]);
        let exif: Vec<&[u8]> = parts().filter_map(|part| part.strip_prefix(EXIF)).collect();
        let exif = match exif[..] {
            [] => None,
            [one] => Some(one.into()),
            _ => Some(exif.concat().into()),
        };
        let xmp = parts().filter_map(|part| part.strip_prefix(XMP)).next_back();
        Metadata { exif, xmp: xmp.map(Cow::from) }
    }

    /// Strict, so that damage within the picture is an error and not gray pixels. If there are stray bytes between the
    /// headers, which every program skips, strict mode is off.
    fn options(&self) -> DecoderOptions {
        DecoderOptions::default()
            .set_strict_mode(!self.padded)
            .set_max_width(usize::from(u16::MAX))
            .set_max_height(usize::from(u16::MAX))
    }

    /// Walks from segment to segment (ITU T.81, annex B), since the decoder would accept the end of the file as the end
    /// of the image.
    fn of(bytes: &[u8]) -> Self {
        let mut outline = Self::default();
        let mut rest = bytes.get(2..).unwrap_or_default();
        while let Some(start) = rest.iter().position(|&byte| byte == 0xFF) {
            outline.padded |= start > 0;
            rest = &rest[start..];
            // A marker may be preceded by any number of FF bytes.
            let position = bytes.len() - rest.len();
            let Some(fill) = rest.iter().position(|&byte| byte != 0xFF) else { break };
            let marker = rest[fill];
            rest = &rest[fill + 1..];
            match marker {
                0xD9 => {
                    outline.end = Some(position).filter(|_| outline.scans > 0);
                    break;
                }
                0xC2 => outline.progressive = true,
                0x00 | 0x01 | 0xD0..=0xD8 => continue,
                _ => {}
            }
            let Some(&[high, low]) = rest.first_chunk() else { break };
            let length = usize::from(u16::from_be_bytes([high, low]));
            let Some(after) = rest.get(length..) else { break };
            if marker == 0xE1 && outline.scans == 0 && length > 2 {
                let start = bytes.len() - rest.len();
                outline.application.push(start + 2..start + length);
            }
            rest = after;
            if marker == 0xDA {
                outline.scans += 1;
                rest = after_scan(rest);
            }
        }
        outline
    }
}

/// Skips compressed data, in which a byte FF is followed by 00 or a restart marker, and returns the rest.
fn after_scan(mut rest: &[u8]) -> &[u8] {
    while let Some(position) = rest.iter().position(|&byte| byte == 0xFF) {
        match rest.get(position + 1) {
            Some(0x00 | 0xD0..=0xD7) => rest = &rest[position + 2..],
            _ => return &rest[position..],
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &[u8] = &[0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 0xFF, 0xD9, 0xFF, 0xDA, 0, 3, 7];

    fn outline(tail: &[u8]) -> Outline {
        Outline::of(&[HEADER, tail].concat())
    }

    #[test]
    fn an_end_marker_counts_only_where_a_scan_ends() {
        // An end marker within a segment is data, and so is FF 00 in a scan. Restart markers don't end a scan.
        assert_eq!(outline(&[1, 0xFF, 0x00, 0xD9, 0xFF, 0xD0, 5]).end, None);
        let complete = Outline { end: Some(HEADER.len() + 4), scans: 1, ..Outline::default() };
        assert_eq!(outline(&[1, 0xFF, 0xD7, 5, 0xFF, 0xD9]), complete);
        assert_eq!(outline(&[1, 0xFF, 0xD7, 5, 0xFF, 0xFF, 0xD9, 0xFF, 0xDA]), complete);
        assert_eq!(outline(&[1, 0xFF, 0xDA, 0, 3, 7, 1, 0xFF]).end, None);
    }

    #[test]
    fn bytes_between_segments_are_noticed() {
        let outline = outline(&[1, 0xFF, 0xC2, 0, 2, 9, 9, 0xFF, 0xDA, 0, 3, 7, 1, 0xFF, 0xD9]);
        assert_eq!(
            outline,
            Outline { end: Some(HEADER.len() + 13), progressive: true, padded: true, scans: 2, ..Outline::default() }
        );
    }
}
