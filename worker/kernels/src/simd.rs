//! The vector instructions that the CPU's kernels run with.
//!
//! A kernel is written once, for vectors of any width, and compiled for each [`InstructionSet`]. The widest that the machine has
//! is used, or the one that `ELBO_SIMD` names. Each gives the same bits.

use std::str::FromStr;
use std::sync::OnceLock;

use pulp::{Scalar, Simd, WithSimd};

/// Instructions that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstructionSet {
    /// One value at a time, for processors without any of the others. Very slow.
    Scalar,
    /// 8 values at a time, with fused multiply-add (x86-64-v3).
    Avx2,
    /// 16 values at a time (x86-64-v4).
    Avx512,
    /// 4 values at a time, on every 64-bit ARM processor.
    Neon,
}

/// An instruction set that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstructionSetError {
    /// No such name.
    #[error("ELBO_SIMD is '{0}': use scalar, avx2, avx512 or neon, or unset it for the best that the processor has")]
    Unknown(String),
    /// The processor lacks it.
    #[error("ELBO_SIMD is {wanted}, which this processor lacks: unset it, or use {}", list(available))]
    Missing {
        /// The one asked for.
        wanted: InstructionSet,
        /// Those that it has.
        available: Vec<InstructionSet>,
    },
}

fn list(sets: &[InstructionSet]) -> String {
    sets.iter().map(|set| set.name()).collect::<Vec<_>>().join(" or ")
}

impl InstructionSet {
    /// All of them, the slowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];

    /// The name that `ELBO_SIMD` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        struct Nothing;
        impl Kernel for Nothing {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, _: S) {}
        }
        run_with(self, Nothing).is_ok()
    }

    /// Those that this processor has, the slowest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|set| set.is_available()).collect()
    }

    /// The one that this process uses: what `ELBO_SIMD` says, or the best.
    pub fn in_use() -> Result<Self, InstructionSetError> {
        static CHOSEN: OnceLock<Result<InstructionSet, InstructionSetError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| match std::env::var("ELBO_SIMD") {
                Ok(name) if !name.is_empty() => name.parse(),
                _ => Ok(Self::best()),
            })
            .clone()
    }

    fn best() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }
}

impl std::fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for InstructionSet {
    type Err = InstructionSetError;

    fn from_str(name: &str) -> Result<Self, InstructionSetError> {
        let set = Self::ALL.into_iter().find(|set| set.name() == name);
        let wanted = set.ok_or_else(|| InstructionSetError::Unknown(name.into()))?;
        let available = Self::available();
        if available.contains(&wanted) { Ok(wanted) } else { Err(InstructionSetError::Missing { wanted, available }) }
    }
}

/// Code to run with vector instructions enabled.
pub(crate) trait Kernel {
    /// The kernel's result.
    type Output;
    /// Runs the kernel. Implementations are marked `inline(always)` so that they compile with the dispatcher's CPU
    /// features.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

struct Adapter<K>(K);

impl<K: Kernel> WithSimd for Adapter<K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> K::Output {
        self.0.run(simd)
    }
}

/// Runs a kernel with the instruction set in use.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    // A name that can't be used is an error where a device is opened, before any kernel runs.
    let set = InstructionSet::in_use().unwrap_or(InstructionSet::Scalar);
    #[cfg(test)]
    let set = FORCED.get().unwrap_or(set);
    run_with(set, kernel).unwrap_or_else(|kernel| kernel.run(Scalar))
}

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<Option<InstructionSet>> = const { std::cell::Cell::new(None) };
}

/// Runs this thread's kernels with another instruction set.
#[cfg(test)]
pub(crate) fn with<R>(set: InstructionSet, f: impl FnOnce() -> R) -> R {
    FORCED.set(Some(set));
    let result = f();
    FORCED.set(None);
    result
}

/// Runs a kernel with the instruction set, or returns it if this processor lacks that.
fn run_with<K: Kernel>(set: InstructionSet, kernel: K) -> Result<K::Output, K> {
    match set {
        InstructionSet::Scalar => Ok(kernel.run(Scalar)),
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => match pulp::x86::V3::try_new() {
            Some(simd) => Ok(outline(simd, kernel)),
            None => Err(kernel),
        },
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => match pulp::x86::V4::try_new() {
            Some(simd) => Ok(outline(simd, kernel)),
            None => Err(kernel),
        },
        #[cfg(target_arch = "aarch64")]
        InstructionSet::Neon => match pulp::aarch64::Neon::try_new() {
            Some(simd) => Ok(outline(simd, kernel)),
            None => Err(kernel),
        },
        _ => Err(kernel),
    }
}

/// Runs a kernel within another one as a separate function, so that it gets its own register allocation.
#[inline(always)]
pub(crate) fn outline<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
    simd.vectorize(Adapter(kernel))
}
