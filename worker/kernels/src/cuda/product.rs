//! Matrix products with bias and residual, by cuBLASLt.
//!
//! `out [rows, outputs] = x [rows, inputs] W^T + bias + residual`. cuBLASLt is column-major, so it sees W as `[inputs,
//! outputs]`, transposed, and x and out as `[inputs, rows]` and `[outputs, rows]`. f32 products are f32 throughout (no
//! TF32); half types are summed in f32 and rounded once.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulPreferenceAttributes_t, cudaDataType_t,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{DType, Result, Tensor, bail};

use super::memory::Pointer;
use super::{Gpu, failed, lock};
use crate::Rows;

/// Memory the products may use besides their operands, in bytes: NVIDIA's recommendation for Hopper and newer.
const WORKSPACE: usize = 32 << 20;
/// Number of images for which a layer's algorithm is chosen: about as many as in a large batch.
const TYPICAL_IMAGES: usize = 32;
/// Operands must start at multiples of this many bytes.
const ALIGNMENT: u32 = 16;

/// A layer, applied to some images.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dimensions {
    pub(super) images: usize,
    /// Rows per image.
    pub(super) positions: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// The key for choosing an algorithm: everything but the number of images, since results must not depend on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layer {
    dtype: DType,
    positions: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    residual: bool,
}

/// The library handle, and the algorithms and problems found so far.
#[derive(Debug)]
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    algorithms: HashMap<Layer, cublasLtMatmulAlgo_t>,
    problems: HashMap<(Layer, usize), ProductShape>,
}

// SAFETY: any thread may use cuBLASLt's handles and descriptors, one at a time.
unsafe impl Send for Products {}

/// A layer for a given number of rows.
#[derive(Debug)]
struct ProductShape {
    product: Description,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithm: cublasLtMatmulAlgo_t,
}

#[derive(Debug)]
struct Description(sys::cublasLtMatmulDesc_t);

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: the library created it, and it is destroyed once. Destroying a valid one can't fail.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.problems.clear();
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn data_type(dtype: DType) -> Result<cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(cudaDataType_t::CUDA_R_32F),
        DType::F16 => Ok(cudaDataType_t::CUDA_R_16F),
        DType::BF16 => Ok(cudaDataType_t::CUDA_R_16BF),
        _ => bail!("products of {dtype:?} are not supported"),
    }
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = result::create_handle().map_err(|error| failed("starting cuBLASLt", error))?;
        // SAFETY: nothing reads its content between products.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) };
        let workspace = workspace.map_err(|error| failed("memory for products", error))?;
        Ok(Self { handle, workspace, algorithms: HashMap::new(), problems: HashMap::new() })
    }

    fn problem(&mut self, layer: Layer, rows: usize) -> Result<&ProductShape> {
        let (handle, algorithms) = (self.handle, &mut self.algorithms);
        match self.problems.entry((layer, rows)) {
            std::collections::hash_map::Entry::Occupied(known) => Ok(known.into_mut()),
            std::collections::hash_map::Entry::Vacant(new) => {
                let problem = ProductShape::new(handle, algorithms, layer, rows);
                Ok(new.insert(problem.map_err(|error| {
                    failed(&format!("a product of {rows} rows of {} by {}", layer.inputs, layer.outputs), error)
                })?))
            }
        }
    }
}

impl ProductShape {
    fn new(
        handle: sys::cublasLtHandle_t,
        algorithms: &mut HashMap<Layer, cublasLtMatmulAlgo_t>,
        layer: Layer,
        rows: usize,
    ) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let mut problem = Self::described(layer, rows)?;
        problem.algorithm = match algorithms.get(&layer) {
            Some(&algorithm) if problem.takes(handle, &algorithm) => algorithm,
            // An algorithm for many rows may not support this few.
            Some(_) => problem.choose(handle)?,
            None => {
                match Self::described(layer, TYPICAL_IMAGES * layer.positions)?.choose(handle) {
                    Ok(typical) => {
                        algorithms.insert(layer, typical);
                        if problem.takes(handle, &typical) { typical } else { problem.choose(handle)? }
                    }
                    // The typical number of images may be more than the library supports for this layer.
                    Err(_) => problem.choose(handle)?,
                }
            }
        };
        Ok(problem)
    }

    /// The descriptors, without an algorithm yet.
    fn described(layer: Layer, rows: usize) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let Layer { dtype, inputs, outputs, bias, .. } = layer;
        let dtype = data_type(dtype)?;
        let layout = |rows: usize, columns: usize| {
            result::create_matrix_layout(dtype, rows as u64, columns as u64, rows as i64).map(Layout)
        };
        let product = Description(result::create_matmul_desc(
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cudaDataType_t::CUDA_R_32F,
        )?);
        product.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &cublasOperation_t::CUBLAS_OP_T)?;
        if bias {
            let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            product.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            product.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &dtype)?;
        }
        Ok(Self {
            product,
            weight: layout(inputs, outputs)?,
            x: layout(inputs, rows)?,
            out: layout(outputs, rows)?,
            algorithm: cublasLtMatmulAlgo_t { data: [0; 8] },
        })
    }

    /// Whether an algorithm supports this problem.
    fn takes(&self, handle: sys::cublasLtHandle_t, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        let mut found = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
        // SAFETY: all handles are alive; `found` is written if the call succeeds, and read only then.
        unsafe {
            let checked = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.product.0,
                self.weight.0,
                self.x.0,
                self.out.0,
                self.out.0,
                algorithm,
                found.as_mut_ptr(),
            );
            checked.result().is_ok() && found.assume_init().workspaceSize <= WORKSPACE
        }
    }

    /// The library's choice among the algorithms that compute every sum in one piece.
    fn choose(&self, handle: sys::cublasLtHandle_t) -> std::result::Result<cublasLtMatmulAlgo_t, CublasError> {
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference(result::create_matmul_pref()?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &0u32)?;
        for alignment in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(alignment, &ALIGNMENT)?;
        }
        // SAFETY: all handles are alive.
        let found = unsafe {
            let (out, product) = (self.out.0, self.product.0);
            result::get_matmul_algo_heuristic(handle, product, self.weight.0, self.x.0, out, out, preference.0)
        };
        Ok(found?.algo)
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn set<T>(
        &self,
        attribute: cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> std::result::Result<(), CublasError> {
        // SAFETY: the value is read during the call, as so many bytes.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: the library created it, and it is destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Description {
    fn set<T>(&self, attribute: cublasLtMatmulDescAttributes_t, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the value is read during the call, as so many bytes.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

/// Addresses of a product's operands; 0 if there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) x: Pointer,
    pub(super) weight: Pointer,
    pub(super) bias: Pointer,
    /// Laid out like the output.
    pub(super) residual: Pointer,
    pub(super) out: Pointer,
}

impl Gpu {
    /// `x [.., inputs] W^T` for `W [outputs, inputs]`, with bias `[outputs]` and one residual `[.., outputs]` per image.
    pub(crate) fn linear(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        residual: Option<Rows<'_>>,
    ) -> Result<Tensor> {
        let x = x.contiguous()?;
        let ((outputs, inputs), dtype) = (weight.dims2()?, x.dtype());
        let mut dims = x.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == inputs => *last = outputs,
            _ => bail!("a linear layer of {inputs} inputs was given {:?}", x.shape()),
        }
        let (images, rows) = (dims[0], x.elem_count() / inputs.max(1));
        let (out, to) = self.output(dtype, dims)?;
        // A residual with an index is first gathered into the output, where the product adds to it.
        let residual = match residual {
            Some(rows @ Rows { index: None, .. }) => self.operand(Some(rows.tensor), dtype, out.elem_count())?,
            Some(Rows { tensor, index: Some(index) }) => {
                let len = out.elem_count() / images.max(1);
                let (from, index_at) = self.rows(Some(Rows::indexed(tensor, index)), dtype, images, len)?;
                let gather = self.kernel("gather", dtype)?.pointers(&[from, index_at.pointer, to]);
                gather.sizes(&[images])?.long(len).over(out.elem_count())?;
                to
            }
            None => 0,
        };
        let operands = Operands {
            x: self.pointer(&x)?,
            weight: self.operand(Some(weight), dtype, inputs * outputs)?,
            bias: self.operand(bias, dtype, outputs)?,
            residual,
            out: to,
        };
        self.product(operands, Dimensions { images, positions: rows / images.max(1), inputs, outputs }, dtype)?;
        Ok(out)
    }

    /// Runs a product over the rows of some images.
    pub(super) fn product(&self, operands: Operands, dimensions: Dimensions, dtype: DType) -> Result<()> {
        let Dimensions { images, positions, inputs, outputs } = dimensions;
        let rows = images * positions;
        if rows == 0 || inputs == 0 || outputs == 0 {
            return Ok(());
        }
        let Operands { x, weight, bias, residual, out } = operands;
        if let Some(pointer) = [x, weight, residual, out].iter().find(|p| *p % u64::from(ALIGNMENT) != 0) {
            bail!("an operand of a product at {pointer:#x}, which is not a multiple of {ALIGNMENT}");
        }
        // Choosing an algorithm already needs the device.
        self.bind()?;
        let mut products = lock(&self.products);
        let (handle, workspace) = (products.handle, products.workspace.device_ptr(&self.stream).0);
        let layer = Layer { dtype, positions, inputs, outputs, bias: bias != 0, residual: residual != 0 };
        let problem = products.problem(layer, rows)?;
        let failed = |error| failed("a product", error);
        if bias != 0 {
            let attribute = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            problem.product.set(attribute, &bias).map_err(failed)?;
        }
        let (one, beta) = (1f32, if residual == 0 { 0f32 } else { 1f32 });
        let address = |pointer: Pointer| pointer as *const c_void;
        // SAFETY: the operands are memory of this device, as large as the layouts say, and used only in this stream.
        unsafe {
            result::matmul(
                handle,
                problem.product.0,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                address(weight),
                problem.weight.0,
                address(x),
                problem.x.0,
                address(if residual == 0 { out } else { residual }),
                problem.out.0,
                out as *mut c_void,
                problem.out.0,
                &raw const problem.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(failed)
    }
}
