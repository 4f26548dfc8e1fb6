//! Why a CUDA device can't be used, and which CUDA libraries are open.

use std::path::PathBuf;

/// Why a CUDA device can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The program was built without it.
    #[error("this program was built without CUDA: build it with deploy/cuda/build.sh, or use --device cpu")]
    Build,
    /// A library is not installed.
    #[error("{0} is missing: install it, or set LD_LIBRARY_PATH to its directory; --device cpu does not need it")]
    Library(&'static str),
    /// The machine has fewer devices, or exposes fewer.
    #[error("there is no cuda:{number}: this machine has {count} CUDA devices, counted from 0{shown}", shown = shown())]
    NoSuchDevice {
        /// The requested device.
        number: usize,
        /// The number of devices.
        count: usize,
    },
    /// The driver reports an error.
    #[error("the NVIDIA driver reports: {0}; CUDA 13 needs driver 580 or newer (see nvidia-smi){shown}", shown = shown())]
    Driver(String),
}

/// The setting that hides devices, if there is one.
fn shown() -> String {
    let value = std::env::var("CUDA_VISIBLE_DEVICES");
    value.map_or_else(|_| String::new(), |value| format!(", and CUDA_VISIBLE_DEVICES='{value}' hides all others"))
}

/// One of CUDA's libraries that this process has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// Its name without a version, such as libcublasLt.
    pub name: String,
    /// The version it reports, if it has a call for it.
    pub version: Option<String>,
    /// Its file.
    pub path: PathBuf,
}
