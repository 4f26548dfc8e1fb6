//! The noise of every slot. It is counter-based, so that every machine draws the same epsilon at any time.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

/// Whether samples share noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseScope {
    /// Each sample has its own noise, drawn from its key.
    Sample,
    /// All samples of the job share one noise per slot.
    Shared,
}

/// Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Two standard normals from two uniform words (Box-Muller in f32).
///
/// Uses `libm` instead of the platform's math library, so that every host draws the same bits.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const STEP: f32 = 1.0 / 16_777_216.0;
    // In (0, 1], so that the logarithm is finite.
    let radius = libm::sqrtf(-2.0 * libm::logf(((a >> 8) + 1) as f32 * STEP));
    let angle = std::f32::consts::TAU * ((b >> 8) as f32 * STEP);
    [radius * libm::cosf(angle), radius * libm::sinf(angle)]
}

/// Where a job's noise comes from.
#[derive(Clone, Debug)]
pub enum NoiseSource {
    /// Counter-based normals from the job's seed.
    Counter {
        /// The job's seed.
        seed: u64,
        /// Whether samples share noise.
        scope: NoiseScope,
    },
    /// Rows of a noise file, the same for all samples.
    Table(NoiseTable),
}

/// The rows of `--noise FILE`: tensor `noise` `[N, C, H, W]`, f32.
#[derive(Clone, Debug)]
pub struct NoiseTable {
    rows: usize,
    shape: [usize; 3],
    data: Vec<f32>,
}

/// Noise that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum NoiseError {
    /// The file could not be read.
    #[error("reading the noise file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file is not a safetensors file with the expected tensor.
    #[error(
        "the noise file {path} {problem}: it must be a safetensors file with a float32 tensor 'noise' of shape [N, C, H, W]"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The tensor does not fit the model's latents.
    #[error(
        "the noise file's rows are {found:?}, but the model's latents are {expected:?} [C, H, W]: make it with the model's latent shape"
    )]
    Shape {
        /// Shape of a row.
        found: [usize; 3],
        /// Shape of a latent.
        expected: [usize; 3],
    },
    /// The schedule needs more rows than the file has.
    #[error(
        "the noise file has {rows} rows, but the schedule uses {needed}: give a file with at least {needed}, or a schedule with fewer slots (at most {rows})"
    )]
    TooFewRows {
        /// Rows of the file.
        rows: usize,
        /// Rows the schedule needs.
        needed: usize,
    },
}

impl NoiseTable {
    /// Reads the tensor `noise` from the bytes of a safetensors file; `path` names it in errors.
    pub fn parse(path: &std::path::Path, bytes: &[u8]) -> Result<Self, NoiseError> {
        let wrong = |problem: String| NoiseError::Format { path: path.to_owned(), problem };
        let file = SafeTensors::deserialize(bytes).map_err(|e| wrong(format!("can't be parsed ({e})")))?;
        let tensor = file.tensor("noise").map_err(|_| wrong("has no tensor 'noise'".into()))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(wrong(format!("holds {:?}", tensor.dtype())));
        }
        let &[rows, c, h, w] = tensor.shape() else {
            return Err(wrong(format!("has shape {:?}", tensor.shape())));
        };
        let (words, _) = tensor.data().as_chunks::<4>();
        let data: Vec<f32> = words.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if data.iter().any(|v| !v.is_finite()) {
            return Err(wrong("holds values that are not finite".into()));
        }
        Ok(Self { rows, shape: [c, h, w], data })
    }

    /// Checks that the rows have the shape of the latents and that there are enough of them.
    pub fn check(&self, latent: [usize; 3], needed: usize) -> Result<(), NoiseError> {
        if self.shape != latent {
            return Err(NoiseError::Shape { found: self.shape, expected: latent });
        }
        if self.rows < needed {
            return Err(NoiseError::TooFewRows { rows: self.rows, needed });
        }
        Ok(())
    }
}

impl NoiseSource {
    /// Writes noise number `index` of the sample with `sample_key` into `out`, in [C, H, W] order.
    ///
    /// A table must have passed [`NoiseTable::check`] for `index` and the length of `out`.
    ///
    /// ```
    /// use elbo_core::noise::{NoiseScope, NoiseSource};
    ///
    /// let noise = NoiseSource::Counter { seed: 1, scope: NoiseScope::Sample };
    /// let (mut one, mut again) = ([0.0; 16], [0.0; 16]);
    /// noise.fill("cat.png", 7, &mut one);
    /// noise.fill("cat.png", 7, &mut again);
    /// assert_eq!(one, again);
    /// ```
    pub fn fill(&self, sample_key: &str, index: u32, out: &mut [f32]) {
        match self {
            Self::Table(table) => {
                let size = out.len();
                let start = index as usize * size;
                out.copy_from_slice(&table.data[start..start + size]);
            }
            Self::Counter { seed, scope } => {
                let scope = match scope {
                    NoiseScope::Sample => Some(sample_key),
                    NoiseScope::Shared => None,
                };
                fill_normal(stream_key(*seed, scope), index, out);
            }
        }
    }
}

/// The Philox key of a stream: a hash of the seed and the sample's key, or of the seed alone if noise is shared.
fn stream_key(seed: u64, sample_key: Option<&str>) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"elbo noise 1");
    hasher.update(&seed.to_le_bytes());
    match sample_key {
        Some(key) => hasher.update(b"sample").update(key.as_bytes()),
        None => hasher.update(b"shared"),
    };
    let hash = hasher.finalize();
    let word = |i: usize| {
        u32::from_le_bytes([hash.as_bytes()[i], hash.as_bytes()[i + 1], hash.as_bytes()[i + 2], hash.as_bytes()[i + 3]])
    };
    [word(0), word(4)]
}

fn fill_normal(key: [u32; 2], index: u32, out: &mut [f32]) {
    for (block, chunk) in (0u32..).zip(out.chunks_mut(4)) {
        let [a, b, c, d] = philox4x32([block, index, 0, 0], key);
        let ([x, y], [z, w]) = (box_muller(a, b), box_muller(c, d));
        chunk.copy_from_slice(&[x, y, z, w][..chunk.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn noise_is_standard_normal() {
        let source = NoiseSource::Counter { seed: 3, scope: NoiseScope::Sample };
        let mut values = vec![0.0; 200_000];
        source.fill("a", 0, &mut values);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01);
        assert!((moment(2) - 1.0).abs() < 0.015);
        assert!(moment(3).abs() < 0.05);
        assert!((moment(4) - 3.0).abs() < 0.1);
        // Neighbours come from the same Box-Muller pair, but are uncorrelated.
        let lag = values.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / n;
        assert!(lag.abs() < 0.01);
    }

    #[test]
    fn noise_depends_only_on_seed_sample_and_index() {
        let draw = |seed, scope, key: &str, index| {
            let mut out = [0.0; 6];
            NoiseSource::Counter { seed, scope }.fill(key, index, &mut out);
            out
        };
        let base = draw(0, NoiseScope::Sample, "a", 0);
        assert_eq!(base, draw(0, NoiseScope::Sample, "a", 0));
        assert_ne!(base, draw(1, NoiseScope::Sample, "a", 0));
        assert_ne!(base, draw(0, NoiseScope::Sample, "b", 0));
        assert_ne!(base, draw(0, NoiseScope::Sample, "a", 1));
        assert_eq!(draw(0, NoiseScope::Shared, "a", 2), draw(0, NoiseScope::Shared, "b", 2));
    }

    fn table_file(shape: Vec<usize>, name: &str) -> Vec<u8> {
        let data: Vec<u8> = (0..shape.iter().product()).flat_map(|i: usize| (i as f32).to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(Dtype::F32, shape, &data).unwrap();
        safetensors::serialize([(name, view)], None).unwrap()
    }

    #[test]
    fn a_noise_file_gives_row_i_for_index_i() {
        let table = NoiseTable::parse("n".as_ref(), &table_file(vec![3, 1, 2, 2], "noise")).unwrap();
        table.check([1, 2, 2], 3).unwrap();
        let mut out = [0.0; 4];
        NoiseSource::Table(table).fill("any", 2, &mut out);
        assert_eq!(out, [8.0, 9.0, 10.0, 11.0]);
    }

    #[test]
    fn unfit_noise_files_are_refused_with_the_remedy() {
        let parse = |bytes: &[u8]| NoiseTable::parse("n".as_ref(), bytes);
        assert!(parse(b"junk").unwrap_err().to_string().contains("can't be parsed"));
        assert!(parse(&table_file(vec![3, 1, 2, 2], "eps")).unwrap_err().to_string().contains("no tensor 'noise'"));
        assert!(parse(&table_file(vec![3, 4], "noise")).unwrap_err().to_string().contains("[3, 4]"));
        let table = parse(&table_file(vec![3, 1, 2, 2], "noise")).unwrap();
        assert!(table.check([4, 2, 2], 1).unwrap_err().to_string().contains("latent shape"));
        assert!(table.check([1, 2, 2], 4).unwrap_err().to_string().contains("at least 4"));
    }
}
