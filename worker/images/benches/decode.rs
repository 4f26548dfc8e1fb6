//! Measures decoding alone, and decoding with resizing and cropping to 512, one file at a time on one core.
//!
//! `cargo bench --bench decode` uses the files of the tests; with `ELBO_BENCH_IMAGES=DIR` it uses the files in a
//! directory. `python tests/peer/decode.py` runs it beside Pillow and torchvision.

#![allow(clippy::unwrap_used, reason = "a benchmark has no caller to return an error to")]

use std::fmt;
use std::path::PathBuf;

use divan::{Bencher, black_box};
use elbo_images::{Picture, Preprocessing};

/// The allocator that the program uses. A 12-megapixel image takes 36 MB, which the C library would request from the
/// system and return for every image.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct File {
    name: String,
    bytes: Vec<u8>,
}

impl fmt::Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn files() -> Vec<File> {
    let chosen = std::env::var_os("ELBO_BENCH_IMAGES").map(PathBuf::from);
    let directory = chosen
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/preprocess/real"));
    let mut files: Vec<File> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jpg" || extension == "png"))
        .map(|path| File {
            name: path.file_name().unwrap().to_string_lossy().into(),
            bytes: std::fs::read(&path).unwrap(),
        })
        .collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files
}

#[divan::bench(args = files())]
fn decode(bencher: Bencher<'_, '_>, file: &File) {
    bencher.bench(|| Picture::decode(black_box(&file.bytes)).unwrap());
}

#[divan::bench(args = files())]
fn to_512(bencher: Bencher<'_, '_>, file: &File) {
    let preprocessing = Preprocessing::stable_diffusion(512);
    bencher.bench(|| preprocessing.apply(black_box(&file.bytes)).unwrap());
}

fn main() {
    divan::main();
}
