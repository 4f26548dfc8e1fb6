//! The lease loop of one engine: asks for blocks, prepares them in parallel, and computes them one after another.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elbo_core::ids::LeaseKey;
use elbo_proto::{FULL_MESSAGE_BYTES, LeaveReason, MAX_MESSAGE_BYTES, v1};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::call_error::CallError;
use crate::client::Client;
use crate::engine::BlockEvent;
use crate::error::BlockError;
use crate::error::{WorkerError, no_answer};
use crate::finding::Finding;
use crate::held::Held;
use crate::prepare::Preparer;
use crate::report::{BACKLOG, Findings};

/// Blocks that an engine has in hand: one being computed, one being prepared.
const BLOCKS: usize = 2;

/// Events that lanes may send about a block before they are received.
const EVENTS: usize = 1024;

// A unit takes less room among the blocks in hand, which go with every join, than in its block or as a result in the
// backlog.
const _: () = assert!(BLOCKS * FULL_MESSAGE_BYTES + BACKLOG < MAX_MESSAGE_BYTES / 8 * 7);

/// Measured evaluations per second, smoothed over leases.
#[derive(Debug, Default)]
struct Rate(Mutex<Option<f64>>);

impl Rate {
    fn get(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(0.0)
    }

    fn note(&self, evaluations: u64, seconds: f64) {
        if evaluations > 0 && seconds > 0.0 {
            let (mut rate, new) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), evaluations as f64 / seconds);
            *rate = Some(rate.map_or(new, |old| 0.5 * old + 0.5 * new));
        }
    }
}

/// Asks for blocks and computes them.
pub(crate) struct LeaseLoop {
    client: Client,
    preparer: Arc<Preparer>,
    findings: Findings,
    held: Held,
    rate: Rate,
}

/// What a lease loop needs besides its parts.
pub(crate) struct Terms<'a> {
    /// The host it runs on, for people.
    pub(crate) host: &'a str,
    /// Its device, for people.
    pub(crate) device: &'a str,
    /// Whether to wait for a coordinator that stopped before the job was done.
    pub(crate) stay: bool,
    /// Stops the loop when cancelled.
    pub(crate) stop: &'a CancellationToken,
}

impl LeaseLoop {
    pub(crate) fn new(client: Client, preparer: Arc<Preparer>, findings: Findings, held: Held) -> Self {
        Self { client, preparer, findings, held, rate: Rate::default() }
    }

    /// Leases and computes until the job is done, the coordinator sends the worker away, or it is stopped.
    pub(crate) async fn run(self, terms: Terms<'_>) -> Result<(), WorkerError> {
        let Terms { host, device, stay, stop } = terms;
        let this = Arc::new(self);
        let places = Arc::new(Semaphore::new(BLOCKS));
        // Blocks are prepared in parallel but computed one after another, in the order they were leased.
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        let mut blocks: JoinSet<Result<(), WorkerError>> = JoinSet::new();
        // Images may take long to read, and the storage may hang: blocks that are not prepared by then are handed back.
        let ending = stop.child_token();
        let ended = loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place.map_err(|_| WorkerError::Task("lease loop"))?,
                Some(ended) = blocks.join_next() => {
                    match ended.map_err(|_| WorkerError::Task("block")).flatten() {
                        Ok(()) => continue,
                        Err(error) => break Err(error),
                    }
                }
                () = stop.cancelled() => break Ok(()),
            };
            let reply = tokio::select! {
                reply = this.client.lease(this.rate.get(), this.held.leases()) => reply,
                () = stop.cancelled() => break Ok(()),
            };
            use v1::lease_reply::Outcome;
            match reply {
                Ok(v1::LeaseReply { outcome: Some(Outcome::Block(block)) }) => {
                    let (this, turn) = (Arc::clone(&this), Arc::clone(&turn));
                    let (key, unwanted) = (block.key(), this.held.add(&block));
                    let ending = ending.clone();
                    let computing = async move {
                        let done = this.compute(block, unwanted, &turn, &ending).await;
                        drop(place);
                        done
                    };
                    let span =
                        tracing::trace_span!(target: "elbo::trace", "block", epoch = key.epoch.0, lease = key.lease.0);
                    blocks.spawn(computing.instrument(span).in_current_span());
                }
                Ok(v1::LeaseReply { outcome: Some(Outcome::Leave(leave)) }) => {
                    match LeaveReason::from(leave) {
                        LeaveReason::Done => break Ok(()),
                        LeaveReason::Stopping if !stay => break Ok(()),
                        LeaveReason::Stopping => {
                            tracing::info!("the coordinator is stopping: waiting for it to come back");
                        }
                        LeaveReason::NextJob => tracing::info!("waiting for the next job"),
                    }
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => break Ok(()),
                    }
                }
                Ok(_) => {}
                Err(CallError::Rejoin) => match this.client.join(host, device, this.held.blocks()).await {
                    Err(CallError::OtherJob) => break Err(WorkerError::OtherJob),
                    // The next call runs into any other error too.
                    _ => continue,
                },
                Err(error) => break Err(no_answer(error)),
            }
        };
        // Finish the running batches, report them, and hand the rest back.
        ending.cancel();
        this.preparer.engine.cancel();
        while let Some(block) = blocks.join_next().await {
            if let Ok(Err(error)) = block {
                tracing::debug!(%error, "a block was not finished");
            }
        }
        ended
    }

    /// Hands a finding to the reporter, once that has room.
    async fn find(&self, key: LeaseKey, finding: Finding) {
        let units = self.held.found(key, &finding);
        self.findings.find(key, finding, units).await;
    }

    /// Prepares and computes one block.
    async fn compute(
        &self,
        block: v1::Block,
        unwanted: Arc<AtomicBool>,
        turn: &tokio::sync::Mutex<()>,
        ending: &CancellationToken,
    ) -> Result<(), WorkerError> {
        let key = block.key();
        let prepared = tokio::select! {
            prepared = self.preparer.prepare(block) => prepared,
            () = ending.cancelled() => return Ok(()),
        };
        let prepared = match prepared {
            Err(BlockError::Captions(error)) => return self.give_up(key, &error.to_string()).await,
            prepared => prepared?,
        };
        for bad in prepared.bad {
            tracing::warn!(epoch = key.epoch.0, lease = key.lease.0, sample = %bad.sample, stage = bad.stage.name(), error = bad.error, "bad sample");
            self.find(key, bad.into()).await;
        }
        // The turn ends when all batches are queued, so that the next block's batches follow without a gap.
        let own_turn = turn.lock().await;
        let started = Instant::now();
        let evaluations: u64 = prepared.units.iter().map(|u| u.unit.evaluations()).sum();
        let (events, mut inbox) = mpsc::channel(EVENTS);
        let (engine, flag) = (Arc::clone(&self.preparer.engine), Arc::clone(&unwanted));
        let submitting = async {
            let submit = move || engine.submit(prepared.units, prepared.conditions, events, flag);
            let submitted = tokio::task::spawn_blocking(submit).await;
            drop(own_turn);
            submitted.map_err(|_| WorkerError::Task("block"))?.map_err(WorkerError::from)
        };
        let following = async {
            let (mut failure, mut lost) = (None, None);
            while let Some(event) = inbox.recv().await {
                match event {
                    BlockEvent::Unit(unit) => self.find(key, unit.into()).await,
                    BlockEvent::Failed(error) => failure = Some(error),
                    BlockEvent::Lost(error) => lost = Some(error),
                    BlockEvent::End => break,
                }
            }
            (failure, lost)
        };
        let (submitted, (failure, lost)) = tokio::join!(submitting, following);
        submitted?;
        if let Some(error) = lost {
            return Err(BlockError::Device(error).into());
        }
        match failure {
            Some(error) => self.give_up(key, &error).await?,
            None if unwanted.load(Ordering::Relaxed) => {
                tracing::info!(
                    epoch = key.epoch.0,
                    lease = key.lease.0,
                    "the block is dropped, since its results are already known"
                );
                self.held.remove(key);
            }
            None => self.rate.note(evaluations, started.elapsed().as_secs_f64()),
        }
        if !self.preparer.engine.is_busy() {
            // The coordinator may be waiting for the last results.
            self.findings.flush();
        }
        Ok(())
    }

    /// Hands back a block that can't be finished.
    async fn give_up(&self, key: LeaseKey, error: &str) -> Result<(), WorkerError> {
        tracing::error!(epoch = key.epoch.0, lease = key.lease.0, error, "block failed");
        // While it counts as held, a request for work does not hand it back without the failure.
        let released = self.client.release(key, error).await;
        self.held.remove(key);
        match released {
            Err(CallError::Fatal(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }
}
