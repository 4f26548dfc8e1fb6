//! Launches the kernels of `worker/kernels/cuda`.

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use candle_core::{DType, Result, bail};

use super::memory::Pointer;
use super::{Gpu, failed, lock};

/// Threads per block of the kernels that don't choose their own number.
pub(super) const THREADS: u32 = 256;
/// Maximum number of blocks for kernels whose threads stride over their elements: enough to fill any device a few
/// times.
const MOST_BLOCKS: u64 = 4096;
/// Dynamic shared memory, in bytes, that a kernel may use without setting an attribute.
const SHARED: u32 = 48 << 10;

/// One argument.
#[derive(Clone, Copy, Debug)]
enum Argument {
    Pointer(Pointer),
    Word(u32),
    Long(u64),
    Float(f32),
}

/// A kernel with the arguments added so far, in the order of its parameters.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    gpu: &'a Gpu,
    function: CudaFunction,
    arguments: Vec<Argument>,
}

/// The suffix for an element type in kernel names.
pub(super) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        _ => bail!("the device's kernels do not know {dtype:?}"),
    }
}

impl Gpu {
    /// The kernel `name` for an element type.
    pub(super) fn kernel(&self, name: &str, dtype: DType) -> Result<Launch<'_>> {
        let name = format!("{name}_{}", suffix(dtype)?);
        let mut functions = lock(&self.functions);
        let function = match functions.get(&name) {
            Some(function) => function.clone(),
            None => {
                let function = self.module.load_function(&name).map_err(|error| failed(&name, error))?;
                functions.insert(name, function.clone());
                function
            }
        };
        Ok(Launch { gpu: self, function, arguments: Vec::with_capacity(16) })
    }
}

impl Launch<'_> {
    pub(super) fn pointers(mut self, pointers: &[Pointer]) -> Self {
        self.arguments.extend(pointers.iter().map(|pointer| Argument::Pointer(*pointer)));
        self
    }

    pub(super) fn sizes(mut self, sizes: &[usize]) -> Result<Self> {
        for &size in sizes {
            let Ok(size) = u32::try_from(size) else { bail!("a size of {size} is too large for the device") };
            self.arguments.push(Argument::Word(size));
        }
        Ok(self)
    }

    pub(super) fn long(mut self, value: usize) -> Self {
        self.arguments.push(Argument::Long(value as u64));
        self
    }

    pub(super) fn float(mut self, value: f64) -> Self {
        self.arguments.push(Argument::Float(value as f32));
        self
    }

    pub(super) fn flag(mut self, value: bool) -> Self {
        self.arguments.push(Argument::Word(u32::from(value)));
        self
    }

    /// Launches threads that stride over this many elements.
    pub(super) fn over(self, elements: usize) -> Result<()> {
        let blocks = (elements as u64).div_ceil(u64::from(THREADS)).clamp(1, MOST_BLOCKS);
        self.run([blocks as usize, 1, 1], THREADS, 0)
    }

    /// Launches a grid of blocks.
    pub(super) fn run(self, grid: [usize; 3], threads: u32, shared: u32) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        if grid[0] > i32::MAX as usize || grid[1] > 65_535 || grid[2] > 65_535 {
            bail!("a grid of {grid:?} blocks is too large for the device: use a smaller --batch");
        }
        let failed = |error| failed("launching a kernel", error);
        if shared > SHARED {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.function.set_attribute(attribute, shared as i32).map_err(failed)?;
        }
        let mut launch = self.gpu.stream.launch_builder(&self.function);
        for argument in &self.arguments {
            match argument {
                Argument::Pointer(value) | Argument::Long(value) => launch.arg(value),
                Argument::Word(value) => launch.arg(value),
                Argument::Float(value) => launch.arg(value),
            };
        }
        let config = LaunchConfig {
            grid_dim: (grid[0] as u32, grid[1] as u32, grid[2] as u32),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: shared,
        };
        // SAFETY: the arguments match the kernel's declaration and were checked when added; all memory they point to
        // belongs to this stream.
        unsafe { launch.launch(config) }.map_err(failed)?;
        Ok(())
    }
}
