//! Resizes and crops pixels to a square.

use std::error::Error;
use std::ops::Range;

use fast_image_resize::images::Image;
use fast_image_resize::pixels::{U8, U8x2, U8x3, U8x4};
use fast_image_resize::{FilterType, MulDiv, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use crate::pixels::{Colour, Pixels, Turn};
use crate::{Filter, Fit, ImageError, MAX_SIDE};

impl Fit {
    /// The size of the whole resized image, before the crop.
    fn resized(self, width: u32, height: u32, size: u32) -> (u32, u32) {
        let long = |long: u32, short: u32| match self {
            Self::Squash => size,
            Self::CropThenRgb | Self::RgbThenCrop => (f64::from(size) * f64::from(long) / f64::from(short)) as u32,
            Self::HalveThenCrop => {
                let scale = f64::from(size) / f64::from(short);
                (f64::from(long) * scale).round_ties_even() as u32
            }
        };
        if width <= height { (size, long(height, width)) } else { (long(width, height), size) }
    }

    /// Where the centre crop starts: at half the margin. torchvision rounds it like Python, halves to even.
    fn offset(self, side: u32, size: u32) -> u32 {
        match self {
            Self::CropThenRgb => (f64::from(side - size) / 2.0).round_ties_even() as u32,
            Self::RgbThenCrop | Self::HalveThenCrop | Self::Squash => (side - size) / 2,
        }
    }
}

/// Brings the image upright, resizes it and crops it to `size` x `size`.
///
/// Computes only the part of the resized image that the crop keeps, from all pixels that contribute to it. The result
/// is the same as resizing and then cropping, but an extreme aspect ratio doesn't increase the cost.
pub(crate) fn fit_to(pixels: Pixels, turn: Turn, size: u32, fit: Fit, filter: Filter) -> Result<Pixels, ImageError> {
    let (width, height) = turn.size(pixels.width, pixels.height);
    let fail = |reason: String| ImageError::Resize { width, height, size, reason };
    if !(1..=MAX_SIDE).contains(&size) {
        return Err(fail("no such size is possible".into()));
    }
    let (pixels, turn) = match fit {
        Fit::HalveThenCrop => (halved(pixels.upright(turn), size), Turn::default()),
        _ => (pixels, turn),
    };
    let (width, height) = turn.size(pixels.width, pixels.height);
    let (new_width, new_height) = fit.resized(width, height, size);
    let (left, top) = (fit.offset(new_width, size), fit.offset(new_height, size));
    if (new_width, new_height) == (width, height) {
        return Ok(crop(&pixels.upright(turn), left, top, size));
    }
    let columns = source_span(left, size, width, new_width);
    let rows = source_span(top, size, height, new_height);
    let filter = match filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
    };
    convolve(pixels, turn, columns, rows, size, filter).map_err(|e| fail(e.to_string()))
}

/// Halves the image while its short side is at least twice `size`.
fn halved(mut pixels: Pixels, size: u32) -> Pixels {
    while pixels.width.min(pixels.height) >= 2 * size {
        pixels = halve(&pixels);
    }
    pixels
}

/// Pillow's BOX filter to half the width and height, rounded down. Every pixel is the average of two or three per
/// direction.
fn halve(pixels: &Pixels) -> Pixels {
    let data = match pixels.colour.channels() {
        1 => halve_channels::<1>(pixels),
        2 => halve_channels::<2>(pixels),
        3 => halve_channels::<3>(pixels),
        _ => halve_channels::<4>(pixels),
    };
    Pixels { width: pixels.width / 2, height: pixels.height / 2, colour: pixels.colour, data }
}

fn halve_channels<const CHANNELS: usize>(pixels: &Pixels) -> Vec<u8> {
    let (columns, rows) = (averaged(pixels.width, pixels.width / 2), averaged(pixels.height, pixels.height / 2));
    let mut narrow: Vec<[u8; CHANNELS]> = Vec::with_capacity(columns.len() * pixels.height as usize);
    for row in pixels.data.as_chunks().0.chunks_exact(pixels.width as usize) {
        narrow.extend(columns.iter().map(|span| match row[span.clone()] {
            [a, b] => std::array::from_fn(|c| average_of_two(a[c], b[c])),
            ref several => std::array::from_fn(|c| average(several.iter().map(|pixel: &[u8; CHANNELS]| pixel[c]))),
        }));
    }
    let (narrow, stride) = (narrow.as_flattened(), columns.len() * CHANNELS);
    let mut data = Vec::with_capacity(rows.len() * stride);
    for span in rows {
        let lines = &narrow[span.start * stride..span.end * stride];
        if span.len() == 2 {
            let (first, second) = lines.split_at(stride);
            data.extend(first.iter().zip(second).map(|(&a, &b)| average_of_two(a, b)));
        } else {
            data.extend((0..stride).map(|i| average(lines[i..].iter().step_by(stride).copied())));
        }
    }
    data
}

/// For each of `to` pixels, the range of the `from` pixels it averages.
///
/// If a pixel's centre lies on the border between two averages, rounding decides, so this repeats Pillow's arithmetic.
fn averaged(from: u32, to: u32) -> Vec<Range<usize>> {
    let scale = f64::from(from) / f64::from(to);
    let (support, inverse) = (0.5 * scale, 1.0 / scale);
    let span = |i: u32| {
        let center = (f64::from(i) + 0.5) * scale;
        let inside = |x: &u32| {
            let distance = (f64::from(*x) - center + 0.5) * inverse;
            distance > -0.5 && distance <= 0.5
        };
        let (first, end) = ((center - support + 0.5) as u32, ((center + support + 0.5) as u32).min(from));
        let first = (first..end).find(inside).unwrap_or(first);
        let len = (first..end).take_while(inside).count();
        first as usize..first as usize + len
    };
    (0..to).map(span).collect()
}

/// [`average`] of two values, the usual case.
fn average_of_two(a: u8, b: u8) -> u8 {
    (u16::from(a) + u16::from(b)).div_ceil(2) as u8
}

/// The mean, halves rounded up.
fn average(values: impl ExactSizeIterator<Item = u8>) -> u8 {
    let count = values.len().max(1) as u32;
    ((values.map(u32::from).sum::<u32>() + count / 2) / count) as u8
}

/// Resamples the given spans of the upright image's columns and rows to `size` x `size`: first horizontally, then
/// vertically, with an 8-bit intermediate result.
///
/// This is Pillow's order. The library's own order for 8 bits is the opposite, which clips different overshoots at
/// sharp edges. The image is turned between the two steps, when it has the fewest pixels. So the horizontal direction
/// may be vertical, or run backwards, in the file.
fn convolve(
    pixels: Pixels,
    turn: Turn,
    columns: (f64, f64),
    rows: (f64, f64),
    size: u32,
    filter: FilterType,
) -> Result<Pixels, Box<dyn Error>> {
    let Pixels { width, height, colour, data } = pixels;
    let kind = colour.pixel_type();
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
    let mut source = Image::from_vec_u8(width, height, data, kind)?;
    match colour {
        Colour::GrayAlpha => multiply_by_alpha::<U8x2>(&mut source)?,
        Colour::Rgba => multiply_by_alpha::<U8x4>(&mut source)?,
        Colour::Gray | Colour::Rgb | Colour::InvertedCmyk => {}
    }
    let (across, down) = turn.size(width, height);
    let start = if turn.mirrored_x { f64::from(across) - columns.0 - columns.1 } else { columns.0 };
    let (mut narrow, span) = if turn.transposed {
        (Image::new(width, size, kind), options.crop(0.0, start, f64::from(width), columns.1))
    } else {
        (Image::new(size, height, kind), options.crop(start, 0.0, columns.1, f64::from(height)))
    };
    resample(&source, &mut narrow, colour, &span)?;
    let (width, height) = (narrow.width(), narrow.height());
    let narrow = Pixels { width, height, colour, data: narrow.into_vec() }.upright(turn);
    let narrow = Image::from_vec_u8(size, down, narrow.data, kind)?;
    let mut target = Image::new(size, size, kind);
    resample(&narrow, &mut target, colour, &options.crop(0.0, rows.0, f64::from(size), rows.1))?;
    let mut data = target.into_vec();
    if colour.has_alpha() {
        data.chunks_exact_mut(colour.channels()).for_each(divide_by_alpha);
    }
    Ok(Pixels { width: size, height: size, colour, data })
}

/// Resamples an image with pixels of 8 bits. By their types, so that the library's code for other pixels is not compiled.
fn resample(
    source: &Image<'_>,
    target: &mut Image<'_>,
    colour: Colour,
    options: &ResizeOptions,
) -> Result<(), Box<dyn Error>> {
    match colour {
        Colour::Gray => resample_typed::<U8>(source, target, options),
        Colour::GrayAlpha => resample_typed::<U8x2>(source, target, options),
        Colour::Rgb => resample_typed::<U8x3>(source, target, options),
        Colour::Rgba | Colour::InvertedCmyk => resample_typed::<U8x4>(source, target, options),
    }
}

fn resample_typed<P: PixelTrait>(
    source: &Image<'_>,
    target: &mut Image<'_>,
    options: &ResizeOptions,
) -> Result<(), Box<dyn Error>> {
    let source = source.typed_image::<P>().ok_or("pixels of another type")?;
    let mut target = target.typed_image_mut::<P>().ok_or("pixels of another type")?;
    Ok(Resizer::new().resize_typed(&source, &mut target, options)?)
}

fn multiply_by_alpha<P: PixelTrait>(image: &mut Image<'_>) -> Result<(), Box<dyn Error>> {
    let mut image = image.typed_image_mut::<P>().ok_or("pixels of another type")?;
    Ok(MulDiv::new().multiply_alpha_inplace_typed(&mut image)?)
}

/// Undoes the premultiplication of one pixel. It rounds down as Pillow does, since dividing by alpha amplifies rounding
/// differences.
fn divide_by_alpha(pixel: &mut [u8]) {
    if let Some((&mut alpha @ 1..=254, colours)) = pixel.split_last_mut() {
        for colour in colours {
            *colour = (u16::from(*colour) * 255 / u16::from(alpha)).min(255) as u8;
        }
    }
}

/// On an axis resized from `from` to `to` pixels: start and length, in source pixels, of the `size` pixels from `start`
/// on.
fn source_span(start: u32, size: u32, from: u32, to: u32) -> (f64, f64) {
    let from = f64::from(from);
    let scale = from / f64::from(to);
    let start = f64::from(start) * scale;
    (start, (f64::from(size) * scale).min(from - start))
}

fn crop(pixels: &Pixels, left: u32, top: u32, size: u32) -> Pixels {
    let channels = pixels.colour.channels();
    let (stride, row) = (pixels.width as usize * channels, size as usize * channels);
    let first = top as usize * stride + left as usize * channels;
    let rows = (0..size as usize).map(|y| first + y * stride);
    let data = rows.flat_map(|start| &pixels.data[start..start + row]).copied().collect();
    Pixels { width: size, height: size, colour: pixels.colour, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_rounded_as_each_family_does() {
        // round(0.5) = 0, round(1.5) = 2, round(2.5) = 2, round(2) = 2.
        assert_eq!([33, 35, 37, 36].map(|side| Fit::CropThenRgb.offset(side, 32)), [0, 2, 2, 2]);
        assert_eq!([33, 35, 37, 36].map(|side| Fit::RgbThenCrop.offset(side, 32)), [0, 1, 2, 2]);
    }

    #[test]
    fn the_long_side_is_rounded_as_each_family_does() {
        // 32 * 333 / 100 = 106.56.
        let sizes =
            [Fit::CropThenRgb, Fit::RgbThenCrop, Fit::HalveThenCrop, Fit::Squash].map(|fit| fit.resized(100, 333, 32));
        assert_eq!(sizes, [(32, 106), (32, 106), (32, 107), (32, 32)]);
    }
}
