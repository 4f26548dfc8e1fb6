//! What CUDA needs: devices, or why there are none, and the libraries that were opened.

use std::path::PathBuf;

/// Why a CUDA device can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// The program was built without it.
    #[error("this program was built without CUDA: build it with deploy/cuda/build.sh, or use --device cpu")]
    Build,
    /// A library is not installed.
    #[error("{0} is missing: install it, or set LD_LIBRARY_PATH to where it is; --device cpu needs none")]
    Library(&'static str),
    /// The machine has fewer devices, or shows fewer.
    #[error("there is no cuda:{number}: this machine has {count} CUDA devices, counted from 0{shown}", shown = shown())]
    NoSuchDevice {
        /// What was asked for.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver refuses.
    #[error("the NVIDIA driver says: {0}; CUDA 13 needs driver 580 or newer (see nvidia-smi){shown}", shown = shown())]
    Driver(String),
}

/// What else decides which devices there are.
fn shown() -> String {
    let value = std::env::var("CUDA_VISIBLE_DEVICES");
    value.map_or_else(|_| String::new(), |value| format!(", and CUDA_VISIBLE_DEVICES='{value}' hides all others"))
}

/// One of CUDA's libraries that this process has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// Its name without a version, like libcublasLt.
    pub name: String,
    /// What it says its version is, if it is one of those that are asked.
    pub version: Option<String>,
    /// Its file.
    pub path: PathBuf,
}
