//! Finding and opening devices.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::{cublas, cublaslt, curand, driver};
use candle_core::{CudaDevice, Device};

use crate::unavailable::Unavailable;

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

/// The memory pool a device allocates from, which lives as long as the device.
fn pool(ordinal: usize) -> Result<sys::CUmemoryPool, driver::DriverError> {
    let device = driver::result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device exists, and the pointer is written where the call succeeds.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device).result()? };
    Ok(pool)
}

/// Makes the device's pool keep what is given back, which it would otherwise return to the system whenever it is idle.
fn keep_memory(number: usize) -> Result<(), driver::DriverError> {
    let mut keep = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool exists, and the attribute is a 64-bit number.
    unsafe { sys::cuMemPoolSetAttribute(pool(number)?, attribute, (&raw mut keep).cast()).result() }
}

/// Bytes of a device's memory in use at most so far.
pub(crate) fn memory_high(device: &CudaDevice) -> Result<u64, driver::DriverError> {
    let mut high = 0u64;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let pool = pool(device.cuda_stream().context().ordinal())?;
    // SAFETY: as above.
    unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut high).cast()).result()? };
    Ok(high)
}

/// Waits for what a device was asked for, and gives back to the system what its pool keeps: after an allocation failed, pieces
/// that are too small for it may lie there.
pub(crate) fn recover(device: &CudaDevice) -> Result<(), driver::DriverError> {
    let stream = device.cuda_stream();
    // What an earlier failure left behind is not this call's.
    let _ = stream.context().check_err();
    stream.synchronize()?;
    // SAFETY: the pool exists.
    unsafe { sys::cuMemPoolTrimTo(pool(stream.context().ordinal())?, 0).result() }
}

/// Whether a device fails at whatever it is asked for, as it does for the rest of the process once a kernel has failed.
///
/// An error that is merely left over from an earlier call is reported once, and says nothing.
pub(crate) fn is_lost(device: &CudaDevice) -> bool {
    let stream = device.cuda_stream();
    let _ = stream.context().check_err();
    let works = || stream.synchronize().is_ok();
    !works() && !works()
}

/// Runs work between the calls that profilers take for the beginning and the end of what they are to look at.
pub(crate) fn capture<R>(device: &CudaDevice, work: impl FnOnce() -> R) -> Result<R, driver::DriverError> {
    device.cuda_stream().synchronize()?;
    driver::safe::profiler_start()?;
    let result = work();
    device.cuda_stream().synchronize()?;
    driver::safe::profiler_stop()?;
    Ok(result)
}
