//! 3x3 convolutions on the device: by cuDNN on channels-last images if it supports the shape, else as a product over
//! patches.
//!
//! cuDNN's `y = conv(x) + z + bias` does all that a resnet needs in one pass. It requires numbers of channels that are
//! multiples of 8 and equal padding before and after the image. f32 always uses the product, which is never computed in
//! TF32. If cuDNN refuses the fused form for a shape, bias and residual are added afterwards. If it refuses the
//! convolution itself, or does not start at all, the product over patches is used.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::result::{self, CudnnError};
use candle_core::cuda_backend::cudarc::cudnn::sys;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{DType, Result, Tensor, bail};

use super::memory::Pointer;
use super::norm::Group;
use super::product::{Dimensions, Operands};
use super::{Gpu, failed, lock};
use crate::profile::{Part, timed};
use crate::{Padding, Rows};

/// Maximum bytes of patches at once.
const PATCHES: usize = 256 << 20;
/// Maximum number of values in a tensor passed to cuDNN, which counts them in 32 bits.
const MOST_VALUES: usize = i32::MAX as usize;
/// The only algorithm that adds bias and residual. It computes every output's sum in one piece.
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

/// Operations around a convolution; see [`crate::Fused`].
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

    /// Values of an image's output.
    fn out_values(&self) -> usize {
        self.out_height() * self.out_width() * self.outputs
    }
}

impl Operands {
    /// The operands for the images from `first` on.
    fn from_image(self, first: usize, shape: Shape) -> Self {
        let offset = |pointer: Pointer, of_image: usize| match pointer {
            0 => 0,
            pointer => pointer + (first * of_image * shape.dtype.size_in_bytes()) as u64,
        };
        Self {
            x: offset(self.x, shape.height * shape.width * shape.inputs),
            residual: offset(self.residual, shape.out_values()),
            out: offset(self.out, shape.out_values()),
            ..self
        }
    }
}

/// Which part of a convolution cuDNN computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// All of it.
    Fused,
    /// The convolution; bias and residual are added afterwards.
    Alone,
}

/// Whether an error means that cuDNN can't run the request, so that another method may work: any error except a lack of
/// memory. On a lost device, the other method fails too.
fn refused(error: CudnnError) -> bool {
    use sys::cudnnStatus_t as Status;
    !matches!(
        error.0,
        Status::CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
            | Status::CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED
    )
}

/// The cuDNN handle, and a plan for each convolution it was asked for.
#[derive(Debug)]
pub(super) struct Convolutions {
    handle: sys::cudnnHandle_t,
    activation: sys::cudnnActivationDescriptor_t,
    workspace: Option<CudaSlice<u8>>,
    /// `None` for shapes that are computed over patches.
    plans: HashMap<Shape, Option<Plan>>,
}

// SAFETY: any thread may use a cuDNN handle, one at a time.
unsafe impl Send for Convolutions {}

/// Descriptors of a convolution's operands. There is one plan per shape, and it lives as long as the process.
#[derive(Clone, Copy, Debug)]
struct Plan {
    x: sys::cudnnTensorDescriptor_t,
    weight: sys::cudnnFilterDescriptor_t,
    bias: sys::cudnnTensorDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    convolution: sys::cudnnConvolutionDescriptor_t,
    workspace: usize,
    extent: Extent,
}

impl Convolutions {
    /// `None` if cuDNN is not installed or does not start.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Option<Self> {
        // SAFETY: this only checks whether the library can be opened.
        if !unsafe { sys::is_culib_present() } {
            tracing::warn!("cuDNN is missing: convolutions are slower without it");
            return None;
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
        let started = start();
        if let Err(error) = &started {
            tracing::warn!(%error, "cuDNN does not start: convolutions are slower without it");
        }
        started.ok()
    }

    /// How cuDNN computes a shape, if it can.
    fn plan(&mut self, shape: Shape) -> std::result::Result<Option<Plan>, CudnnError> {
        if let Some(plan) = self.plans.get(&shape) {
            return Ok(*plan);
        }
        let plan = match Plan::new(self.handle, shape) {
            Err(error) if refused(error) => {
                tracing::warn!(?shape, %error, "cuDNN refuses a convolution: it is computed over patches");
                None
            }
            plan => Some(plan?),
        };
        self.plans.insert(shape, plan);
        Ok(plan)
    }

    /// Uses cuDNN for a smaller part of this shape's convolution from now on.
    fn ask_less(&mut self, shape: Shape, plan: Plan, error: CudnnError) {
        let less = match plan.extent {
            Extent::Fused => Some(Plan { extent: Extent::Alone, ..plan }),
            Extent::Alone => None,
        };
        let instead =
            if less.is_some() { "bias and residual are added afterwards" } else { "it is computed over patches" };
        tracing::warn!(?shape, %error, "cuDNN refuses a convolution: {instead}");
        self.plans.insert(shape, less);
    }

    /// Makes sure that the workspace has at least this many bytes.
    fn reserve(&mut self, stream: &Arc<CudaStream>, bytes: usize) -> Result<()> {
        if self.workspace.as_ref().is_none_or(|workspace| workspace.len() < bytes) {
            // The old workspace is freed in stream order, so its memory is available for the new one.
            self.workspace = None;
            // SAFETY: nothing reads its content between convolutions.
            let larger = unsafe { stream.alloc::<u8>(bytes.max(1)) };
            self.workspace = Some(larger.map_err(|error| failed("memory for convolutions", error))?);
        }
        Ok(())
    }

    /// Computes the part of a convolution that the plan covers.
    fn run(
        &mut self,
        stream: &Arc<CudaStream>,
        plan: &Plan,
        operands: Operands,
    ) -> std::result::Result<(), CudnnError> {
        let Self { handle, activation, workspace, .. } = self;
        let workspace = workspace.as_ref().map_or(0, |workspace| workspace.device_ptr(stream).0) as *mut c_void;
        let (zero, one) = (0f32, 1f32);
        let factor = |value: &f32| std::ptr::from_ref(value).cast();
        let address = |pointer: Pointer| pointer as *const c_void;
        let out = operands.out as *mut c_void;
        let (x, weight) = (address(operands.x), address(operands.weight));
        // SAFETY: the operands are memory of this device, as large as the descriptors say, and used only in this
        // stream.
        unsafe {
            match plan.extent {
                Extent::Fused => {
                    let (of_residual, residual) = match operands.residual {
                        0 => (&zero, operands.out),
                        residual => (&one, residual),
                    };
                    result::convolution_bias_activation_forward(
                        *handle,
                        factor(&one),
                        plan.x,
                        x,
                        plan.weight,
                        weight,
                        plan.convolution,
                        ALGORITHM,
                        workspace,
                        plan.workspace,
                        factor(of_residual),
                        plan.y,
                        address(residual),
                        plan.bias,
                        address(operands.bias),
                        *activation,
                        plan.y,
                        out,
                    )
                }
                Extent::Alone => result::convolution_forward(
                    *handle,
                    factor(&one),
                    plan.x,
                    x,
                    plan.weight,
                    weight,
                    plan.convolution,
                    ALGORITHM,
                    workspace,
                    plan.workspace,
                    factor(&zero),
                    plan.y,
                    out,
                ),
            }
        }
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
        Ok(Self { x, weight, bias, y, convolution, workspace, extent: Extent::Fused })
    }
}

impl Gpu {
    /// `x [B, H, W, Cin]` to `[B, H', W', Cout]`.
    pub(crate) fn convolve(&self, x: &Tensor, conv: Convolution<'_>, around: Surroundings<'_>) -> Result<Tensor> {
        let x = match around.norm {
            Some(norm) => timed(x, Part::Norm, "group-norm", 0, || self.group_norm(x, norm, true))?,
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
        let flops = 2 * 9 * inputs * out.elem_count();
        timed(&x, Part::Convolution, "conv2d", flops, || match &self.convolutions {
            Some(cudnn) if whole && dtype != DType::F32 => self.by_cudnn(&mut lock(cudnn), shape, operands),
            _ => self.by_patches(shape, operands),
        })?;
        let looked_up = around.residual.filter(|rows| rows.index.is_some());
        if around.shift.is_some() || looked_up.is_some() {
            timed(&x, Part::Other, "add", 0, || self.add(&out, None, around.shift, looked_up))?;
        }
        Ok(out)
    }

    /// Runs cuDNN on as many images at a time as its 32-bit counts allow.
    fn by_cudnn(&self, cudnn: &mut Convolutions, shape: Shape, operands: Operands) -> Result<()> {
        let of_image = (shape.height * shape.width * shape.inputs).max(shape.out_values());
        let at_once = (MOST_VALUES / of_image.max(1)).max(1);
        for first in (0..shape.images).step_by(at_once) {
            let part = Shape { images: at_once.min(shape.images - first), ..shape };
            let operands = operands.from_image(first, shape);
            if !self.part_by_cudnn(cudnn, part, operands)? {
                self.by_patches(part, operands)?;
            }
        }
        Ok(())
    }

    /// Computes the convolution with cuDNN as far as it can; returns false if it can't at all.
    fn part_by_cudnn(&self, cudnn: &mut Convolutions, shape: Shape, operands: Operands) -> Result<bool> {
        self.bind()?;
        let planned =
            |cudnn: &mut Convolutions| cudnn.plan(shape).map_err(|error| failed(&format!("planning {shape:?}"), error));
        while let Some(plan) = planned(cudnn)? {
            cudnn.reserve(&self.stream, plan.workspace)?;
            match cudnn.run(&self.stream, &plan, operands) {
                Ok(()) if plan.extent == Extent::Fused => return Ok(true),
                Ok(()) => {
                    let Operands { bias, residual, out, .. } = operands;
                    self.kernel("add", shape.dtype)?
                        .pointers(&[out, bias, 0, 0, residual, 0])
                        .sizes(&[shape.images, shape.out_height() * shape.out_width(), shape.outputs])?
                        .over(shape.images * shape.out_values())?;
                    return Ok(true);
                }
                Err(error) if refused(error) => cudnn.ask_less(shape, plan, error),
                Err(error) => return Err(failed("a convolution", error)),
            }
        }
        Ok(false)
    }

    /// Writes out patches of as many images at a time as there is room for, and multiplies them.
    fn by_patches(&self, shape: Shape, operands: Operands) -> Result<()> {
        let (pixels, size) = (shape.out_height() * shape.out_width(), shape.dtype.size_in_bytes());
        let patch = 9 * shape.inputs;
        let at_once = (PATCHES / (pixels * patch * size).max(1)).clamp(1, shape.images.max(1));
        let (_patches, scratch) = self.output(shape.dtype, (at_once, pixels, patch))?;
        for first in (0..shape.images).step_by(at_once) {
            let images = at_once.min(shape.images - first);
            let Shape { height, width, inputs, outputs, stride, before, .. } = shape;
            let operands = operands.from_image(first, shape);
            self.kernel("im2col", shape.dtype)?
                .pointers(&[operands.x, scratch])
                .sizes(&[images, height, width, inputs, shape.out_height(), shape.out_width(), stride, before])?
                .over(images * pixels * patch)?;
            let layer = Dimensions { images, positions: pixels, inputs: patch, outputs };
            self.product(Operands { x: scratch, ..operands }, layer, shape.dtype)?;
        }
        Ok(())
    }
}
