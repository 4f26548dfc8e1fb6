//! Compares images with Pillow and torchvision, using every reference that tests/fixtures/preprocess/make.py wrote.
//!
//! `cargo test --release --test pillow -- --nocapture` prints the difference for each one.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

use std::collections::BTreeSet;
use std::path::PathBuf;

use elbo_images::{Filter, Preprocessing};

/// The largest accepted mean and maximum difference, in 1/255.
const BOUND: (f32, f32) = (1.0, 4.0);

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/preprocess")
}

/// Parses `FILE.SIZE` or `FILE.FAMILY.SIZE` into the image and its preprocessing.
fn parse(reference: &str) -> (String, Preprocessing) {
    let parts: Vec<&str> = reference.split('.').collect();
    let size = parts.last().unwrap().parse().unwrap();
    let (mean, std) = ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]);
    let preprocessing = match parts[2..] {
        [_] => Preprocessing::stable_diffusion(size),
        ["dit", _] => Preprocessing::dit(size),
        ["clip", _] => Preprocessing::clip(size, Filter::Bicubic, mean, std),
        ["clip-bilinear", _] => Preprocessing::clip(size, Filter::Bilinear, mean, std),
        ["siglip", _] => Preprocessing::siglip(size, Filter::Bicubic, [0.5; 3], [0.5; 3]),
        ["siglip-bilinear", _] => Preprocessing::siglip(size, Filter::Bilinear, [0.5; 3], [0.5; 3]),
        _ => panic!("{reference}: what is its family?"),
    };
    (parts[..2].join("."), preprocessing)
}

/// Mean and maximum of the absolute difference from a reference, in 1/255.
fn difference(image: &[u8], expected: &[u8], preprocessing: &Preprocessing) -> (f32, f32) {
    let actual = preprocessing.apply(image).unwrap();
    assert_eq!(actual.len(), expected.len());
    let Preprocessing { mean, std, .. } = preprocessing;
    let actual = actual.iter().zip((0..3).cycle()).map(|(v, c)| (v * std[c] + mean[c]) * 255.0);
    let differences = actual.zip(expected).map(|(a, e)| (a - f32::from(*e)).abs());
    let (sum, max) = differences.fold((0.0f32, 0.0f32), |(sum, max), d| (sum + d, max.max(d)));
    (sum / expected.len() as f32, max)
}

/// Compares every reference in a directory.
fn assert_all(directory: PathBuf, bound: impl Fn(&str) -> (f32, f32)) {
    let names: BTreeSet<String> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".bin").map(str::to_owned))
        .collect();
    assert!(names.len() > 25, "references are missing");
    let mut wrong = vec![];
    for name in names {
        let (image, preprocessing) = parse(&name);
        let read = |file: &str| std::fs::read(directory.join(file)).unwrap();
        let (mean, max) = difference(&read(&image), &read(&format!("{name}.bin")), &preprocessing);
        println!("{name}: mean {mean:.3}, max {max:.0}");
        let bound = bound(&name);
        if mean >= bound.0 || max >= bound.1 {
            wrong.push(format!("{name}: mean {mean:.3}, max {max:.0}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_kind_of_pixel_and_fit_matches() {
    assert_all(directory(), |_| BOUND);
}

#[test]
fn every_way_to_store_an_orientation_matches() {
    assert_all(directory().join("orientation"), |_| BOUND);
}

#[test]
fn realistic_files_match() {
    // In images at most four pixels wide, libjpeg repeats subsampled chroma from row to row, while we interpolate it.
    let narrow = |name: &str| name.starts_with("thin1x40.jpg") || name.starts_with("thin2x37.jpg");
    assert_all(directory().join("real"), |name| if narrow(name) { (1.2, 5.0) } else { BOUND });
}
