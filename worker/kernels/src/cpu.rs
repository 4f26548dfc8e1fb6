//! Access to the values of CPU tensors, shared by the kernels.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// One row (the values of one image) per batch element, by position or through an index.
///
/// The index lets many evaluations of one point add the same row without copying it.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The rows, along the first dimension.
    pub tensor: &'a Tensor,
    /// For each batch element, the row it takes; its own position if absent.
    pub index: Option<&'a [u32]>,
}

impl<'a> Rows<'a> {
    /// Batch element `b` takes row `b`.
    pub fn direct(tensor: &'a Tensor) -> Self {
        Self { tensor, index: None }
    }

    /// Batch element `b` takes row `index[b]`.
    pub fn indexed(tensor: &'a Tensor, index: &'a [u32]) -> Self {
        Self { tensor, index: Some(index) }
    }

    /// The rows as a tensor, one per batch element.
    pub(crate) fn materialise(&self) -> Result<Tensor> {
        match self.index {
            None => Ok(self.tensor.clone()),
            Some(index) => self.tensor.index_select(&Tensor::new(index, self.tensor.device())?, 0),
        }
    }

    /// The row of batch element `b`.
    pub(crate) fn at(&self, b: usize) -> Result<usize> {
        let row = match self.index {
            None => Some(b),
            Some(index) => index.get(b).map(|&i| i as usize),
        };
        match row {
            Some(row) if row < self.tensor.dim(0)? => Ok(row),
            _ => bail!("no row for batch element {b} among {:?}", self.tensor.shape()),
        }
    }
}

/// Whether the CPU kernels can read the tensor.
pub(crate) fn is_cpu_f32(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// Converts half precision to f32, since norms and softmax need its range and precision.
pub(crate) fn full_precision(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

/// The values of a contiguous f32 CPU storage.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("a contiguous f32 tensor is needed, found {:?} {layout:?}", storage_dtype(storage)),
    }
}

/// Calls `f` with the values of a contiguous f32 CPU tensor.
pub(crate) fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(values(storage, layout)?),
        _ => bail!("a tensor on the CPU is needed"),
    }
}

/// Like [`with_values`], but passes `None` for an absent operand.
pub(crate) fn with_optional<R>(tensor: Option<&Tensor>, f: impl FnOnce(Option<&[f32]>) -> Result<R>) -> Result<R> {
    match tensor {
        Some(tensor) => with_values(tensor, |values| f(Some(values))),
        None => f(None),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}
