//! A safetensors file mapped into memory. Its pages are read when a layer takes them, and the system can drop them
//! again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use elbo_store::files;
use memmap2::Mmap;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorInfo};

use super::error::ModelError;

/// A safetensors file.
#[derive(Debug)]
pub(crate) struct WeightsFile {
    path: PathBuf,
    map: Mmap,
    /// Where the header ends.
    data: usize,
    tensors: HashMap<String, TensorInfo>,
    /// The `__metadata__` of the header.
    metadata: HashMap<String, String>,
}

impl WeightsFile {
    /// Maps a file and checks its header against its size.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|source| damaged(path, &map, source))?;
        let tensors = metadata.tensors().into_iter().map(|(key, info)| (key, info.clone())).collect();
        let metadata = metadata.metadata().clone().unwrap_or_default();
        Ok(Self { path: path.to_owned(), map, data: header + size_of::<u64>(), tensors, metadata })
    }

    /// The path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// An entry of the header's metadata.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The shape of a tensor, if it is there.
    pub(crate) fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(|info| info.shape.as_slice())
    }

    /// The type a tensor is stored in, if it is there.
    pub(crate) fn stored_type(&self, key: &str) -> Option<String> {
        self.tensors.get(key).map(|info| format!("{:?}", info.dtype))
    }

    /// A tensor as it is stored, on the CPU.
    pub(crate) fn tensor(&self, key: &str) -> Result<Tensor, ModelError> {
        let Some(info) = self.tensors.get(key) else {
            return Err(ModelError::MissingKey { path: self.path.clone(), key: key.to_owned() });
        };
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            other => {
                let (path, key) = (self.path.clone(), key.to_owned());
                return Err(ModelError::WrongType { path, key, dtype: format!("{other:?}") });
            }
        };
        let (start, end) = info.data_offsets;
        let bytes = self.map.get(self.data + start..self.data + end).unwrap_or_default();
        Ok(Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu)?)
    }
}

#[allow(
    unsafe_code,
    reason = "a mapping is unsafe because others may change the file; a model's files are not written to"
)]
fn map(path: &Path) -> Result<Mmap, ModelError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => ModelError::MissingFile(path.to_owned()),
        _ => ModelError::Read { path: path.to_owned(), source },
    };
    let file = files::open(path).map_err(failed)?;
    // SAFETY: as in every program that maps weights, truncating the file while it is loaded ends this process.
    unsafe { Mmap::map(&file) }.map_err(failed)
}

/// The error for a file that is not readable as safetensors.
fn damaged(path: &Path, bytes: &[u8], source: SafeTensorError) -> ModelError {
    /// The first bytes of a zip archive, torch's format, and of a bare pickle.
    const PICKLES: [&[u8]; 2] = [b"PK\x03\x04", b"\x80\x02"];
    let path = path.to_owned();
    if PICKLES.iter().any(|start| bytes.starts_with(start)) {
        ModelError::Pickle(path)
    } else if bytes.starts_with(b"version https://git-lfs") {
        let what = "a Git LFS pointer, not the weights: fetch them with `git lfs pull`, or download the model again";
        ModelError::NotWeights { path, what }
    } else if bytes.trim_ascii_start().starts_with(b"<") {
        let what = "a web page, not the weights: download it again, and sign in if the model's licence requires it";
        ModelError::NotWeights { path, what }
    } else {
        ModelError::Weights { path, source }
    }
}
