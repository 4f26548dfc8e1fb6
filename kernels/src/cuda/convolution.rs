//! 3x3 convolutions on the device: by cuDNN on channels-last images where it takes them, else as a product over patches.
//!
//! cuDNN's `y = conv(x) + z + bias` is all a resnet needs in one pass. It wants numbers of channels that are multiples of 8
//! and as much padding after the image as before; f32 stays with the product, which is never computed in TF32.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{DType, Result, Tensor, bail};

use super::memory::Pointer;
use super::norm::Group;
use super::product::Operands;
use super::{Gpu, failed, lock};
use crate::{Padding, Rows};

/// Bytes of patches at once.
const PATCHES: usize = 256 << 20;
/// The algorithm: the only one that adds bias and residual. It sums every output in one piece.
const ALGORITHM: sys::cudnnConvolutionFwdAlgo_t =
    sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM;

/// A convolution's weights and settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convolution<'a> {
    /// `[Cout, 3, 3, Cin]`.
    pub(crate) weight: &'a Tensor,
    /// `[Cout]`.
    pub(crate) bias: &'a Tensor,
    /// Pixels from one output to the next.
    pub(crate) stride: usize,
    /// Zeros around the image.
    pub(crate) padding: Padding,
}

/// What surrounds a convolution: see [`crate::Fused`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Surroundings<'a> {
    pub(crate) norm: Option<Group<'a>>,
    pub(crate) shift: Option<Rows<'a>>,
    pub(crate) residual: Option<Rows<'a>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    dtype: DType,
    images: usize,
    height: usize,
    width: usize,
    inputs: usize,
    outputs: usize,
    stride: usize,
    before: usize,
}

impl Shape {
    fn out_side(&self, side: usize) -> usize {
        (side + self.before + 1 - 3) / self.stride + 1
    }

    fn out_height(&self) -> usize {
        self.out_side(self.height)
    }

    fn out_width(&self) -> usize {
        self.out_side(self.width)
    }
}

/// cuDNN, and the convolutions it has been asked for.
#[derive(Debug)]
pub(super) struct Convolutions {
    handle: sys::cudnnHandle_t,
    activation: sys::cudnnActivationDescriptor_t,
    workspace: Option<CudaSlice<u8>>,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: cuDNN's handles may be used from any thread, by one at a time.
unsafe impl Send for Convolutions {}

/// Descriptions of a convolution's operands. They live as long as the process: there are as many as shapes.
#[derive(Clone, Copy, Debug)]
struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    weight: sys::cudnnFilterDescriptor_t,
    bias: sys::cudnnTensorDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    workspace: usize,
}

impl Convolutions {
    /// None where cuDNN is not installed.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Option<Self>> {
        // SAFETY: only looks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let start = || -> std::result::Result<Self, CudnnError> {
            let handle = result::create_handle()?;
            let activation = result::create_activation_descriptor()?;
            // SAFETY: both were just made, and the stream outlives the handle.
            unsafe {
                result::set_stream(handle, stream.cu_stream().cast())?;
                let identity = sys::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY;
                let propagate = sys::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN;
                result::set_activation_descriptor(activation, identity, propagate, 0.0)?;
            }
            Ok(Self { handle, activation, workspace: None, plans: HashMap::new() })
        };
        start().map(Some).map_err(|error| failed("starting cuDNN", error))
    }

    fn plan(&mut self, shape: Shape) -> Result<Plan> {
        if let Some(plan) = self.plans.get(&shape) {
            return Ok(*plan);
        }
        let plan = Plan::new(self.handle, shape).map_err(|error| failed(&format!("planning {shape:?}"), error))?;
        self.plans.insert(shape, plan);
        Ok(plan)
    }
}

impl Plan {
    fn new(handle: sys::cudnnHandle_t, shape: Shape) -> std::result::Result<Self, CudnnError> {
        let int = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
        let dtype = match shape.dtype {
            DType::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            _ => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        };
        let nhwc = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let [images, inputs, outputs] = [shape.images, shape.inputs, shape.outputs].map(int);
        let [height, width] = [shape.height, shape.width].map(int);
        let tensor = |dims: [i32; 4]| {
            let descriptor = result::create_tensor_descriptor()?;
            // SAFETY: it was just made.
            unsafe { result::set_tensor4d_descriptor(descriptor, nhwc, dtype, dims)? };
            Ok(descriptor)
        };
        let (x, y) = (
            tensor([images, inputs, height, width])?,
            tensor([images, outputs, int(shape.out_height()), int(shape.out_width())])?,
        );
        let (weight, bias) = (result::create_filter_descriptor()?, tensor([1, outputs, 1, 1])?);
        let convolution = result::create_convolution_descriptor()?;
        let (pad, stride) = (int(shape.before), int(shape.stride));
        // SAFETY: all descriptors were just made.
        let workspace = unsafe {
            result::set_filter4d_descriptor(weight, dtype, nhwc, [outputs, inputs, 3, 3])?;
            let (mode, float) =
                (sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION, sys::cudnnDataType_t::CUDNN_DATA_FLOAT);
            result::set_convolution2d_descriptor(convolution, pad, pad, stride, stride, 1, 1, mode, float)?;
            result::set_convolution_math_type(convolution, sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH)?;
            result::get_convolution_forward_workspace_size(handle, x, weight, convolution, y, ALGORITHM)?
        };
        Ok(Self { x, weight, bias, y, convolution, workspace })
    }
}

impl Gpu {
    /// `x [B, H, W, Cin]` to `[B, H', W', Cout]`.
    pub(crate) fn convolve(&self, x: &Tensor, conv: Convolution<'_>, around: Surroundings<'_>) -> Result<Tensor> {
        let x = match around.norm {
            Some(norm) => self.group_norm(x, norm, true)?,
            None => x.contiguous()?,
        };
        let (images, height, width, inputs) = x.dims4()?;
        let (outputs, before) = (conv.weight.dim(0)?, conv.padding.before());
        let dtype = x.dtype();
        if conv.weight.dims() != [outputs, 3, 3, inputs] || height + before < 2 || width + before < 2 {
            bail!("a convolution {:?} was given {:?}", conv.weight.shape(), x.shape());
        }
        let shape = Shape { dtype, images, height, width, inputs, outputs, stride: conv.stride, before };
        let (out, to) = self.output(dtype, (images, shape.out_height(), shape.out_width(), outputs))?;
        let direct = match around.residual {
            Some(Rows { tensor, index: None }) => self.operand(Some(tensor), dtype, out.elem_count())?,
            _ => 0,
        };
        let operands = Operands {
            x: self.pointer(&x)?,
            weight: self.operand(Some(conv.weight), dtype, 9 * inputs * outputs)?,
            bias: self.operand(Some(conv.bias), dtype, outputs)?,
            residual: direct,
            out: to,
        };
        let whole = conv.padding == Padding::Around && inputs.is_multiple_of(8) && outputs.is_multiple_of(8);
        match &self.convolutions {
            Some(cudnn) if whole && dtype != DType::F32 => self.by_cudnn(&mut lock(cudnn), shape, operands)?,
            _ => self.by_patches(shape, operands)?,
        }
        let looked_up = around.residual.filter(|rows| rows.index.is_some());
        if around.shift.is_some() || looked_up.is_some() {
            self.add(&out, None, around.shift, looked_up)?;
        }
        Ok(out)
    }

    fn by_cudnn(&self, cudnn: &mut Convolutions, shape: Shape, operands: Operands) -> Result<()> {
        let plan = cudnn.plan(shape)?;
        if cudnn.workspace.as_ref().is_none_or(|workspace| workspace.len() < plan.workspace) {
            // SAFETY: its content means nothing between convolutions; the old one is freed in the stream's order.
            let larger = unsafe { self.stream.alloc::<u8>(plan.workspace.max(1)) };
            cudnn.workspace = Some(larger.map_err(|error| failed("memory for convolutions", error))?);
        }
        let workspace = cudnn.workspace.as_ref().map_or(0, |workspace| workspace.device_ptr(&self.stream).0);
        let (one, alpha) = (1f32, if operands.residual == 0 { 0f32 } else { 1f32 });
        let residual = if operands.residual == 0 { operands.out } else { operands.residual };
        let address = |pointer: Pointer| pointer as *const c_void;
        self.stream.context().bind_to_thread().map_err(|error| failed("using the device", error))?;
        // SAFETY: the operands are memory of this device with as many values as the descriptors say, used in this stream alone.
        unsafe {
            result::convolution_bias_activation_forward(
                cudnn.handle,
                std::ptr::from_ref(&one).cast(),
                plan.x,
                address(operands.x),
                plan.weight,
                address(operands.weight),
                plan.convolution,
                ALGORITHM,
                workspace as *mut c_void,
                plan.workspace,
                std::ptr::from_ref(&alpha).cast(),
                plan.y,
                address(residual),
                plan.bias,
                address(operands.bias),
                cudnn.activation,
                plan.y,
                operands.out as *mut c_void,
            )
        }
        .map_err(|error| failed("a convolution", error))
    }

    /// Writes patches out, so many images at a time as there is room for, and multiplies them.
    fn by_patches(&self, shape: Shape, operands: Operands) -> Result<()> {
        let (pixels, size) = (shape.out_height() * shape.out_width(), shape.dtype.size_in_bytes());
        let patch = 9 * shape.inputs;
        let at_once = (PATCHES / (pixels * patch * size).max(1)).clamp(1, shape.images.max(1));
        let (_patches, scratch) = self.output(shape.dtype, (at_once, pixels, patch))?;
        let offset = |pointer: Pointer, values: usize| if pointer == 0 { 0 } else { pointer + (values * size) as u64 };
        for first in (0..shape.images).step_by(at_once) {
            let images = at_once.min(shape.images - first);
            let Shape { height, width, inputs, outputs, stride, before, .. } = shape;
            let from = offset(operands.x, first * height * width * inputs);
            self.kernel("im2col", shape.dtype)?
                .pointers(&[from, scratch])
                .sizes(&[images, height, width, inputs, shape.out_height(), shape.out_width(), stride, before])?
                .over(images * pixels * patch)?;
            let done = first * pixels * outputs;
            let operands = Operands {
                x: scratch,
                residual: offset(operands.residual, done),
                out: offset(operands.out, done),
                ..operands
            };
            self.product(operands, images * pixels, patch, outputs, shape.dtype)?;
        }
        Ok(())
    }
}
