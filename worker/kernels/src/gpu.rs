//! CUDA devices. Programs built without the feature `cuda` have none.

use candle_core::Device;

pub use crate::unavailable::{Library, Unavailable};

/// CUDA's libraries that this process has opened so far.
pub fn libraries() -> Vec<Library> {
    #[cfg(feature = "cuda")]
    return crate::cuda::libraries();
    #[cfg(not(feature = "cuda"))]
    Vec::new()
}

/// The number of devices.
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

/// Makes room after a failed allocation on a GPU: waits for its work and returns unused memory.
pub fn recover(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && let Err(error) = crate::cuda::recover(device)
    {
        tracing::warn!(%error, "returning the GPU's unused memory failed");
    }
    let _ = device;
}

/// Runs work on a GPU between the calls that start and stop a capture in profilers (ncu, nsys).
pub fn capture<R>(device: &Device, work: impl FnOnce() -> R) -> candle_core::Result<R> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::capture(device, work).map_err(candle_core::Error::wrap);
    }
    let _ = device;
    Ok(work())
}

/// The name of a GPU by its number, without opening it.
pub fn name_of(number: usize) -> Option<String> {
    #[cfg(feature = "cuda")]
    return crate::cuda::name_of(number);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = number;
        None
    }
}

/// The name of a GPU; `None` for the CPU.
pub fn name(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return device.cuda_stream().context().name().ok();
    }
    let _ = device;
    None
}

/// Peak memory use of a GPU so far, in bytes; `None` for the CPU.
pub fn memory_high(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::memory_high(device).ok();
    }
    let _ = device;
    None
}
