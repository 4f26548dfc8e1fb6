//! The engine of one device: turns (sample, slot, prompt) evaluations into errors.
//!
//! A CPU device runs one *lane* per core: a thread that evaluates whole batches by itself, so that activations stay in its
//! cache and no thread waits for another inside a layer. Blocks are cut into batches that cross samples, slots and prompts.
//! Lanes take batches from one short queue, so the batches of the next block follow without a gap. On the CPU, an
//! evaluation's error does not depend on its batch (see [`elbo_kernels`]), and neither does any result.
//!
//! A GPU also has a few lanes: while it computes one lane's batch, another lane makes and copies the noise of the next
//! batch. NVIDIA's libraries may round differently in another batch.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use elbo_core::policy::Slot;
use elbo_core::sums::Sums;
use elbo_core::unit::Unit;
use elbo_kernels::gpu;
use elbo_models::{Conditions, ModelError};
use tokio::sync::{mpsc, oneshot};

use crate::error::{EncodeError, EngineStopped};
use crate::latent::Latent;
use crate::loaded_job::LoadedJob;
use crate::metrics::metrics;
use crate::stage::{ModelStage, PointWork};

/// The most images that a GPU encodes at a time.
const IMAGES_AT_ONCE: usize = 8;

/// A unit with its sample's latent.
#[derive(Clone, Debug)]
pub struct UnitWork {
    /// The unit.
    pub unit: Unit,
    /// The key of its noise: the sample's key, or the pair's.
    pub key: Arc<str>,
    /// The sample's latent from its round's model.
    pub latent: Latent,
    /// The stage that scores its round.
    pub stage: usize,
    /// The position of the sample's first prompt among the stage's conditions for the block.
    pub first_condition: u32,
}

/// The result of a finished unit: every single error if the job wants them, otherwise their sums.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitErrors {
    /// The unit.
    pub unit: Unit,
    /// Sums by prompt, with slots added in order; empty if there are single errors, from which they follow.
    pub sums: Vec<Sums>,
    /// Every error, prompt by prompt; empty if there are sums.
    pub errors: Vec<f32>,
}

/// An engine's event about a block in progress.
#[derive(Debug)]
pub enum BlockEvent {
    /// A unit is finished.
    Unit(UnitErrors),
    /// The block can't be finished: one of its batches failed.
    Failed(String),
    /// The device failed for good: the block is not at fault.
    Lost(String),
    /// The block has no more events.
    End,
}

/// One evaluation of a block: positions of the unit in the block, of the slot and of the prompt in the unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evaluation {
    unit: u32,
    slot: u32,
    prompt: u32,
}

#[derive(Debug)]
struct BlockInWork {
    units: Vec<UnitWork>,
    /// The conditions of every stage.
    conditions: Vec<Arc<Conditions>>,
    progress: Mutex<Vec<UnitProgress>>,
    /// Whether the engine was told to stop.
    cancelled: Arc<AtomicBool>,
    /// Whether the block is no longer needed.
    unwanted: Arc<AtomicBool>,
    failed: AtomicBool,
    batches_left: AtomicU64,
    /// The lanes wait while it is full.
    events: mpsc::Sender<BlockEvent>,
}

#[derive(Debug)]
struct UnitProgress {
    /// Prompt-major errors.
    errors: Vec<f32>,
    left: usize,
}

#[derive(Debug)]
struct Batch {
    block: Arc<BlockInWork>,
    evaluations: Vec<Evaluation>,
}

struct Encode {
    stage: usize,
    /// [S, S, 3], preprocessed.
    pixels: Vec<f32>,
    reply: oneshot::Sender<Result<Vec<f32>, ModelError>>,
}

/// The lanes of one device.
#[derive(Debug)]
pub struct Engine {
    batches: Option<Sender<Batch>>,
    encodes: Option<Sender<Encode>>,
    lanes: Vec<JoinHandle<()>>,
    /// Evaluations in a batch; fewer once they did not fit into the device's memory.
    batch: Arc<AtomicUsize>,
    evaluated: Arc<AtomicU64>,
    /// The number of unfinished batches.
    queued: Arc<AtomicU64>,
    cancelled: Arc<AtomicBool>,
    /// If set, dropping the engine does not wait for its lanes.
    abandoned: AtomicBool,
}

impl Engine {
    /// Starts `lanes` lanes that evaluate batches of `batch` evaluations.
    pub fn start(job: Arc<LoadedJob>, lanes: usize, batch: usize) -> std::io::Result<Self> {
        let (batches, batch_queue) = bounded(2 * lanes);
        let (encodes, encode_queue) = unbounded();
        let (evaluated, queued) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let cancelled = Arc::new(AtomicBool::new(false));
        let batch = Arc::new(AtomicUsize::new(batch.max(1)));
        let lanes = (0..lanes)
            .map(|i| {
                let (evaluated, queued, batch) = (Arc::clone(&evaluated), Arc::clone(&queued), Arc::clone(&batch));
                let lane = Lane { job: Arc::clone(&job), batch, evaluated, queued };
                let (batches, encodes) = (batch_queue.clone(), encode_queue.clone());
                std::thread::Builder::new().name(format!("lane-{i}")).spawn(move || lane.run(&batches, &encodes))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let (batches, encodes) = (Some(batches), Some(encodes));
        let abandoned = AtomicBool::new(false);
        Ok(Self { batches, encodes, lanes, batch, evaluated, queued, cancelled, abandoned })
    }

    /// Evaluations finished since the start.
    pub fn evaluated(&self) -> u64 {
        self.evaluated.load(Ordering::Relaxed)
    }

    /// Whether batches are being computed.
    pub fn is_busy(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > 0
    }

    /// Encodes a preprocessed image, [S, S, 3], with a stage's model.
    pub async fn encode(&self, stage: usize, pixels: Vec<f32>) -> Result<Vec<f32>, EncodeError> {
        let (reply, answer) = oneshot::channel();
        let sender = self.encodes.as_ref().ok_or(EngineStopped)?;
        sender.send(Encode { stage, pixels, reply }).map_err(|_| EngineStopped)?;
        Ok(answer.await.map_err(|_| EngineStopped)??)
    }

    /// Gives a block to the lanes; blocks while their queue is full. The block's events go to `events`; the lanes wait
    /// while that is full. The rest of the block is skipped once it is `unwanted`.
    pub fn submit(
        &self,
        units: Vec<UnitWork>,
        conditions: Vec<Arc<Conditions>>,
        events: mpsc::Sender<BlockEvent>,
        unwanted: Arc<AtomicBool>,
    ) -> Result<(), EngineStopped> {
        let progress = units
            .iter()
            .map(|w| {
                let left = w.unit.slots.len() * w.unit.prompts.len();
                UnitProgress { errors: vec![0.0; left], left }
            })
            .collect();
        let batches = batches_of(&units, self.batch.load(Ordering::Relaxed));
        let batches_left = AtomicU64::new(batches.len() as u64);
        let block = Arc::new(BlockInWork {
            units,
            conditions,
            progress: Mutex::new(progress),
            cancelled: Arc::clone(&self.cancelled),
            unwanted,
            failed: AtomicBool::new(false),
            batches_left,
            events,
        });
        let sender = self.batches.as_ref().ok_or(EngineStopped)?;
        if batches.is_empty() {
            let _ = block.events.blocking_send(BlockEvent::End);
        }
        self.queued.fetch_add(batches.len() as u64, Ordering::Relaxed);
        for evaluations in batches {
            let batch = Batch { block: Arc::clone(&block), evaluations };
            sender.send(batch).map_err(|_| EngineStopped)?;
        }
        Ok(())
    }

    /// Makes the lanes skip all batches that they have not begun.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Lets the engine be dropped without waiting for running batches, since the process is to end.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.cancel();
        (self.batches, self.encodes) = (None, None);
        if self.abandoned.load(Ordering::Relaxed) {
            return;
        }
        for lane in self.lanes.drain(..) {
            let _ = lane.join();
        }
    }
}

/// A block's evaluations in batches of at most `size`: units in order, slots in order, all prompts of a slot together.
///
/// Evaluations of one slot share their noisy latent and the class-independent part of the network, so batches end between
/// slots where possible.
pub(crate) fn batches_of(units: &[UnitWork], size: usize) -> Vec<Vec<Evaluation>> {
    let mut batches: Vec<Vec<Evaluation>> = Vec::new();
    for (unit, work) in (0u32..).zip(units) {
        for slot in 0..work.unit.slots.len() as u32 {
            let prompts = work.unit.prompts.len();
            let evaluations = (0..prompts as u32).map(|prompt| Evaluation { unit, slot, prompt });
            let same_stage =
                |last: &[Evaluation]| last.last().is_some_and(|e| units[e.unit as usize].stage == work.stage);
            match batches.last_mut() {
                Some(last) if last.len() + prompts <= size && same_stage(last) => last.extend(evaluations),
                _ => batches.extend(evaluations.collect::<Vec<_>>().chunks(size).map(<[_]>::to_vec)),
            }
        }
    }
    batches
}

/// Runs some work and turns a panic, which is a defect, into an error. Otherwise the lane would end, and a block would wait
/// for it.
fn caught<T>(work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
    let crashed = |panic: Box<dyn Any + Send>| {
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(ModelError::Crashed(message.unwrap_or("no message").to_owned()))
    };
    std::panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(crashed)
}

struct Lane {
    job: Arc<LoadedJob>,
    batch: Arc<AtomicUsize>,
    evaluated: Arc<AtomicU64>,
    queued: Arc<AtomicU64>,
}

impl Lane {
    fn run(&self, batches: &Receiver<Batch>, encodes: &Receiver<Encode>) {
        loop {
            // Encode first: it is short, and a whole block may wait for it.
            if let Ok(encode) = encodes.try_recv() {
                self.encode(encode, encodes);
                continue;
            }
            crossbeam_channel::select! {
                recv(encodes) -> encode => match encode {
                    Ok(encode) => self.encode(encode, encodes),
                    Err(_) => return,
                },
                recv(batches) -> batch => match batch {
                    Ok(batch) => self.evaluate(&batch),
                    Err(_) => return,
                },
            }
        }
    }

    /// Encodes an image; on a GPU, together with other waiting images.
    fn encode(&self, first: Encode, waiting: &Receiver<Encode>) {
        let on_gpu = !self.job.stages[first.stage].device().is_cpu();
        let others = if on_gpu { IMAGES_AT_ONCE - 1 } else { 0 };
        let mut of_stages: BTreeMap<usize, (Vec<Vec<f32>>, Vec<_>)> = BTreeMap::new();
        for Encode { stage, pixels, reply } in std::iter::once(first).chain(waiting.try_iter().take(others)) {
            let (images, replies) = of_stages.entry(stage).or_default();
            images.push(pixels);
            replies.push(reply);
        }
        for (stage, (images, replies)) in of_stages {
            for (encoded, reply) in self.encoded(&self.job.stages[stage], &images).into_iter().zip(replies) {
                let _ = reply.send(encoded);
            }
        }
    }

    /// Encodes images with a stage. If that fails, encodes them in halves, so that no image fails because of another.
    fn encoded(&self, stage: &ModelStage, images: &[Vec<f32>]) -> Vec<Result<Vec<f32>, ModelError>> {
        match caught(|| stage.encode(images)) {
            Ok(encoded) => encoded.into_iter().map(Ok).collect(),
            Err(error) => {
                if error.is_out_of_memory() {
                    gpu::recover(stage.device());
                }
                if images.len() == 1 {
                    return vec![Err(error)];
                }
                let (first, second) = images.split_at(images.len() / 2);
                let mut encoded = self.encoded(stage, first);
                encoded.extend(self.encoded(stage, second));
                encoded
            }
        }
    }

    fn evaluate(&self, batch: &Batch) {
        let block = &batch.block;
        let pass_over = [&*block.cancelled, &*block.unwanted, &block.failed];
        if !pass_over.iter().any(|flag| flag.load(Ordering::Relaxed)) {
            match self.errors(block, &batch.evaluations) {
                Ok(errors) => {
                    self.evaluated.fetch_add(errors.len() as u64, Ordering::Relaxed);
                    metrics().computed(errors.len() as u64);
                    block.take(&batch.evaluations, &errors, self.job.reports_errors);
                }
                Err(error) => {
                    if !block.failed.swap(true, Ordering::Relaxed) {
                        // If a single evaluation does not fit, its block is not at fault either.
                        let lost = error.is_out_of_memory()
                            || self.job.stages.iter().any(|stage| gpu::is_lost(stage.device()));
                        let event = if lost { BlockEvent::Lost } else { BlockEvent::Failed };
                        let _ = block.events.blocking_send(event(error.to_string()));
                    }
                }
            }
        }
        self.queued.fetch_sub(1, Ordering::Relaxed);
        if block.batches_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _ = block.events.blocking_send(BlockEvent::End);
        }
    }

    /// The errors of evaluations. If they do not fit into the device's memory, halves them and all later batches.
    fn errors(&self, block: &BlockInWork, evaluations: &[Evaluation]) -> Result<Vec<f32>, ModelError> {
        match caught(|| self.job.errors(&block.units, &block.conditions, evaluations)) {
            Err(error) if error.is_out_of_memory() && evaluations.len() > 1 => {
                self.job.stages.iter().for_each(|stage| gpu::recover(stage.device()));
                let half = evaluations.len().div_ceil(2);
                if self.batch.fetch_min(half, Ordering::Relaxed) > half {
                    tracing::warn!(batch = half, %error, "using a smaller batch, since the last one did not fit into memory");
                }
                let (first, second) = evaluations.split_at(half);
                let mut errors = self.errors(block, first)?;
                errors.extend(self.errors(block, second)?);
                Ok(errors)
            }
            other => other,
        }
    }
}

impl BlockInWork {
    /// Notes a batch's errors, and reports the units that are now complete.
    fn take(&self, evaluations: &[Evaluation], errors: &[f32], reports_errors: bool) {
        let mut finished = Vec::new();
        {
            let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
            for (evaluation, error) in evaluations.iter().zip(errors) {
                let unit = &self.units[evaluation.unit as usize].unit;
                let state = &mut progress[evaluation.unit as usize];
                state.errors[evaluation.prompt as usize * unit.slots.len() + evaluation.slot as usize] = *error;
                state.left -= 1;
                if state.left == 0 {
                    finished.push((unit.clone(), std::mem::take(&mut state.errors)));
                }
            }
        }
        for (unit, errors) in finished {
            let (sums, errors) = if reports_errors {
                (Vec::new(), errors)
            } else {
                (errors.chunks(unit.slots.len().max(1)).map(Sums::of).collect(), Vec::new())
            };
            let _ = self.events.blocking_send(BlockEvent::Unit(UnitErrors { unit, sums, errors }));
        }
    }
}

impl LoadedJob {
    /// The errors of a batch of evaluations, in their order. All are of one stage.
    pub(crate) fn errors(
        &self,
        units: &[UnitWork],
        conditions: &[Arc<Conditions>],
        evaluations: &[Evaluation],
    ) -> Result<Vec<f32>, ModelError> {
        let mut points: Vec<(u32, u32)> = Vec::new();
        let mut pairs = Vec::with_capacity(evaluations.len());
        for e in evaluations {
            if points.last() != Some(&(e.unit, e.slot)) {
                points.push((e.unit, e.slot));
            }
            let work = &units[e.unit as usize];
            let prompt = work.unit.prompts[e.prompt as usize];
            pairs.push(((points.len() - 1) as u32, work.first_condition + prompt.0));
        }
        let works: Vec<_> = points
            .iter()
            .map(|(unit, slot)| {
                let work = &units[*unit as usize];
                Ok(PointWork { key: &work.key, latent: &work.latent, slot: self.slot(work, *slot)? })
            })
            .collect::<Result<_, ModelError>>()?;
        let Some(first) = evaluations.first() else { return Ok(Vec::new()) };
        let stage = units[first.unit as usize].stage;
        self.stages[stage].errors(&works, &conditions[stage], &pairs)
    }

    /// A slot of a unit, which was checked to be in the course.
    fn slot(&self, work: &UnitWork, slot: u32) -> Result<Slot, ModelError> {
        let position = work.unit.slots.start + slot as usize;
        self.course
            .slot(work.unit.id.round, position)
            .ok_or_else(|| ModelError::Input(format!("slot {position} is beyond the job's")))
    }
}

#[cfg(test)]
mod tests {
    use elbo_core::ids::{PromptIndex, Round, SampleId};
    use elbo_core::unit::UnitId;

    use super::*;

    fn work(sample: u64, slots: usize, prompts: u32) -> UnitWork {
        let id = UnitId { sample: SampleId(sample), round: Round(0), slots: 0, prompts: 0 };
        let unit = Unit { id, slots: 0..slots, prompts: (0..prompts).map(PromptIndex).collect() };
        UnitWork { unit, key: Arc::from("k"), latent: Arc::new(Vec::new()), stage: 0, first_condition: 0 }
    }

    #[test]
    fn batches_contain_every_evaluation_once_in_order_and_end_between_slots() {
        let units = [work(0, 3, 10), work(1, 2, 5), work(2, 1, 40)];
        let batches = batches_of(&units, 16);
        let sizes: Vec<_> = batches.iter().map(Vec::len).collect();
        assert_eq!(sizes, [10, 10, 15, 5, 16, 16, 8]);
        let flat: Vec<_> = batches.concat().iter().map(|e| (e.unit, e.slot, e.prompt)).collect();
        assert_eq!(flat.len() as u64, units.iter().map(|w| w.unit.evaluations()).sum::<u64>());
        assert!(flat.is_sorted());
    }

    #[test]
    fn a_batch_is_of_one_stage() {
        let units = [work(0, 1, 3), UnitWork { stage: 1, ..work(1, 1, 3) }, work(2, 1, 3)];
        assert_eq!(batches_of(&units, 16).iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3]);
    }
}
