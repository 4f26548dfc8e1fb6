//! Finds how to bring an image upright, like Pillow's `ImageOps.exif_transpose` (`Image.getexif` of Pillow 13).
//!
//! EXIF is read from every place where a format can store it, including a PNG's text chunks, as ImageMagick and
//! exiftool write it. If EXIF has no orientation, XMP's is used. An orientation may be a number of any type; if it is
//! bytes or text, the image is not turned. Damaged metadata is ignored: it is no reason to reject an image.

use std::borrow::Cow;

use image::metadata::Orientation;

use crate::pixels::Turn;
use crate::tiff::Directory;

/// The tag of the orientation in EXIF and TIFF.
const ORIENTATION: u16 = 274;
/// The tag of XMP in TIFF.
const XMP: u16 = 700;
/// Maximum size of a decompressed text in a PNG, in bytes.
const MAX_TEXT: usize = 1 << 20;

/// A file's metadata.
#[derive(Debug, Default)]
pub(crate) struct Metadata<'a> {
    /// Itself a TIFF file, perhaps with a prefix.
    pub(crate) exif: Option<Cow<'a, [u8]>>,
    /// XML.
    pub(crate) xmp: Option<Cow<'a, [u8]>>,
}

impl<'a> Metadata<'a> {
    /// How to turn the picture.
    pub(crate) fn turn(&self) -> Turn {
        let field = self.exif.as_deref().and_then(|exif| Directory::first(unmarked(exif))?.find(ORIENTATION));
        let value = match field {
            Some(field) => field.number(),
            None => self.xmp.as_deref().and_then(orientation_in_xmp),
        };
        value.and_then(|value| Orientation::from_exif(u8::try_from(value).ok()?)).map_or_else(Turn::default, Turn::from)
    }

    /// The metadata of a TIFF.
    pub(crate) fn of_tiff(bytes: &'a [u8]) -> Self {
        let xmp = Directory::first(bytes).and_then(|directory| directory.find(XMP)?.bytes());
        Self { exif: Some(bytes.into()), xmp: xmp.map(Cow::from) }
    }

    /// The metadata of a PNG, from chunks before and after the pixels.
    pub(crate) fn of_png(bytes: &'a [u8]) -> Self {
        let (mut found, mut profile, mut has_pixels) = (Self::default(), None, false);
        let mut rest = bytes.get(8..).unwrap_or_default();
        while let Some((kind, data, following)) = chunk(rest) {
            rest = following;
            match kind {
                b"IEND" => break,
                b"IDAT" => has_pixels = true,
                // The next frame of an animation.
                b"fcTL" if has_pixels => break,
                b"eXIf" => found.exif = Some(data.into()),
                b"tEXt" | b"zTXt" | b"iTXt" => match text(kind, data) {
                    Some((b"XML:com.adobe.xmp", xmp)) => found.xmp = Some(xmp),
                    Some((b"Raw profile type exif", hex)) => profile = Some(hex),
                    _ => {}
                },
                _ => {}
            }
        }
        found.exif = found.exif.or_else(|| profile.as_deref().and_then(raw_profile).map(Cow::from));
        found
    }
}

/// EXIF without the prefix that JPEG puts before it and some programs add in other formats.
fn unmarked(exif: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"Exif\0\0";
    let once = exif.strip_prefix(MARK).unwrap_or(exif);
    once.strip_prefix(MARK).unwrap_or(once)
}

/// The digit of `tiff:Orientation="6"` or `<tiff:Orientation>6</tiff:Orientation>`.
fn orientation_in_xmp(xmp: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"tiff:Orientation";
    let after = xmp.windows(NAME.len()).enumerate().filter(|(_, window)| *window == NAME);
    let mut values = after.map(|(at, _)| {
        let rest = &xmp[at + NAME.len()..];
        rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?.first().copied()
    });
    values.find_map(|value| value.filter(u8::is_ascii_digit)).map(|digit| u64::from(digit - b'0'))
}

/// The first chunk of the rest of a PNG: its kind, its data and the bytes after it.
fn chunk(rest: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (kind, rest) = rest.split_at_checked(4)?;
    let (data, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    Some((kind, data, rest.get(4..)?))
}

/// Keyword and text of a PNG's text chunk.
fn text<'a>(kind: &[u8], data: &'a [u8]) -> Option<(&'a [u8], Cow<'a, [u8]>)> {
    let (keyword, rest) = split_at_zero(data)?;
    let text = match kind {
        b"tEXt" => rest.into(),
        b"zTXt" => inflate(rest.strip_prefix(&[0])?)?,
        _ => {
            let (flags, rest) = rest.split_first_chunk::<2>()?;
            let (_language, rest) = split_at_zero(rest)?;
            let (_translated, rest) = split_at_zero(rest)?;
            match flags {
                [0, _] => rest.into(),
                [_, 0] => inflate(rest)?,
                _ => return None,
            }
        }
    };
    Some((keyword, text))
}

fn split_at_zero(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|&byte| byte == 0)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

fn inflate<'a>(bytes: &[u8]) -> Option<Cow<'a, [u8]>> {
    miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(bytes, MAX_TEXT).ok().map(Cow::from)
}

/// The bytes of an ImageMagick profile: an empty line, its name, its length, then hexadecimal digits.
fn raw_profile(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.splitn(4, |&byte| byte == b'\n').nth(3)?;
    let digits: Option<Vec<u8>> = digits
        .iter()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|&byte| char::from(byte).to_digit(16).map(|digit| digit as u8))
        .collect();
    let (pairs, rest) = digits.as_deref()?.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xmp_is_read_as_an_attribute_or_an_element() {
        assert_eq!(orientation_in_xmp(b"<x tiff:Orientation=\"6\"/>"), Some(6));
        assert_eq!(orientation_in_xmp(b"<tiff:Orientation>8</tiff:Orientation>"), Some(8));
        assert_eq!(orientation_in_xmp(b"tiff:Orientation='3' tiff:Orientation=\"x tiff:Orientation>2"), Some(2));
        assert_eq!(orientation_in_xmp(b"tiff:Orientation=\""), None);
    }

    #[test]
    fn a_raw_profile_is_hexadecimal_after_three_lines() {
        assert_eq!(raw_profile(b"\nexif\n       3\n4d4D\n00\n").as_deref(), Some(&b"MM\0"[..]));
        for damaged in [&b"\nexif\n3\n4d4"[..], b"\nexif\n3\n4d4g", b"\nexif\n3", b""] {
            assert_eq!(raw_profile(damaged), None);
        }
    }

    #[test]
    fn compressed_text_above_the_limit_is_not_read() {
        let bomb = miniz_oxide::deflate::compress_to_vec_zlib(&vec![b'0'; MAX_TEXT + 1], 6);
        assert!(inflate(&bomb).is_none());
    }
}
