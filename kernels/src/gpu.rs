//! CUDA devices, in programs built with the feature `cuda`; elsewhere there are none.

use std::path::PathBuf;

use candle_core::Device;

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

/// CUDA's libraries that this process has opened so far.
pub fn libraries() -> Vec<Library> {
    #[cfg(feature = "cuda")]
    return crate::cuda::libraries();
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}

/// How many devices there are.
pub fn count() -> Result<usize, Unavailable> {
    #[cfg(feature = "cuda")]
    return crate::cuda::count();
    #[cfg(not(feature = "cuda"))]
    Err(Unavailable::Build)
}

/// Opens a device by its number.
pub fn open(number: usize) -> Result<Device, Unavailable> {
    #[cfg(feature = "cuda")]
    return crate::cuda::open(number);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = number;
        Err(Unavailable::Build)
    }
}

/// Whether a GPU has failed for good, so that nothing in this process will run on it again.
pub fn is_lost(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::is_lost(device);
    }
    let _ = device;
    false
}

/// Makes room after an allocation on a GPU has failed: waits for what it was asked for, and gives unused memory back.
pub fn recover(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && let Err(error) = crate::cuda::recover(device)
    {
        tracing::warn!(%error, "the GPU's unused memory could not be given back");
    }
    let _ = device;
}

/// Runs work on a GPU between the calls that profilers (ncu, nsys) take for the beginning and the end of what they look at.
pub fn capture<R>(device: &Device, work: impl FnOnce() -> R) -> candle_core::Result<R> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::capture(device, work).map_err(candle_core::Error::wrap);
    }
    let _ = device;
    Ok(work())
}

/// What a GPU is called; none for the CPU.
pub fn name(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return device.cuda_stream().context().name().ok();
    }
    let _ = device;
    None
}

/// Bytes of a GPU's memory that were in use at most so far; none for the CPU.
pub fn memory_high(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::memory_high(device).ok();
    }
    let _ = device;
    None
}
