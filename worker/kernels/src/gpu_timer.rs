//! Records when work in a GPU's stream begins and ends, for profiles.

use std::time::Duration;

use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::{Device, Error, Result, Tensor};

/// A point in a device's stream.
#[derive(Debug)]
pub(crate) struct Mark(CudaEvent);

impl Mark {
    /// The time from this point to a later one. Waits for the later one.
    pub(crate) fn until(&self, later: &Self) -> Result<Duration> {
        let milliseconds = self.0.elapsed_ms(&later.0).map_err(failed)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds).max(0.0) / 1e3))
    }
}

/// Marks the current point in the stream of a tensor's device, if that is a GPU.
pub(crate) fn mark(tensor: &Tensor) -> Result<Option<Mark>> {
    let Device::Cuda(device) = tensor.device() else { return Ok(None) };
    let event = device.cuda_stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    Ok(Some(Mark(event.map_err(failed)?)))
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Msg(format!("timing the device: {error}"))
}
