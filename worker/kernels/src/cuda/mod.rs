//! The operations on a CUDA device, by our own kernels (`worker/kernels/cuda/*.cu`), cuBLASLt (products) and cuDNN
//! (convolutions).
//!
//! All work of a device runs in one stream, so freed memory is not reused before its readers have run, and the host
//! waits only for copies to the host. Two rules hold as on the CPU: there is one layout, and the order of an output
//! element's sums depends on neither the batch nor the element's place in it. For products this means that the
//! algorithm is chosen once for a layer, not for every number of rows, and never splits the inner dimension.

// Calls to C interfaces, on device memory that the compiler knows nothing about.
#![allow(unsafe_code)]

pub(crate) mod attention;
mod convolution;
mod launch;
mod libraries;
mod memory;
pub(crate) mod norm;
mod open;
mod pointwise;
mod product;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};

use self::convolution::Convolutions;
use self::memory::Staging;
use self::product::Products;

pub(crate) use self::convolution::{Convolution, Surroundings};
pub(crate) use self::libraries::libraries;
pub(crate) use self::memory::Download;
pub(crate) use self::open::{capture, count, is_lost, memory_high, name_of, open, recover};

/// The kernels as one image for several architectures.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// What the operations keep for a device.
pub(crate) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    products: Mutex<Products>,
    /// `None` if cuDNN is not installed or does not start.
    convolutions: Option<Mutex<Convolutions>>,
    staging: Mutex<Staging>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Converts a library's error to candle's.
fn failed(what: &str, error: impl std::fmt::Display) -> candle_core::Error {
    candle_core::Error::Msg(format!("{what}: {error}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The GPU a tensor is on, if it is on one and the kernels support the tensor's type.
    pub(crate) fn of(tensor: &Tensor) -> Result<Option<Arc<Self>>> {
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Self::behind(tensor.device()),
            _ => Ok(None),
        }
    }

    /// The GPU behind a device, if it is one.
    pub(crate) fn behind(device: &Device) -> Result<Option<Arc<Self>>> {
        static GPUS: Mutex<Option<HashMap<DeviceId, Arc<Gpu>>>> = Mutex::new(None);
        let Device::Cuda(device) = device else { return Ok(None) };
        let mut gpus = lock(&GPUS);
        let gpus = gpus.get_or_insert_default();
        if let Some(gpu) = gpus.get(&device.id()) {
            return Ok(Some(Arc::clone(gpu)));
        }
        let gpu = Arc::new(Self::new(device)?);
        gpus.insert(device.id(), Arc::clone(&gpu));
        Ok(Some(gpu))
    }

    /// Makes this device current for libraries called on this thread.
    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|error| failed("using the device", error))
    }

    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(|error| failed("using the device", error))?;
        let image = candle_core::cuda_backend::cudarc::nvrtc::Ptx::from_binary(KERNELS.to_vec());
        let module = stream.context().load_module(image).map_err(|error| {
            failed("loading the kernels, which need compute capability 8.0 (Ampere) or newer", error)
        })?;
        let gpu = Self {
            device: device.clone(),
            module,
            functions: Mutex::default(),
            products: Mutex::new(Products::new(&stream)?),
            convolutions: Convolutions::new(&stream).map(Mutex::new),
            staging: Mutex::default(),
            stream,
        };
        libraries::warn_if_mixed();
        Ok(gpu)
    }
}
