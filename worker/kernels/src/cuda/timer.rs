//! When work of the stream begins and ends, for profiles.

use std::time::Duration;

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::{Result, Tensor};

use super::{Gpu, failed};

/// A point in a device's stream.
#[derive(Debug)]
pub(crate) struct Mark(CudaEvent);

impl Mark {
    /// The time from this point to a later one, which is waited for.
    pub(crate) fn until(&self, later: &Self) -> Result<Duration> {
        let milliseconds = self.0.elapsed_ms(&later.0).map_err(|error| failed("timing the device", error))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds).max(0.0) / 1e3))
    }
}

/// Marks where the stream of a tensor's device is, if that is a GPU.
pub(crate) fn mark(tensor: &Tensor) -> Result<Option<Mark>> {
    let Some(gpu) = Gpu::behind(tensor.device())? else { return Ok(None) };
    let event = gpu.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    Ok(Some(Mark(event.map_err(|error| failed("timing the device", error))?)))
}
