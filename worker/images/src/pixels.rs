//! 8-bit pixels, and how to bring them upright.

use std::borrow::Cow;

use fast_image_resize::PixelType;
use image::metadata::Orientation;

/// The channels of a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    Gray,
    GrayAlpha,
    Rgb,
    Rgba,
    /// As Adobe's JPEG files store it: 255 is no ink.
    InvertedCmyk,
}

impl Colour {
    pub(crate) fn channels(self) -> usize {
        self.pixel_type().size()
    }

    pub(crate) fn pixel_type(self) -> PixelType {
        match self {
            Self::Gray => PixelType::U8,
            Self::GrayAlpha => PixelType::U8x2,
            Self::Rgb => PixelType::U8x3,
            Self::Rgba | Self::InvertedCmyk => PixelType::U8x4,
        }
    }

    pub(crate) fn has_alpha(self) -> bool {
        matches!(self, Self::GrayAlpha | Self::Rgba)
    }
}

/// 8-bit pixels, interleaved by channel, row by row.
#[derive(Debug)]
pub(crate) struct Pixels {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) colour: Colour,
    pub(crate) data: Vec<u8>,
}

impl Pixels {
    /// Converts to RGB and drops alpha.
    pub(crate) fn into_rgb(self) -> Self {
        let data = match self.colour {
            Colour::Rgb => self.data,
            Colour::Gray => triples(self.data.iter().map(|&gray| [gray; 3])),
            Colour::GrayAlpha => triples(self.data.as_chunks().0.iter().map(|&[gray, _]| [gray; 3])),
            Colour::Rgba => triples(self.data.as_chunks().0.iter().map(|&[r, g, b, _]| [r, g, b])),
            Colour::InvertedCmyk => triples(
                self.data.as_chunks().0.iter().map(|&[c, m, y, k]| [c, m, y].map(|ink| k - multiply(255 - ink, k))),
            ),
        };
        Self { colour: Colour::Rgb, data, ..self }
    }

    /// Converts to RGB and drops alpha. Gray stays gray, since one channel can be processed in place of three equal
    /// ones.
    pub(crate) fn into_gray_or_rgb(self) -> Self {
        match self.colour {
            Colour::Gray => self,
            Colour::GrayAlpha => {
                let data = self.data.as_chunks().0.iter().map(|&[gray, _]| gray).collect();
                Self { colour: Colour::Gray, data, ..self }
            }
            Colour::Rgb | Colour::Rgba | Colour::InvertedCmyk => self.into_rgb(),
        }
    }

    /// Brings the image upright.
    pub(crate) fn upright(self, turn: Turn) -> Self {
        if turn == Turn::default() {
            return self;
        }
        let (width, height) = turn.size(self.width, self.height);
        let data = match self.colour.channels() {
            1 => turned::<1>(&self, turn),
            2 => turned::<2>(&self, turn),
            3 => turned::<3>(&self, turn),
            _ => turned::<4>(&self, turn),
        };
        Self { width, height, data, ..self }
    }
}

fn triples(pixels: impl Iterator<Item = [u8; 3]>) -> Vec<u8> {
    pixels.collect::<Vec<_>>().into_flattened()
}

/// a b / 255, rounded.
fn multiply(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    ((product + (product >> 8)) >> 8) as u8
}

fn turned<const CHANNELS: usize>(pixels: &Pixels, turn: Turn) -> Vec<u8> {
    let (source, _) = pixels.data.as_chunks::<CHANNELS>();
    let (across, down) = (pixels.width as usize, pixels.height as usize);
    let (width, height) = turn.size(pixels.width, pixels.height);
    let (width, height) = (width as usize, height as usize);
    let mut target = Vec::with_capacity(width * height);
    for y in 0..height {
        let y = if turn.mirrored_y { height - 1 - y } else { y };
        // Where the row starts in the file, and the distance between its pixels.
        let (first, step) = if turn.transposed { (y, across) } else { (y * across, 1) };
        let row = source.iter().skip(first).step_by(step).take(width);
        debug_assert_eq!(row.len(), if turn.transposed { down } else { across });
        let start = target.len();
        target.extend(row);
        if turn.mirrored_x {
            target[start..].reverse();
        }
    }
    target.into_flattened()
}

/// How to bring an image upright: first transpose it, then mirror its axes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) transposed: bool,
    pub(crate) mirrored_x: bool,
    pub(crate) mirrored_y: bool,
}

impl Turn {
    /// Width and height of the upright image.
    pub(crate) fn size(self, width: u32, height: u32) -> (u32, u32) {
        if self.transposed { (height, width) } else { (width, height) }
    }
}

impl From<Orientation> for Turn {
    fn from(orientation: Orientation) -> Self {
        let (transposed, mirrored_x, mirrored_y) = match orientation {
            Orientation::NoTransforms => (false, false, false),
            Orientation::FlipHorizontal => (false, true, false),
            Orientation::Rotate180 => (false, true, true),
            Orientation::FlipVertical => (false, false, true),
            Orientation::Rotate90FlipH => (true, false, false),
            Orientation::Rotate90 => (true, true, false),
            Orientation::Rotate270FlipH => (true, true, true),
            Orientation::Rotate270 => (true, false, true),
        };
        Self { transposed, mirrored_x, mirrored_y }
    }
}

/// A readable description of bytes that are not an image.
pub(crate) fn look_like(bytes: &[u8]) -> Cow<'static, str> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)]);
    let start = text.trim_start_matches('\u{feff}').trim_start().to_lowercase();
    let signatures: [(&[u8], &str); 12] = [
        (b"%PDF", "a PDF document"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x1f\x8b", "gzip data"),
        (b"\x28\xb5\x2f\xfd", "zstd data"),
        (b"PAR1", "a Parquet file"),
        (b"8BPS", "a Photoshop document"),
        (b"\xff\x0a", "a JPEG XL image, a format that isn't supported"),
        (b"\0\0\0\x0cJXL ", "a JPEG XL image, a format that isn't supported"),
        (b"\0\0\0\x0cjP  ", "a JPEG 2000 image, a format that isn't supported"),
        (b"\0\0\x01\0", "an icon, a format that isn't supported"),
        (b"RIFF", "a RIFF file (sound or video)"),
        (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    ];
    let words = [
        ("version https://git-lfs", "a Git LFS pointer, not the file it stands for (run `git lfs pull`)"),
        ("<!doctype html", "an HTML page, perhaps an error message of the server it came from"),
        ("<html", "an HTML page, perhaps an error message of the server it came from"),
        ("<svg", "an SVG drawing, a format that isn't supported"),
        ("<?xml", "XML, perhaps an error message of the store it came from"),
        ("{", "JSON text"),
        ("[", "JSON text"),
    ];
    if let Some((_, what)) = signatures.iter().find(|(signature, _)| bytes.starts_with(signature)) {
        return Cow::Borrowed(what);
    }
    if bytes.get(4..8) == Some(b"ftyp") {
        let brand = bytes.get(8..12).unwrap_or_default().escape_ascii();
        return Cow::Owned(format!(
            "an ISO media file of brand {brand} (HEIC, AVIF or video), a format that isn't supported"
        ));
    }
    if let Some((_, what)) = words.iter().find(|(word, _)| start.starts_with(word)) {
        return Cow::Borrowed(what);
    }
    let is_text = |c: char| c != char::REPLACEMENT_CHARACTER && (!c.is_control() || c.is_whitespace());
    Cow::Borrowed(match bytes {
        _ if bytes.iter().all(|&byte| byte == 0) => "nothing but zeros",
        _ if text.chars().all(is_text) => "text",
        _ => "data of an unknown format",
    })
}
