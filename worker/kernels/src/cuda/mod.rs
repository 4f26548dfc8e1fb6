//! The operations on a CUDA device: own kernels (`worker/kernels/cuda/*.cu`), products by cuBLASLt, convolutions by cuDNN.
//!
//! All work of a device is in one stream, so memory that is given back is not reused before what reads it has run, and
//! nothing but copies to the host is waited for. Two rules hold as on the CPU: one layout, and an output element's sums are
//! made in an order that depends on neither the batch nor the element's place in it. For products that means that the
//! algorithm is chosen once for a layer, not for every number of rows, and never one that splits the inner dimension.

// Calls of a C interface, on device memory that the compiler knows nothing of.
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
mod timer;

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
pub(crate) use self::open::{capture, count, is_lost, memory_high, open, recover};
pub(crate) use self::timer::mark;

/// The kernels as one image for several architectures.
static KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// What the operations keep of a device.
pub(crate) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    products: Mutex<Products>,
    /// None where cuDNN is not installed, or does not start.
    convolutions: Option<Mutex<Convolutions>>,
    staging: Mutex<Staging>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("device", &self.device).finish_non_exhaustive()
    }
}

/// An error of some library as candle's.
fn failed(what: &str, error: impl std::fmt::Display) -> candle_core::Error {
    candle_core::Error::Msg(format!("{what}: {error}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// What is kept of a tensor's device, if that is a GPU and its kernels know the tensor's type.
    pub(crate) fn of(tensor: &Tensor) -> Result<Option<Arc<Self>>> {
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => Self::behind(tensor.device()),
            _ => Ok(None),
        }
    }

    /// What is kept of a device, if that is a GPU.
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

    /// Makes the device the one that libraries called on this thread work on.
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
