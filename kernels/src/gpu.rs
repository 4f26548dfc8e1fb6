//! CUDA devices, in programs built with the feature `cuda`; elsewhere there are none.

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
    /// The machine has fewer devices.
    #[error("there is no cuda:{number}: this machine has {count} CUDA devices, counted from 0")]
    NoSuchDevice {
        /// What was asked for.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// The driver refuses.
    #[error("the NVIDIA driver says: {0}; CUDA 13 needs driver 580 or newer (see nvidia-smi)")]
    Driver(String),
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
        return device.cuda_stream().synchronize().is_err();
    }
    let _ = device;
    false
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
