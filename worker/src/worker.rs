//! The life of a worker: join, load the model, lease, evaluate, report, leave.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elbo_common::dataset::Reader;
use elbo_common::fingerprint::JobIdentity;
use elbo_common::model_source::{JobModels, ModelSource};
use elbo_net::ClientTls;
use elbo_proto::v1;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::client::{CallError, Client, ClientError};
use crate::engine::{BlockEvent, Engine, EngineStopped, Problem};
use crate::latent::LatentCache;
use crate::prepare::{BlockError, Preparer};
use crate::problem::ProblemError;
use crate::report::{Finding, Held, LeaseKey, Reporter};
use crate::stage::Stage;

/// Blocks a worker holds: one being computed, one being prepared.
const BLOCKS: usize = 2;

/// Memory for latents.
const LATENT_BYTES: usize = 256 << 20;

/// A worker that had to give up.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The coordinator can't be worked for.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The job can't be worked on here.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A block made no sense.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The engine's threads could not be started.
    #[error("starting the engine: {0}")]
    Start(#[from] std::io::Error),
    /// A background task ended by a panic, which is a defect.
    #[error("the worker's {0} ended unexpectedly: start the worker again, and report this")]
    Task(&'static str),
}

impl From<EngineStopped> for WorkerError {
    fn from(stopped: EngineStopped) -> Self {
        Self::Block(BlockError::Stopped(stopped))
    }
}

/// How a worker runs; nothing here changes a result.
#[derive(Clone, Debug)]
pub struct Options {
    /// The coordinator's URL.
    pub coordinator: String,
    /// The bearer token, where the coordinator wants one.
    pub token: Option<String>,
    /// How TLS is spoken with an https:// coordinator; by what the system trusts, where absent.
    pub tls: Option<ClientTls>,
    /// The worker's name, unique for its process.
    pub name: String,
    /// The host it runs on, for people.
    pub host: String,
    /// Threads to compute with.
    pub threads: NonZeroUsize,
    /// Evaluations in a batch; measured where absent.
    pub batch: Option<NonZeroUsize>,
    /// How long an unreachable coordinator is waited for.
    pub patience: Duration,
    /// The model as this machine finds it, where it is not the job's.
    pub model: Option<String>,
    /// The job's model, where the process has loaded it already.
    pub problem: Option<Arc<Problem>>,
    /// Whether to wait for a coordinator that stopped before the job was done.
    pub stay: bool,
}

/// Works until the job is done, the coordinator sends it away, or `stop` is cancelled.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), WorkerError> {
    // What every log line of this worker says of it.
    let span = tracing::info_span!("worker", worker = options.name, job = tracing::field::Empty);
    run_in_span(options, stop).instrument(span).await
}

async fn run_in_span(options: Options, stop: CancellationToken) -> Result<(), WorkerError> {
    let Options { coordinator, token, name, .. } = &options;
    let client = Client::new(coordinator, token.as_deref(), options.tls.as_ref(), name.clone(), options.patience)?;
    let device = format!("cpu x{}", options.threads);
    let joined = tokio::select! {
        joined = client.join(&options.host, &device) => joined.map_err(no_answer)?,
        () = stop.cancelled() => return Ok(()),
    };
    // The coordinator hears from the worker while it loads the model, which may take minutes.
    let heartbeat = Duration::from_millis(u64::from(joined.heartbeat_ms.max(50)));
    let pulse = Arc::new(Pulse::default());
    let beating = tokio::spawn(
        beat(client.clone(), options.host.clone(), device.clone(), heartbeat, Arc::clone(&pulse)).in_current_span(),
    );
    let worked = work(&options, &client, &device, &joined, &pulse, &stop).await;
    beating.abort();
    client.leave().await;
    worked
}

/// What the heartbeat tells.
#[derive(Debug, Default)]
struct Pulse {
    engine: Mutex<Option<Arc<Engine>>>,
    acknowledged: Arc<AtomicU64>,
}

impl Pulse {
    fn evaluated(&self) -> u64 {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |e| e.evaluated())
    }
}

async fn beat(client: Client, host: String, device: String, every: Duration, pulse: Arc<Pulse>) {
    loop {
        let unreported = pulse.evaluated().saturating_sub(pulse.acknowledged.load(Ordering::Relaxed));
        match client.heartbeat(unreported).await {
            Err(CallError::Rejoin) => drop(client.join(&host, &device).await),
            Err(CallError::Fatal(_)) => return,
            _ => {}
        }
        tokio::time::sleep(every).await;
    }
}

async fn work(
    options: &Options,
    client: &Client,
    device: &str,
    joined: &v1::JoinReply,
    pulse: &Arc<Pulse>,
    stop: &CancellationToken,
) -> Result<(), WorkerError> {
    let mut identity: JobIdentity = serde_json::from_str(&joined.job_json).map_err(ProblemError::from)?;
    if let Some(model) = &options.model {
        identity.spec.model.clone_from(model);
    }
    let models = match options.problem {
        Some(_) => None,
        None => Some(find_models(&identity).await?),
    };
    let (threads, batch, loaded) = (options.threads.get(), options.batch, options.problem.clone());
    let span = tracing::Span::current();
    let loading = tokio::task::spawn_blocking(move || {
        let _span = span.enter();
        let problem = match (loaded, models) {
            (Some(problem), _) => problem,
            (None, Some(models)) => Arc::new(Problem::load(&identity, &models)?),
            (None, None) => return Err(WorkerError::Task("loader")),
        };
        let batch = match batch {
            Some(batch) => batch.get(),
            None => problem.measure_batch().map_err(ProblemError::from)?,
        };
        let engine = Engine::start(Arc::clone(&problem), threads, batch)?;
        tracing::info!(batch, threads, "model loaded");
        Ok::<_, WorkerError>((problem, engine))
    });
    let (problem, engine) = loading.await.map_err(|_| WorkerError::Task("loader"))??;
    let engine = Arc::new(engine);
    *pulse.engine.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&engine));

    let preparer = Arc::new(Preparer {
        engine: Arc::clone(&engine),
        cache: LatentCache::new(LATENT_BYTES, problem.stages.iter().map(Stage::latent_len).max().unwrap_or(1)),
        reader: Reader::new().with_limit(elbo_images::MAX_FILE_BYTES as u64),
        problem,
    });
    let (findings, inbox) = mpsc::unbounded_channel();
    let held = Held::default();
    let reporter = Reporter {
        client: client.clone(),
        host: options.host.clone(),
        device: device.to_owned(),
        findings: inbox,
        acknowledged: Arc::clone(&pulse.acknowledged),
        held: held.clone(),
    };
    let mut reporting = tokio::spawn(reporter.run().in_current_span());
    let lessee = Lessee { client: client.clone(), preparer, findings, held, rate: Rate::default() };
    let leased = tokio::select! {
        leased = lessee.run(options, device, stop) => leased,
        // The reporter ends first only when it can't report any more.
        reported = &mut reporting => {
            return Err(reported.map_err(|_| WorkerError::Task("reporter"))?.err().map_or(WorkerError::Task("reporter"), Into::into));
        }
    };
    // The lessee is gone, and with it the last sender: the reporter ends once everything is acknowledged.
    let reported = reporting.await.map_err(|_| WorkerError::Task("reporter"))?;
    leased?;
    Ok(reported?)
}

/// The directories of a job's models on this machine, fetched if need be.
async fn find_models(identity: &JobIdentity) -> Result<JobModels, ProblemError> {
    let model = ModelSource::parse(&identity.spec.model)?;
    let shortlist = identity.spec.shortlist.as_ref().map(|s| ModelSource::parse(&s.model)).transpose()?;
    Ok(JobModels::find(&model, shortlist.as_ref(), |note| tracing::info!("{note}")).await?)
}

fn no_answer(error: CallError) -> WorkerError {
    match error {
        CallError::Fatal(error) => error.into(),
        CallError::Rejected(reason) => ClientError::Refused { address: "this address".into(), reason }.into(),
        CallError::Rejoin => {
            ClientError::Refused { address: "this address".into(), reason: "it forgot this worker".into() }.into()
        }
    }
}

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

/// The lease loop.
struct Lessee {
    client: Client,
    preparer: Arc<Preparer>,
    findings: mpsc::UnboundedSender<(LeaseKey, Finding)>,
    held: Held,
    rate: Rate,
}

impl Lessee {
    async fn run(self, options: &Options, device: &str, stop: &CancellationToken) -> Result<(), WorkerError> {
        let this = Arc::new(self);
        let places = Arc::new(Semaphore::new(BLOCKS));
        // Blocks are prepared side by side but computed one after the other, in the order they were leased.
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        let mut blocks: JoinSet<Result<(), WorkerError>> = JoinSet::new();
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
                reply = this.client.lease(this.rate.get(), this.held.list()) => reply,
                () = stop.cancelled() => break Ok(()),
            };
            use v1::lease_reply::Outcome;
            match reply {
                Ok(v1::LeaseReply { outcome: Some(Outcome::Block(block)) }) => {
                    let (this, turn) = (Arc::clone(&this), Arc::clone(&turn));
                    let key = LeaseKey { epoch: block.epoch, lease: block.lease };
                    this.held.add(key);
                    let computing = async move {
                        let done = this.compute(key, block, &turn).await;
                        this.held.remove(key, 1);
                        drop(place);
                        done
                    };
                    let span = tracing::trace_span!(target: "elbo::trace", "block", key.epoch, key.lease);
                    blocks.spawn(computing.instrument(span).in_current_span());
                }
                Ok(v1::LeaseReply { outcome: Some(Outcome::Leave(v1::Leave { done })) }) if done || !options.stay => {
                    break Ok(());
                }
                Ok(v1::LeaseReply { outcome: Some(Outcome::Leave(_)) }) => {
                    tracing::info!("the coordinator is stopping: waiting for it to come back");
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => break Ok(()),
                    }
                }
                Ok(_) => {}
                Err(CallError::Rejoin) => drop(this.client.join(&options.host, device).await),
                Err(error) => break Err(no_answer(error)),
            }
        };
        // Finish what the device is in the middle of, report it, and hand the rest back.
        this.preparer.engine.cancel();
        while let Some(block) = blocks.join_next().await {
            if let Ok(Err(error)) = block {
                tracing::debug!(%error, "a block was not finished");
            }
        }
        ended
    }

    /// Hands something to the reporter; the lease is held until it is acknowledged.
    fn find(&self, key: LeaseKey, finding: Finding) {
        self.held.add(key);
        if self.findings.send((key, finding)).is_err() {
            tracing::debug!(lease = key.lease, "the reporter has stopped");
        }
    }

    /// Prepares and computes one block.
    async fn compute(&self, key: LeaseKey, block: v1::Block, turn: &tokio::sync::Mutex<()>) -> Result<(), WorkerError> {
        let prepared = match self.preparer.prepare(block).await {
            Err(BlockError::Captions(error)) => return self.give_up(key, &error.to_string()).await,
            prepared => prepared?,
        };
        for bad in prepared.bad {
            tracing::warn!(sample = %bad.sample, stage = bad.stage, error = bad.error, "bad sample");
            self.find(key, Finding::Bad(bad));
        }
        // The turn ends when all batches are queued: the next block's then follow without a gap.
        let own_turn = turn.lock().await;
        let started = Instant::now();
        let evaluations: u64 = prepared.units.iter().map(|u| u.unit.evaluations()).sum();
        let (events, mut inbox) = mpsc::unbounded_channel();
        let engine = Arc::clone(&self.preparer.engine);
        let submitting = async {
            let submitted =
                tokio::task::spawn_blocking(move || engine.submit(prepared.units, prepared.conditions, events)).await;
            drop(own_turn);
            submitted.map_err(|_| WorkerError::Task("block"))?.map_err(WorkerError::from)
        };
        let following = async {
            let mut failure = None;
            while let Some(event) = inbox.recv().await {
                match event {
                    BlockEvent::Unit(unit) => self.find(key, Finding::Unit(unit)),
                    BlockEvent::Failed(error) => failure = Some(error),
                    BlockEvent::End => break,
                }
            }
            failure
        };
        let (submitted, failure) = tokio::join!(submitting, following);
        submitted?;
        match failure {
            None => self.rate.note(evaluations, started.elapsed().as_secs_f64()),
            Some(error) => self.give_up(key, &error).await?,
        }
        Ok(())
    }

    /// Hands a block back that can't be finished.
    async fn give_up(&self, key: LeaseKey, error: &str) -> Result<(), WorkerError> {
        tracing::error!(epoch = key.epoch, lease = key.lease, error, "block failed");
        match self.client.release(key.epoch, vec![key.lease], error).await {
            Err(CallError::Fatal(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }
}
