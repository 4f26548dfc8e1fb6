//! Activation functions.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use pulp::Simd;

use super::cpu::{is_cpu_f32, values};
use super::math::{gelu, gelu_tanh, quick_gelu, silu};
use super::profile::{Part, timed};
use super::simd::{Kernel, dispatch};

/// An elementwise activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)`, where `Phi` is the exact normal distribution function.
    Gelu,
    /// `x Phi(x)`, where `Phi` is approximated by a hyperbolic tangent.
    GeluTanh,
    /// `x sigmoid(1.702 x)`.
    QuickGelu,
}

/// Applies an activation to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    timed(x, Part::Other, "activation", 0, || {
        on_gpu!(x, gpu => gpu.activate(x, activation));
        if is_cpu_f32(x) { x.contiguous()?.apply_op1_no_bwd(&Elementwise(activation)) } else { plain(x, activation) }
    })
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::QuickGelu => x / ((x * -1.702)?.exp()? + 1.0)?,
    }
}

/// The gated linear unit of a transformer's feed-forward: maps `x [.., 2C]`, with halves `(h, g)`, to `h gelu(g) [..,
/// C]`.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    timed(x, Part::Other, "geglu", 0, || {
        on_gpu!(x, gpu => gpu.geglu(x));
        if is_cpu_f32(x) { x.contiguous()?.apply_op1_no_bwd(&Geglu) } else { plain_geglu(x) }
    })
}

/// The same in plain candle operations, for any device and data type.
pub(crate) fn plain_geglu(x: &Tensor) -> Result<Tensor> {
    let halves = x.chunk(2, D::Minus1)?;
    &halves[0] * halves[1].gelu_erf()?
}

struct Elementwise(Activation);

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = values(storage, layout)?.to_vec();
        dispatch(InPlace { values: &mut out, activation: self.0 });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

struct InPlace<'a> {
    values: &'a mut [f32],
    activation: Activation,
}

impl Kernel for InPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.activation {
            Activation::Silu => self.values.iter_mut().for_each(|v| *v = silu(*v)),
            Activation::Gelu => self.values.iter_mut().for_each(|v| *v = gelu(*v)),
            Activation::GeluTanh => self.values.iter_mut().for_each(|v| *v = gelu_tanh(*v)),
            Activation::QuickGelu => self.values.iter_mut().for_each(|v| *v = quick_gelu(*v)),
        }
    }
}

struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut dims = layout.dims().to_vec();
        let Some(last) = dims.last_mut().filter(|d| **d > 0 && **d % 2 == 0) else {
            bail!("a gated unit needs an even number of channels, found {:?}", layout.shape());
        };
        *last /= 2;
        let channels = *last;
        let mut out = vec![0.0; x.len() / 2];
        dispatch(Gate { x, channels, out: &mut out });
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}

/// `out [rows, channels]` from `x [rows, 2 channels]`.
pub(crate) struct Gate<'a> {
    /// Halves `(h, g)` of every row.
    pub(crate) x: &'a [f32],
    /// Width of a half.
    pub(crate) channels: usize,
    /// `h gelu(g)`.
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.x.chunks_exact(2 * self.channels);
        for (x, out) in rows.zip(self.out.chunks_exact_mut(self.channels)) {
            let (hidden, gate) = x.split_at(self.channels);
            for ((out, &h), &g) in out.iter_mut().zip(hidden).zip(gate) {
                *out = h * gelu(g);
            }
        }
    }
}
