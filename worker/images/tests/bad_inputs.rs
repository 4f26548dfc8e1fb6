//! Files that are not images, or only part of one, give an error that says so; never a panic, a hang, or a partly gray
//! picture.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

use std::path::PathBuf;
use std::time::{Duration, Instant};

use elbo_images::{ImageError, MAX_FILE_BYTES, MAX_SIDE, Preprocessing};

/// A file of every format and every compression.
const FILES: [&str; 18] = [
    "jpeg420.jpg",
    "progressive.jpg",
    "luma_progressive.jpg",
    "restart.jpg",
    "cmyk_photo.jpg",
    "ycck.jpg",
    "exif6.jpg",
    "rgba16.png",
    "interlaced.png",
    "palette_alpha.png",
    "exif6.png",
    "photo.webp",
    "alpha_photo.webp",
    "exif5.webp",
    "photo.gif",
    "photo.bmp",
    "photo.tiff",
    "photo.ppm",
];

fn file(name: &str) -> Vec<u8> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/preprocess/real");
    std::fs::read(directory.join(name)).unwrap()
}

fn apply(bytes: &[u8]) -> Result<Vec<f32>, ImageError> {
    Preprocessing::stable_diffusion(12).apply(bytes)
}

/// The error for a file that can't be decoded.
fn error(bytes: &[u8]) -> String {
    let error = apply(bytes).unwrap_err();
    assert!(!matches!(error, ImageError::Resize { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("remove it from the dataset"), "{error}");
    error
}

#[test]
fn a_truncated_file_is_an_error_wherever_it_ends() {
    for name in FILES {
        let whole = file(name);
        let expected = apply(&whole).unwrap();
        let step = whole.len() / 150 + 1;
        let ends = (1..whole.len()).step_by(step).chain(whole.len().saturating_sub(40)..whole.len());
        for end in ends {
            match apply(&whole[..end]) {
                Err(error) => assert!(!matches!(error, ImageError::Resize { .. }), "{name} to {end}: {error}"),
                // The last bytes may not belong to the picture.
                Ok(values) => {
                    assert!(values == expected, "{name}: {end} of {} bytes are taken for an image", whole.len())
                }
            }
        }
        error(&whole[..whole.len() / 2]);
    }
    assert!(error(&file("jpeg420.jpg")[..5000]).contains("JPEG): the file is truncated"));
    assert!(error(&file("photo.ppm")[..900]).contains("PNM): the file is truncated"));
}

#[test]
fn a_cut_jpeg_with_an_end_marker_is_damaged() {
    for name in ["jpeg420.jpg", "jpeg444.jpg", "restart.jpg", "luma.jpg", "cmyk_photo.jpg"] {
        let whole = file(name);
        for end in [1000, whole.len() / 2, whole.len() - 200] {
            assert!(error(&[&whole[..end], &[0xFF, 0xD9]].concat()).contains("JPEG"), "{name}");
        }
    }
}

#[test]
fn data_after_an_image_is_ignored() {
    for name in FILES {
        let whole = file(name);
        let expected = apply(&whole).unwrap();
        // A truncated second image, since cameras append previews, and plain garbage.
        for tail in [&file("jpeg420.jpg")[..3000], &[0xFF; 100], b"\0\0trailing"] {
            assert!(apply(&[&whole, tail].concat()).unwrap() == expected, "{name}");
        }
    }
}

#[test]
fn damage_never_panics() {
    for name in FILES {
        let mut bytes = file(name);
        let step = bytes.len() / 100 + 1;
        for at in (0..bytes.len().min(64)).chain((64..bytes.len()).step_by(step)) {
            let original = bytes[at];
            for damaged in [0, 0xFF, original ^ 0x10] {
                bytes[at] = damaged;
                match apply(&bytes) {
                    Ok(values) => assert_eq!(values.len(), 12 * 12 * 3),
                    Err(error) => assert!(!matches!(error, ImageError::Resize { .. }), "{error}"),
                }
            }
            bytes[at] = original;
        }
    }
}

#[test]
fn the_error_says_what_the_file_is_instead() {
    for (bytes, expected) in [
        (&b""[..], "the file is empty"),
        (b"\n<!DOCTYPE html><html>403 Forbidden</html>", "an HTML page"),
        (b"<html><body>not found", "an HTML page"),
        (b"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>", "XML"),
        (b"{\"error\": \"not found\"}", "JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"hello, world", "the file is text"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "brand heic"),
        (b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>", "an SVG drawing"),
        (&[0; 4096], "nothing but zeros"),
        (b"\x93\x01\x80\xFE\x7F", "an unknown format"),
        (b"\xFF\xD8\xFF", "JPEG): the file is truncated"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
    ] {
        let error = error(bytes);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn errors_quote_headers_briefly_and_without_control_characters() {
    let long = "9".repeat(10_000);
    for header in [format!("P6 {long} 1 255 "), format!("P7\nWIDTH {long}\n"), "P7\n\u{1b}[31mWIDTH 1\n".to_owned()] {
        let error = error(header.as_bytes());
        assert!(error.len() < 500 && !error.contains(char::is_control), "{error:?}");
    }
}

#[test]
fn a_file_may_not_be_larger_than_the_limit() {
    let mut bytes = file("photo.bmp");
    bytes.resize(MAX_FILE_BYTES + 1, 0);
    assert!(error(&bytes).contains("bytes, more than"));
    bytes.truncate(MAX_FILE_BYTES);
    apply(&bytes).unwrap();
}

/// A PNG that claims a size but holds one compressed, empty row.
fn png(width: u32, height: u32, colour: u8) -> Vec<u8> {
    // The other checksums stay the fixture's. A decoder that checks them fails too, which is fine here.
    let mut bytes = file("rgba16.png");
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    bytes[24] = 8;
    bytes[25] = colour;
    let checksum = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

#[test]
fn claimed_sizes_are_checked_before_memory_is_allocated() {
    let start = Instant::now();
    let mut gif = file("photo.gif");
    gif[6..10].fill(0xFF);
    let mut jpeg = file("jpeg420.jpg");
    let frame = jpeg.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0x7F);
    let mut progressive = file("progressive.jpg");
    let frame = progressive.windows(2).position(|pair| pair == [0xFF, 0xC2]).unwrap();
    // 8192 x 8192: the pixels would fit, but the coefficients don't.
    progressive[frame + 5..frame + 9].copy_from_slice(&[0x20, 0, 0x20, 0]);
    let mut bmp = file("photo.bmp");
    bmp[18..22].copy_from_slice(&16_000u32.to_le_bytes());
    bmp[22..26].copy_from_slice(&16_000u32.to_le_bytes());
    let mut webp = file("alpha_photo.webp");
    assert_eq!(&webp[12..16], b"VP8X");
    webp[24..30].fill(0xFF);
    for (bytes, what) in [
        (png(16_384, 16_384, 0), "PNG: more pixels than allowed"),
        (png(16_384, 10_000, 6), "PNG: more memory than allowed"),
        (png(u32::MAX >> 1, 1, 0), "PNG: too wide"),
        (png(0, 1, 0), "PNG: no width"),
        (b"P6 100000 100000 255 ".to_vec(), "PNM: too large"),
        (b"P6 16384 16384 255 ".to_vec(), "PNM: more pixels than allowed"),
        (b"P5 17000 1 255 ".to_vec(), "PNM: too wide"),
        (gif, "GIF"),
        (jpeg, "JPEG"),
        (progressive, "JPEG: coefficients"),
        (bmp, "BMP"),
        (webp, "WebP"),
    ] {
        let error = error(&bytes);
        println!("{what}: {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(5), "memory was allocated and filled");
}

#[test]
fn a_size_within_the_limits_without_the_pixels_is_an_error() {
    error(&png(9_000, 9_000, 2));
    error(b"P6 10000 10000 255 abc");
}

#[test]
fn an_extreme_aspect_ratio_costs_no_more_than_the_crop() {
    let mut line = b"P5 16384 1 255 ".to_vec();
    line.extend((0..16384).map(|x| (x / 64) as u8));
    assert_eq!(Preprocessing::stable_diffusion(512).apply(&line).unwrap().len(), 512 * 512 * 3);
}

#[test]
fn impossible_sizes_fail_at_the_preprocess_stage() {
    for size in [0, MAX_SIDE + 1] {
        let error = Preprocessing::stable_diffusion(size).apply(&file("photo.ppm")).unwrap_err();
        assert!(matches!(error, ImageError::Resize { .. }), "{error}");
    }
}

#[test]
fn values_span_minus_one_to_one() {
    let stable_diffusion = Preprocessing::stable_diffusion(1);
    assert_eq!(stable_diffusion.apply(b"P5 2 1 255 \x00\xFF").unwrap(), [-1.0; 3]);
    assert_eq!(stable_diffusion.apply(b"P5 1 2 255 \xFF\x00").unwrap(), [1.0; 3]);
}

#[test]
fn the_memory_of_a_picture_is_known_from_its_header() {
    let preprocessing = Preprocessing::stable_diffusion(12);
    for name in FILES {
        let whole = file(name);
        let pixels = apply(&whole).unwrap().len() as u64;
        let memory = preprocessing.memory(&whole).unwrap();
        assert!((pixels * 5..64 << 20).contains(&memory), "{name}: {memory}");
        for end in [0, 1, 20, whole.len() / 2] {
            // `memory` refuses only files that can't be decoded, for the same reason.
            let (known, tried) = (preprocessing.memory(&whole[..end]), apply(&whole[..end]));
            if let Err(known) = known {
                assert_eq!(known.to_string(), tried.unwrap_err().to_string(), "{name} to {end}");
            }
        }
    }
    let ppm = |channels: &str, side: usize| preprocessing.memory(format!("P{channels} {side} {side} 255\n").as_bytes());
    let (gray, colour) = (ppm("5", 4_000).unwrap(), ppm("6", 4_000).unwrap());
    assert!((16_000_000..18_000_000).contains(&gray) && (48_000_000..53_000_000).contains(&colour), "{gray} {colour}");
}
