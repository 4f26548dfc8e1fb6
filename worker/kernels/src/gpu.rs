//! CUDA devices, in programs built with the feature `cuda`; elsewhere there are none.

use candle_core::Device;

pub use crate::unavailable::{Library, Unavailable};

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
