//! Profiles where an engine spends its time. While a profile is taken, every operation records its kind, its time and
//! its arithmetic.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Result, Tensor};

/// The kind of work of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Convolutions; on the CPU including the norm before them, which is part of the operation there.
    Convolution,
    /// Linear layers and feed-forwards.
    Linear,
    /// Attention.
    Attention,
    /// Norms and modulations.
    Norm,
    /// Activations and copies.
    Other,
}

impl Part {
    /// Every part with its name.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Convolution, "conv"),
        (Self::Linear, "linear"),
        (Self::Attention, "attention"),
        (Self::Norm, "norm"),
        (Self::Other, "other"),
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(part, _)| *part == self).map_or("", |(_, name)| name)
    }
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Its kind of work.
    pub part: Part,
    /// Its name.
    pub name: &'static str,
    /// The thread it ran on, numbered from 0 in order of appearance.
    pub thread: u32,
    /// When it began, relative to the profile's start.
    pub start: Duration,
    /// How long it took.
    pub time: Duration,
    /// Floating point operations of its products, a multiply-add being two.
    pub flops: u64,
}

/// A profile being taken. There is one at a time per process; a second one waits for the first.
#[derive(Debug)]
pub struct Profile {
    _only: MutexGuard<'static, ()>,
}

static ON: AtomicBool = AtomicBool::new(false);
static ONE: Mutex<()> = Mutex::new(());
static SPANS: Mutex<Option<(Instant, Vec<Span>)>> = Mutex::new(None);
static THREADS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static THREAD: u32 = THREADS.fetch_add(1, Ordering::Relaxed);
}

fn spans() -> MutexGuard<'static, Option<(Instant, Vec<Span>)>> {
    SPANS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Profile {
    /// Starts recording the operations of all threads.
    pub fn start() -> Self {
        let only = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        *spans() = Some((Instant::now(), Vec::new()));
        ON.store(true, Ordering::Relaxed);
        Self { _only: only }
    }

    /// Stops recording; returns the operations and the duration.
    pub fn finish(self) -> (Vec<Span>, Duration) {
        ON.store(false, Ordering::Relaxed);
        spans().take().map_or_else(Default::default, |(start, spans)| (spans, start.elapsed()))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        ON.store(false, Ordering::Relaxed);
    }
}

/// Runs an operation on `x` that takes `flops` floating point operations, and records it if a profile is being taken.
///
/// On a GPU this uses the GPU's clock and waits for it, so operations run one after the other while a profile is taken.
pub(crate) fn timed<R>(
    x: &Tensor,
    part: Part,
    name: &'static str,
    flops: usize,
    operation: impl FnOnce() -> Result<R>,
) -> Result<R> {
    if !ON.load(Ordering::Relaxed) {
        return operation();
    }
    let began = Instant::now();
    #[cfg(feature = "cuda")]
    let before = crate::gpu_timer::mark(x)?;
    let result = operation();
    #[cfg(feature = "cuda")]
    let on_device = match (before, crate::gpu_timer::mark(x)?) {
        (Some(before), Some(after)) => Some(before.until(&after)?),
        _ => None,
    };
    #[cfg(not(feature = "cuda"))]
    let (on_device, _) = (None::<Duration>, x);
    let time = on_device.unwrap_or_else(|| began.elapsed());
    if let Some((start, spans)) = &mut *spans() {
        let start = began.saturating_duration_since(*start);
        spans.push(Span { part, name, thread: THREAD.with(|thread| *thread), start, time, flops: flops as u64 });
    }
    result
}
