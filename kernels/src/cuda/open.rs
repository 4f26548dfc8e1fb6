//! Finding and opening devices.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::{cublas, cublaslt, curand, driver};
use candle_core::{CudaDevice, Device};

use crate::gpu::Unavailable;

/// Asks for the libraries, whose absence would otherwise end the process when the first of their functions is called.
fn libraries() -> Result<(), Unavailable> {
    let missing = |library| Err(Unavailable::Library(library));
    // SAFETY: these only look whether a library can be opened, whose initialisers are trusted as all of CUDA is.
    unsafe {
        if !driver::sys::is_culib_present() {
            return missing("libcuda, which the NVIDIA driver brings");
        }
        if !cublas::sys::is_culib_present() || !cublaslt::sys::is_culib_present() {
            return missing("libcublas and libcublasLt of CUDA 13");
        }
        if !curand::sys::is_culib_present() {
            return missing("libcurand of CUDA 13");
        }
    }
    Ok(())
}

/// How many devices there are.
pub(crate) fn count() -> Result<usize, Unavailable> {
    libraries()?;
    let count = driver::CudaContext::device_count().map_err(|error| Unavailable::Driver(error.to_string()))?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// Opens a device by its number.
pub(crate) fn open(number: usize) -> Result<Device, Unavailable> {
    let count = count()?;
    if number >= count {
        return Err(Unavailable::NoSuchDevice { number, count });
    }
    let refused = |error: &dyn std::fmt::Display| Unavailable::Driver(error.to_string());
    let device = CudaDevice::new_with_stream(number).map_err(|error| refused(&error))?;
    // SAFETY: everything of this device runs in the one stream it was made with.
    unsafe { device.disable_event_tracking() };
    keep_memory(number).map_err(|error| refused(&error))?;
    Ok(Device::Cuda(device))
}

/// Makes the device's pool keep what is given back, which it would otherwise return to the system whenever it is idle.
fn keep_memory(number: usize) -> Result<(), driver::DriverError> {
    let mut keep = u64::MAX;
    let device = driver::result::device::get(i32::try_from(number).unwrap_or(i32::MAX))?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device exists, its default pool lives as long as it, and the attribute is a 64-bit number.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, device).result()?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut keep).cast()).result()
    }
}

/// Bytes of a device's memory in use at most so far.
pub(crate) fn memory_high(device: &CudaDevice) -> Result<u64, driver::DriverError> {
    let ordinal = device.cuda_stream().context().ordinal();
    let device = driver::result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
    let (mut pool, mut high) = (std::ptr::null_mut(), 0u64);
    // SAFETY: as above.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&raw mut pool, device).result()?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut high).cast()).result()?;
    }
    Ok(high)
}
