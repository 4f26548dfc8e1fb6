//! Why a model could not be loaded or run, and what to do about it.

use std::path::PathBuf;

use elbo_core::python_json::JsonError;

use super::reading::SameTokens;

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
    /// A configuration is not the expected JSON.
    #[error("reading {}: {source}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause, with the key.
        source: JsonError,
    },
    /// A weights file is damaged.
    #[error("{}: {source}: the file is truncated or damaged; download it again", .path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: safetensors::SafeTensorError,
    },
    /// A file has the name of a weights file but is something else.
    #[error("{} is {what}", .path.display())]
    NotWeights {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        what: &'static str,
    },
    /// A component has weights only in another format.
    #[error(
        "{} is a pickle, which is not supported: convert the model to safetensors with `python -c \"from diffusers import \
         DiffusionPipeline as P; P.from_pretrained('IN').save_pretrained('OUT', safe_serialization=True)\"`",
        .0.display()
    )]
    Pickle(PathBuf),
    /// There are weights in several variants, and it is unclear which one to use.
    #[error(
        "{} has no {stem}.safetensors, and it is unclear which of {} to use: rename that one to {stem}.safetensors",
        .directory.display(), .found.join(", ")
    )]
    Variants {
        /// The directory.
        directory: PathBuf,
        /// The weights' name without variant and extension.
        stem: String,
        /// The variants found.
        found: Vec<String>,
    },
    /// A shard index names a file that is not there.
    #[error("{}: the shard {shard} with {key} is missing: download it again", .index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file it names.
        shard: String,
        /// A weight it should hold.
        key: String,
    },
    /// A shard index names a file that is not beside it.
    #[error(
        "{}: it names a shard {shard:?}, which could lie outside the model's directory: fetch the model from a source \
         you trust",
        .index.display()
    )]
    ShardName {
        /// The index.
        index: PathBuf,
        /// The name.
        shard: String,
    },
    /// A configuration asks for something that is not implemented.
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
    /// A weight's data type is not a supported floating point type.
    #[error("{}: {key} is stored as {dtype}; only F32, F16, BF16 and F64 can be read", .path.display())]
    WrongType {
        /// The weights file.
        path: PathBuf,
        /// The weight.
        key: String,
        /// The type found.
        dtype: String,
    },
    /// An adapter does not fit the model, or its format is unknown.
    #[error("{}: {message}", .path.display())]
    Lora {
        /// The adapter.
        path: PathBuf,
        /// What is wrong, with the key.
        message: String,
    },
    /// The tokenizer's files are inconsistent.
    #[error("tokenizer in {}: {message}", .path.display())]
    Tokenizer {
        /// The tokenizer directory.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Prompts that should differ are the same to the text encoder.
    #[error(transparent)]
    SameTokens(#[from] SameTokens),
    /// The text encoder was already dropped.
    #[error("the text encoder was dropped after the prompts had been encoded")]
    NoTextEncoder,
    /// A class-conditional model was asked for a class it was not trained on.
    #[error("the model has no class {label}: it was trained on {classes} classes, 0 to {}", .classes.saturating_sub(1))]
    NoSuchClass {
        /// The requested label.
        label: i64,
        /// The number of classes.
        classes: usize,
    },
    /// A model got invalid inputs.
    #[error("{0}")]
    Input(String),
    /// The model predicted infinities or NaN.
    #[error("the model's output is not finite: its weights may be damaged, or its inputs out of range")]
    NotFinite,
    /// The model panicked, which is a bug.
    #[error("the model crashed: {0}; please report this")]
    Crashed(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// Whether a device ran out of memory, so that fewer evaluations at a time may work.
    pub fn is_out_of_memory(&self) -> bool {
        /// How the driver, cuBLAS and cuDNN report it.
        const SIGNS: [&str; 4] = ["OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED"];
        match self {
            Self::Tensor(error) => {
                let text = format!("{error} {error:?}");
                SIGNS.iter().any(|sign| text.contains(sign))
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_memory_errors_of_all_libraries_are_recognised() {
        let failed = |message: &str| ModelError::Tensor(candle_core::Error::Msg(message.to_owned()));
        let lacks = [
            "memory for convolutions: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "a product: CublasError(CUBLAS_STATUS_ALLOC_FAILED)",
            "a convolution: CudnnError(CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)",
            "a convolution: CudnnError(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED)",
        ];
        assert!(lacks.iter().all(|message| failed(message).is_out_of_memory()));
        for message in ["a convolution: CudnnError(CUDNN_STATUS_EXECUTION_FAILED)", "CUDA_ERROR_ILLEGAL_ADDRESS"] {
            assert!(!failed(message).is_out_of_memory(), "{message}");
        }
    }
}
