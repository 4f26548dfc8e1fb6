//! Device memory: operands as pointers, outputs, and asynchronous copies.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::{Gpu, failed, lock};
use crate::Rows;

/// An address in device memory; 0 means none.
pub(super) type Pointer = u64;

/// Which row each image takes. The list stays on the device until this is dropped, so hold it until the kernel that
/// reads it is launched.
#[derive(Debug)]
pub(super) struct Index {
    /// Address of the list; 0 if every image takes its own row.
    pub(super) pointer: Pointer,
    _list: Option<Arc<CudaSlice<u32>>>,
}

impl Index {
    const OWN: Self = Self { pointer: 0, _list: None };
}

/// Number of index lists kept on a device, since every layer of a pass uses the same few.
const REMEMBERED: usize = 8;

/// Host memory that a device reads directly, and recently uploaded index lists.
#[derive(Debug, Default)]
pub(super) struct Staging {
    floats: Pool<f32>,
    words: Pool<u32>,
    indices: Vec<(Vec<u32>, Arc<CudaSlice<u32>>)>,
}

/// Page-locked buffers, each with an event for the end of its last copy. Copies from other memory would wait for the
/// stream.
#[derive(Debug)]
struct Pool<T>(Vec<(PinnedHostSlice<T>, CudaEvent)>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: DeviceRepr + ValidAsZeroBits + Copy> Pool<T> {
    /// A buffer for `len` values that no copy uses any more. Buffers are never freed, since that would wait for the
    /// device.
    fn take(&mut self, stream: &CudaStream, len: usize) -> Result<PinnedHostSlice<T>> {
        match self.0.iter().position(|(buffer, event)| buffer.len() >= len && event.is_complete()) {
            Some(at) => Ok(self.0.remove(at).0),
            None => {
                let len = len.next_power_of_two().max(1024);
                // SAFETY: every value is written before it is read.
                let buffer = unsafe { stream.context().alloc_pinned_with_flags::<T>(len, 0) };
                buffer.map_err(|error| failed("page-locked memory", error))
            }
        }
    }

    /// Enqueues a copy of values to the device.
    fn upload(&mut self, stream: &Arc<CudaStream>, values: &[T]) -> Result<CudaSlice<T>> {
        let failed = |error| failed("copying to the device", error);
        let mut buffer = self.take(stream, values.len())?;
        buffer.as_mut_slice().map_err(failed)?[..values.len()].copy_from_slice(values);
        // SAFETY: the copy overwrites every element before this stream does anything else with it.
        let mut slice = unsafe { stream.alloc::<T>(at_least_one(values.len())) }.map_err(failed)?;
        let source = &buffer.as_slice().map_err(failed)?[..values.len()];
        if !source.is_empty() {
            stream.memcpy_htod(source, &mut slice).map_err(failed)?;
        }
        let done = stream.record_event(None).map_err(failed)?;
        self.0.push((buffer, done));
        Ok(slice)
    }
}

/// Number of values to allocate for `len` values, since the driver refuses empty allocations.
fn at_least_one(len: usize) -> usize {
    len.max(1)
}

impl Gpu {
    /// The address of a contiguous tensor's first element.
    pub(super) fn pointer(&self, tensor: &Tensor) -> Result<Pointer> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a tensor on the device is needed") };
        if storage.device.id() != self.device.id() {
            bail!("a tensor is on another device");
        }
        let Some((start, _)) = layout.contiguous_offsets() else {
            bail!("a contiguous tensor is needed, found {layout:?}");
        };
        // The guards returned with addresses synchronise several streams; here there is only one.
        let base = match &storage.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(&self.stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(&self.stream).0,
            _ => bail!("the device's kernels do not know {:?}", storage.dtype()),
        };
        Ok(base + (start * tensor.dtype().size_in_bytes()) as u64)
    }

    /// The address of a tensor, after checking its type and number of elements; 0 for no tensor.
    pub(super) fn operand(&self, tensor: Option<&Tensor>, dtype: DType, len: usize) -> Result<Pointer> {
        match tensor {
            None => Ok(0),
            Some(tensor) if tensor.dtype() == dtype && tensor.elem_count() == len => self.pointer(tensor),
            Some(tensor) => {
                bail!("an operand {:?} {:?} where {len} values of {dtype:?} are needed", tensor.shape(), tensor.dtype())
            }
        }
    }

    /// The address of rows of `len` values, one for each of `count` images, and which row each image takes.
    pub(super) fn rows(
        &self,
        rows: Option<Rows<'_>>,
        dtype: DType,
        count: usize,
        len: usize,
    ) -> Result<(Pointer, Index)> {
        let Some(Rows { tensor, index }) = rows else { return Ok((0, Index::OWN)) };
        let available = tensor.dim(0)?;
        let pointer = self.operand(Some(tensor), dtype, available * len)?;
        match index {
            None if available == count => Ok((pointer, Index::OWN)),
            Some(index) if index.len() == count && index.iter().all(|&i| (i as usize) < available) => {
                Ok((pointer, self.indices(index)?))
            }
            _ => bail!("no row for each of {count} images among {:?}", tensor.shape()),
        }
    }

    /// An index list on the device.
    pub(super) fn indices(&self, index: &[u32]) -> Result<Index> {
        let mut staging = lock(&self.staging);
        let known = staging.indices.iter().find(|(known, _)| known == index).map(|(_, list)| Arc::clone(list));
        let list = match known {
            Some(list) => list,
            None => {
                let list = Arc::new(staging.words.upload(&self.stream, index)?);
                if staging.indices.len() == REMEMBERED {
                    staging.indices.remove(0);
                }
                staging.indices.push((index.to_vec(), Arc::clone(&list)));
                list
            }
        };
        let pointer = list.device_ptr(&self.stream).0;
        Ok(Index { pointer, _list: Some(list) })
    }

    /// An uninitialised tensor and its address.
    pub(super) fn output(&self, dtype: DType, shape: impl Into<Shape>) -> Result<(Tensor, Pointer)> {
        let shape = shape.into();
        let storage = match dtype {
            DType::F32 => self.storage::<f32>(shape.elem_count())?,
            DType::F16 => self.storage::<f16>(shape.elem_count())?,
            DType::BF16 => self.storage::<bf16>(shape.elem_count())?,
            _ => bail!("the device's kernels do not know {dtype:?}"),
        };
        let tensor = Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false);
        let pointer = self.pointer(&tensor)?;
        Ok((tensor, pointer))
    }

    fn storage<T: CudaDType + DeviceRepr>(&self, len: usize) -> Result<CudaStorage> {
        // SAFETY: the caller writes all of the output.
        Ok(CudaStorage::wrap_cuda_slice(unsafe { self.device.alloc::<T>(at_least_one(len)) }?, self.device.clone()))
    }

    /// Values as a tensor; the copy is enqueued and not waited for.
    pub(crate) fn upload(&self, values: &[f32], shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        if shape.elem_count() != values.len() {
            bail!("{} values for {shape:?}", values.len());
        }
        let slice = lock(&self.staging).floats.upload(&self.stream, values)?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}

/// A pending copy of a tensor's values to the host.
#[derive(Debug)]
pub(crate) struct Download {
    gpu: Arc<Gpu>,
    len: usize,
    /// The destination and an event for the end of the copy; `None` after waiting for it.
    copy: Option<(PinnedHostSlice<f32>, CudaEvent)>,
}

impl Download {
    /// Enqueues a copy of the values of a contiguous f32 tensor, which must have at least one.
    pub(crate) fn start(gpu: Arc<Gpu>, tensor: &Tensor) -> Result<Self> {
        let failed = |error| failed("copying from the device", error);
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("a contiguous tensor on the device is needed");
        };
        let slice = storage.as_cuda_slice::<f32>()?.slice(start..end);
        let len = end - start;
        let mut buffer = lock(&gpu.staging).floats.take(&gpu.stream, len)?;
        gpu.stream.memcpy_dtoh(&slice, &mut buffer.as_mut_slice().map_err(failed)?[..len]).map_err(failed)?;
        let done = gpu.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(failed)?;
        Ok(Self { gpu, len, copy: Some((buffer, done)) })
    }

    /// The values. Waits for the copy but not for work enqueued after it.
    pub(crate) fn wait(mut self) -> Result<Vec<f32>> {
        let failed = |error| failed("copying from the device", error);
        let Some((buffer, done)) = &self.copy else { return Ok(Vec::new()) };
        done.synchronize().map_err(failed)?;
        let values = buffer.as_slice().map_err(failed)?[..self.len].to_vec();
        lock(&self.gpu.staging).floats.0.extend(self.copy.take());
        Ok(values)
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // The buffer must outlive the copy into it.
        if let Some((_, done)) = &self.copy {
            let _ = done.synchronize();
        }
    }
}
