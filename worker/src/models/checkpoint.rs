//! Reading a model directory in diffusers' layout: JSON configurations and safetensors weights.
//!
//! A component's weights are one file, several shards with an index, or either in the `fp16` variant. Files are read into
//! memory and every tensor is converted when a layer takes it, so that a mistake names the file and the key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorInfo};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file of the model directory is missing.
    #[error("{} is missing: is this a model directory in diffusers' layout?", .0.display())]
    MissingFile(PathBuf),
    /// A file could not be read.
    #[error("reading {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A configuration is not the JSON that was expected.
    #[error("reading {}: {source}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A weights file is damaged.
    #[error("reading {}: {source}", .path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: safetensors::SafeTensorError,
    },
    /// A configuration asks for something this implementation does not do.
    #[error("{}: {key} = {value} is not supported", .path.display())]
    Unsupported {
        /// The configuration.
        path: PathBuf,
        /// The setting.
        key: String,
        /// Its value.
        value: String,
    },
    /// A weight is missing.
    #[error("{}: no weight named {key}", .path.display())]
    MissingKey {
        /// The weights file.
        path: PathBuf,
        /// The weight.
        key: String,
    },
    /// A weight does not have the shape the configuration implies.
    #[error("{}: {key} has shape {found:?}, the configuration implies {expected:?}", .path.display())]
    WrongShape {
        /// The weights file.
        path: PathBuf,
        /// The weight.
        key: String,
        /// The shape the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A weight's data type is not a floating point type that can be read.
    #[error("{}: {key} is stored as {dtype}; only F32, F16, BF16 and F64 can be read", .path.display())]
    WrongType {
        /// The weights file.
        path: PathBuf,
        /// The weight.
        key: String,
        /// The type found.
        dtype: String,
    },
    /// The tokenizer's files are inconsistent.
    #[error("tokenizer in {}: {message}", .path.display())]
    Tokenizer {
        /// The tokenizer directory.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The text encoder was dropped already.
    #[error("the text encoder was dropped after the prompts had been encoded")]
    NoTextEncoder,
    /// A model was given inputs it has no meaning for.
    #[error("{0}")]
    Input(String),
    /// The model predicted infinities or NaN.
    #[error("the model's output is not finite: its weights may be damaged, or its inputs out of range")]
    NotFinite,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Reads a file, telling a missing one from an unreadable one.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ModelError::MissingFile(path.to_owned()),
        _ => ModelError::Read { path: path.to_owned(), source },
    })
}

/// Reads a JSON configuration.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    serde_json::from_slice(&read(path)?).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// Says that a configuration's setting is not supported.
pub(crate) fn unsupported(path: &Path, key: &str, value: impl std::fmt::Debug) -> ModelError {
    ModelError::Unsupported { path: path.to_owned(), key: key.to_owned(), value: format!("{value:?}") }
}

/// The weights of one component.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    /// Which shard a weight is in, and where.
    tensors: HashMap<String, (usize, TensorInfo)>,
    device: Device,
    dtype: DType,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where the header ends.
    data: usize,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens the weights `<stem>[.fp16].safetensors` or their shards in `dir`; layers get them on `device` as `dtype`.
    pub fn open(dir: &Path, stem: &str, device: &Device, dtype: DType) -> Result<Self, ModelError> {
        let mut weights = Self { shards: Vec::new(), tensors: HashMap::new(), device: device.clone(), dtype };
        for path in weight_files(dir, stem)? {
            weights.add(path)?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), ModelError> {
        let bytes = read(&path)?;
        let (header, metadata) = match SafeTensors::read_metadata(&bytes) {
            Ok(read) => read,
            Err(source) => return Err(ModelError::Weights { path, source }),
        };
        for (key, info) in metadata.tensors() {
            self.tensors.insert(key, (self.shards.len(), info.clone()));
        }
        self.shards.push(Shard { path, bytes, data: header + size_of::<u64>() });
        Ok(())
    }

    /// The weights whose names start with `name.`.
    pub fn at(&self, name: &str) -> Params<'_> {
        Params { weights: self, prefix: name.to_owned() }
    }

    /// Where layers get their weights.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The type layers get their weights in.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.shards.get(shard).map(|s| s.path.clone()).unwrap_or_default()
    }
}

/// The files of a component's weights: the plain variant first, then fp16, each whole or sharded.
fn weight_files(dir: &Path, stem: &str) -> Result<Vec<PathBuf>, ModelError> {
    for variant in ["", ".fp16"] {
        let whole = dir.join(format!("{stem}{variant}.safetensors"));
        if whole.is_file() {
            return Ok(vec![whole]);
        }
        let index = dir.join(format!("{stem}.safetensors.index{variant}.json"));
        if index.is_file() {
            let index: ShardIndex = read_json(&index)?;
            let mut names: Vec<String> = index.weight_map.into_values().collect();
            names.sort();
            names.dedup();
            return Ok(names.iter().map(|name| dir.join(name)).collect());
        }
    }
    Err(ModelError::MissingFile(dir.join(format!("{stem}.safetensors"))))
}

/// A component's weights below a prefix, such as `down_blocks.0.resnets.1`.
#[derive(Clone, Debug)]
pub struct Params<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Params<'_> {
    /// The weights one level below.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: self.name(name) }
    }

    /// Whether a weight of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.weights.tensors.contains_key(&self.name(name))
    }

    /// The weight `name` of the given shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        self.get_any(name, &[shape])
    }

    /// The weight `name`, stored in one of several shapes; it is returned in the first.
    pub fn get_any(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor, ModelError> {
        let stored = self.stored(name, shapes)?;
        Ok(stored.to_dtype(self.weights.dtype)?.to_device(&self.weights.device)?)
    }

    /// The single value `name`, not rounded to the layers' type.
    pub(crate) fn scalar(&self, name: &str) -> Result<f32, ModelError> {
        let value = self.stored(name, &[&[], &[1]])?;
        Ok(value.to_dtype(DType::F32)?.to_scalar()?)
    }

    /// A weight as the file has it, on the CPU.
    fn stored(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor, ModelError> {
        let (weights, key) = (self.weights, self.name(name));
        let expected = shapes.first().copied().unwrap_or_default();
        let Some((shard, info)) = weights.tensors.get(&key) else {
            return Err(ModelError::MissingKey { path: weights.path(0), key });
        };
        let path = weights.path(*shard);
        if !shapes.contains(&info.shape.as_slice()) {
            let (expected, found) = (expected.to_vec(), info.shape.clone());
            return Err(ModelError::WrongShape { path, key, expected, found });
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            other => return Err(ModelError::WrongType { path, key, dtype: format!("{other:?}") }),
        };
        let (start, end) = info.data_offsets;
        let bytes = weights.shards.get(*shard).and_then(|s| s.bytes.get(s.data + start..s.data + end));
        Ok(Tensor::from_raw_buffer(bytes.unwrap_or_default(), dtype, expected, &Device::Cpu)?)
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}
