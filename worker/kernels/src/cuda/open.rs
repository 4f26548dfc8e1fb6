//! Finds and opens devices.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute};
use candle_core::cuda_backend::cudarc::{cublas, cublaslt, curand, driver};
use candle_core::{CudaDevice, Device};

use crate::unavailable::Unavailable;

/// Checks that the libraries can be opened. Otherwise the first call to a missing one would end the process.
fn libraries() -> Result<(), Unavailable> {
    let missing = |library| Err(Unavailable::Library(library));
    // SAFETY: these only check whether a library can be opened. Its initialisers are trusted, like all of CUDA.
    unsafe {
        if !driver::sys::is_culib_present() {
            return missing("libcuda, a part of the NVIDIA driver,");
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

/// The number of devices.
pub(crate) fn count() -> Result<usize, Unavailable> {
    libraries()?;
    let count = driver::CudaContext::device_count().map_err(|error| Unavailable::Driver(error.to_string()))?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// The name of a device by its number.
pub(crate) fn name_of(number: usize) -> Option<String> {
    count().ok()?;
    let device = driver::result::device::get(i32::try_from(number).ok()?).ok()?;
    driver::result::device::get_name(device).ok()
}

/// Opens a device by its number.
pub(crate) fn open(number: usize) -> Result<Device, Unavailable> {
    let count = count()?;
    if number >= count {
        return Err(Unavailable::NoSuchDevice { number, count });
    }
    let refused = |error: &dyn std::fmt::Display| Unavailable::Driver(error.to_string());
    let device = CudaDevice::new_with_stream(number).map_err(|error| refused(&error))?;
    // SAFETY: all work of this device runs in the one stream created with it.
    unsafe { device.disable_event_tracking() };
    keep_memory(number).map_err(|error| refused(&error))?;
    Ok(Device::Cuda(device))
}

/// The memory pool a device allocates from, which lives as long as the device.
fn pool(ordinal: usize) -> Result<sys::CUmemoryPool, driver::DriverError> {
    let device = driver::result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device exists, and the pointer is written if the call succeeds.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device).result()? };
    Ok(pool)
}

/// Makes the device's pool keep freed memory, which it would otherwise return to the system whenever the device is
/// idle.
fn keep_memory(number: usize) -> Result<(), driver::DriverError> {
    let mut keep = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool exists, and the attribute is a 64-bit number.
    unsafe { sys::cuMemPoolSetAttribute(pool(number)?, attribute, (&raw mut keep).cast()).result() }
}

/// Peak memory use of a device so far, in bytes.
pub(crate) fn memory_high(device: &CudaDevice) -> Result<u64, driver::DriverError> {
    let mut high = 0u64;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let pool = pool(device.cuda_stream().context().ordinal())?;
    // SAFETY: as above.
    unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut high).cast()).result()? };
    Ok(high)
}

/// Waits for all work of a device and returns the memory its pool keeps to the system. After a failed allocation, the
/// pool may hold pieces that were too small for it.
pub(crate) fn recover(device: &CudaDevice) -> Result<(), driver::DriverError> {
    let stream = device.cuda_stream();
    // An error left over from an earlier failure does not concern this call.
    let _ = stream.context().check_err();
    stream.synchronize()?;
    // SAFETY: the pool exists.
    unsafe { sys::cuMemPoolTrimTo(pool(stream.context().ordinal())?, 0).result() }
}

/// Whether every call on a device fails, as it does for the rest of the process once a kernel has failed.
///
/// An error left over from an earlier call is reported only once, so it does not count.
pub(crate) fn is_lost(device: &CudaDevice) -> bool {
    let stream = device.cuda_stream();
    let _ = stream.context().check_err();
    let works = || stream.synchronize().is_ok();
    !works() && !works()
}

/// Runs work between the calls that start and stop a profiler's capture.
pub(crate) fn capture<R>(device: &CudaDevice, work: impl FnOnce() -> R) -> Result<R, driver::DriverError> {
    device.cuda_stream().synchronize()?;
    driver::safe::profiler_start()?;
    let result = work();
    device.cuda_stream().synchronize()?;
    driver::safe::profiler_stop()?;
    Ok(result)
}
