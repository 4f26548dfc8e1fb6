//! The life of a worker: join, load the model, lease, evaluate, report, leave.
//!
//! A worker drives all its devices. Each device has an engine that joins, leases and reports like a separate worker, at its
//! own pace. Engines on the same device share the model and the encoded prompts.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use elbo_data::Reader;
use elbo_data::budget::Memory;
use elbo_hub::fingerprint::JobIdentity;
use elbo_hub::model_source::{JobModels, ModelSource};
use elbo_kernels::gpu;
use elbo_net::ClientTls;
use elbo_proto::v1;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::access::{Access, ReadHistory};
use crate::batch;
use crate::client::{Client, GOODBYE};
use crate::device::Device;
use crate::engine::Engine;
use crate::error::{WorkerError, no_answer};
use crate::heartbeats::Heartbeats;
use crate::latent::LatentCache;
use crate::lease_loop::{LeaseLoop, Terms};
use crate::loaded_job::{LoadError, LoadedJob};
use crate::prepare::{Preparer, image_of};
use crate::report::{BACKLOG, Reporter, backlog};
use crate::stage::ModelStage;

/// Lanes of a GPU: while it computes one lane's batch, another lane makes the noise of the next batch, and a third may wait
/// for an image's latent.
const GPU_LANES: usize = 3;
/// Memory for latents.
const LATENT_BYTES: usize = 256 << 20;

/// How a worker runs. Nothing here changes a result.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// The coordinator's URL.
    pub coordinator: String,
    /// The bearer token, if the coordinator requires one.
    pub token: Option<String>,
    /// TLS settings for an https:// coordinator. If absent, the system's trusted certificates are used.
    pub tls: Option<ClientTls>,
    /// The worker's name, unique for its process.
    pub name: String,
    /// The host it runs on, for people.
    pub host: String,
    /// The devices of its engines.
    pub engines: Vec<Device>,
    /// Threads of each engine on the CPU.
    pub threads: NonZeroUsize,
    /// Evaluations in a batch; measured if absent.
    pub batch: Option<NonZeroUsize>,
    /// Bytes that images read ahead may take, in all engines together.
    pub decode_memory: u64,
    /// How long to wait for an unreachable coordinator.
    pub patience: Duration,
    /// How long the worker may take to finish once it is told to stop.
    pub grace: Duration,
    /// The model's location on this machine, if it differs from the job's.
    pub model: Option<String>,
    /// The job's model and its device, if the process has loaded it already.
    pub loaded: Option<(Device, Arc<LoadedJob>)>,
    /// Whether to wait for a coordinator that stopped before the job was done.
    pub stay: bool,
}

/// Data of a job that engines on one device share.
#[derive(Debug, Default)]
struct Loaded {
    identity: OnceCell<Arc<JobIdentity>>,
    job: OnceCell<Arc<LoadedJob>>,
    batch: OnceCell<usize>,
}

/// Data that engines on one device share.
#[derive(Debug, Default)]
struct Shared {
    /// The job, and what is loaded for it. Data that was loaded before joining belongs to the first job.
    current: Mutex<(Option<String>, Arc<Loaded>)>,
}

impl Shared {
    /// The data loaded for a job. Data of an earlier job is dropped.
    fn of_job(&self, job: &str) -> Arc<Loaded> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match &current.0 {
            Some(name) if name != job => *current = (Some(job.to_owned()), Arc::default()),
            Some(_) => {}
            None => current.0 = Some(job.to_owned()),
        }
        Arc::clone(&current.1)
    }
}

/// Works until the job is done, the coordinator sends the worker away, or `stop` is cancelled. An engine that fails says so
/// and leaves; the others go on. The first error is returned if all engines fail.
///
/// ```no_run
/// # async fn work() -> Result<(), Box<dyn std::error::Error>> {
/// use std::num::NonZeroUsize;
/// use std::time::Duration;
///
/// use elbo_worker::{Devices, WorkerOptions};
///
/// let options = WorkerOptions {
///     coordinator: "http://10.0.0.1:7070".into(),
///     token: None,
///     tls: None,
///     name: "worker-1".into(),
///     host: "node-1".into(),
///     engines: Devices::default().engines(1),
///     threads: NonZeroUsize::MIN,
///     batch: None,
///     decode_memory: 2 << 30,
///     patience: Duration::from_secs(300),
///     grace: Duration::from_secs(60),
///     model: None,
///     loaded: None,
///     stay: false,
/// };
/// elbo_worker::run(options, tokio_util::sync::CancellationToken::new()).await?;
/// # Ok(()) }
/// ```
pub async fn run(options: WorkerOptions, stop: CancellationToken) -> Result<(), WorkerError> {
    let mut shared: HashMap<Device, Arc<Shared>> = HashMap::new();
    for &device in &options.engines {
        let job = options.loaded.as_ref().filter(|(on, _)| *on == device).map(|(_, job)| Arc::clone(job));
        let loaded = Arc::new(Loaded { job: OnceCell::new_with(job), ..Loaded::default() });
        shared.entry(device).or_insert_with(|| Arc::new(Shared { current: Mutex::new((None, loaded)) }));
    }
    let options = Arc::new(options);
    let memory = Memory::new(options.decode_memory, options.engines.len());
    let seen = Arc::new(ReadHistory::default());
    let mut engines = JoinSet::new();
    for (number, device) in options.engines.iter().enumerate() {
        let shared = shared.get(device).map(Arc::clone).unwrap_or_default();
        let (options, memory, seen) = (Arc::clone(&options), memory.clone(), Arc::clone(&seen));
        let member = Member { options, number, device: *device, shared, memory, seen };
        let stop = stop.clone();
        // Fields that every log line of this engine has.
        let span = tracing::info_span!("worker", worker = member.name(), job = tracing::field::Empty);
        engines.spawn(async move { member.run(&stop).await }.instrument(span));
    }
    let (mut failure, mut sound) = (None, false);
    while let Some(ended) = engines.join_next().await {
        match ended.map_err(|_| WorkerError::Task("engine")).flatten() {
            Ok(()) => sound = true,
            Err(error) if engines.is_empty() && !sound => return Err(failure.unwrap_or(error)),
            Err(error) => {
                tracing::error!(%error, "an engine failed and has left");
                failure.get_or_insert(error);
            }
        }
    }
    Ok(())
}

/// One engine of a worker, as the coordinator sees it.
struct Member {
    options: Arc<WorkerOptions>,
    number: usize,
    device: Device,
    shared: Arc<Shared>,
    /// The memory for images read ahead, in all engines together.
    memory: Memory,
    /// The images that any engine of this process has read.
    seen: Arc<ReadHistory>,
}

impl Member {
    fn name(&self) -> String {
        match self.options.engines.len() {
            1 => self.options.name.clone(),
            _ => format!("{}/{}", self.options.name, self.number),
        }
    }

    /// Works on one job after another, as long as the coordinator has one.
    async fn run(&self, stop: &CancellationToken) -> Result<(), WorkerError> {
        loop {
            match self.run_job(stop).await {
                Err(WorkerError::OtherJob) => tracing::info!("the coordinator has another job"),
                ended => return ended,
            }
        }
    }

    async fn run_job(&self, stop: &CancellationToken) -> Result<(), WorkerError> {
        let WorkerOptions { coordinator, token, tls, host, grace, patience, .. } = &*self.options;
        let client = Client::new(coordinator, token.as_deref(), tls.as_ref(), self.name(), *patience)?;
        let client = client.of_process(&self.options.name).with_hardware(&self.device.hardware());
        let device = match self.device {
            Device::Cpu => format!("cpu x{}", self.options.threads),
            other => other.to_string(),
        };
        let joined = tokio::select! {
            joined = client.join(host, &device, Vec::new()) => joined.map_err(no_answer)?,
            () = stop.cancelled() => return Ok(()),
        };
        let heartbeat = Duration::from_millis(u64::from(joined.heartbeat_ms.max(50)));
        let heartbeats = Heartbeats::default();
        let overdue = async {
            stop.cancelled().await;
            tokio::time::sleep(grace.saturating_sub(GOODBYE)).await;
        };
        let worked = tokio::select! {
            worked = self.work(&client, &device, &joined, &heartbeats, stop) => worked,
            // Send heartbeats while the model loads, which may take minutes.
            never = silence(heartbeats.beat(&client, host, &device, heartbeat)) => never,
            () = overdue => {
                heartbeats.abandon();
                Err(WorkerError::Grace(grace.as_secs()))
            }
        };
        if !matches!(worked, Err(WorkerError::OtherJob)) {
            let reason = worked.as_ref().err().map(ToString::to_string).unwrap_or_default();
            client.leave(&reason).await;
        }
        worked
    }

    async fn work(
        &self,
        client: &Client,
        device: &str,
        joined: &v1::JoinReply,
        heartbeats: &Heartbeats,
        stop: &CancellationToken,
    ) -> Result<(), WorkerError> {
        let (job, engine) = tokio::select! {
            started = self.start(client, joined) => started?,
            () = stop.cancelled() => return Ok(()),
        };
        heartbeats.start(Arc::clone(&engine));
        let preparer = Arc::new(Preparer {
            engine: Arc::clone(&engine),
            cache: LatentCache::new(LATENT_BYTES, job.stages.iter().map(ModelStage::latent_len).max().unwrap_or(1)),
            access: self.access(client, joined).await?,
            reader: Reader::new().with_limit(elbo_images::MAX_FILE_BYTES as u64).within(&self.memory),
            memory: self.memory.pictures.clone(),
            job,
            prepared: Arc::clone(&heartbeats.prepared),
        });
        let (findings, inbox) = backlog(BACKLOG);
        let host = &self.options.host;
        let reporter = Reporter {
            client: client.clone(),
            host: host.clone(),
            device: device.to_owned(),
            findings: inbox,
            acknowledged: Arc::clone(&heartbeats.acknowledged),
            held: heartbeats.held.clone(),
        };
        let mut reporting = tokio::spawn(reporter.run().in_current_span());
        let lease_loop = LeaseLoop::new(client.clone(), preparer, findings, heartbeats.held.clone());
        let terms = Terms { host, device, stay: self.options.stay, stop };
        let leased = tokio::select! {
            leased = lease_loop.run(terms) => leased,
            // The reporter ends first only if it can no longer report.
            reported = &mut reporting => {
                let reported = reported.map_err(|_| WorkerError::Task("reporter"))?;
                return Err(reported.err().map_or(WorkerError::Task("reporter"), Into::into));
            }
        };
        // The lease loop and with it the last sender are gone: the reporter ends once everything is acknowledged.
        let reported = reporting.await.map_err(|_| WorkerError::Task("reporter"))?;
        leased?;
        Ok(reported?)
    }

    /// Access to the job's images.
    async fn access(&self, client: &Client, joined: &v1::JoinReply) -> Result<Access, WorkerError> {
        let loaded = self.shared.of_job(&joined.job);
        let identity = loaded.identity.get_or_try_init(|| describe(client)).await?;
        let witnesses = joined.witnesses.iter().map(image_of).collect();
        Ok(Access::new(identity.spec.images.clone(), witnesses, Arc::clone(&self.seen)))
    }

    /// The job's model, which the first engine loads, and this engine.
    async fn start(
        &self,
        client: &Client,
        joined: &v1::JoinReply,
    ) -> Result<(Arc<LoadedJob>, Arc<Engine>), WorkerError> {
        let options = &self.options;
        let loaded = self.shared.of_job(&joined.job);
        let identity = || loaded.identity.get_or_try_init(|| describe(client));
        let job = async { load(identity().await?, options.model.as_deref(), self.device).await };
        let job = loaded.job.get_or_try_init(|| job).await?;
        let lanes = if self.device.is_gpu() { GPU_LANES } else { options.threads.get() };
        let batch = match options.batch {
            Some(batch) => batch.get(),
            None => {
                let found = async { find_batch(job, identity().await?, lanes).await };
                *loaded.batch.get_or_try_init(|| found).await?
            }
        };
        let job = Arc::clone(job);
        let engine = Arc::new(Engine::start(Arc::clone(&job), lanes, batch)?);
        if self.device.is_gpu() {
            for gpu::Library { name, version, path } in gpu::libraries() {
                tracing::info!(library = name, version = version.unwrap_or_default(), path = %path.display(), "opened");
            }
        }
        tracing::info!(engine = self.number, device = %self.device, batch, lanes, "ready");
        Ok((job, engine))
    }
}

/// The job's identity.
async fn describe(client: &Client) -> Result<Arc<JobIdentity>, WorkerError> {
    let description = client.describe().await.map_err(no_answer)?;
    blocking(move || Ok(Arc::new(serde_json::from_slice(&description)?))).await
}

/// Loads the job's model.
async fn load(identity: &JobIdentity, model: Option<&str>, device: Device) -> Result<Arc<LoadedJob>, WorkerError> {
    let mut identity = identity.clone();
    if let Some(model) = model {
        model.clone_into(&mut identity.spec.model);
    }
    let models = find_models(&identity).await?;
    let prompts = identity.spec.texts().len();
    tracing::info!(model = identity.spec.model, prompts, %device, "loading the model");
    Ok(Arc::new(blocking(move || LoadedJob::load(&identity, &models, device)).await?))
}

/// The batch size for a job's model.
async fn find_batch(job: &Arc<LoadedJob>, identity: &Arc<JobIdentity>, lanes: usize) -> Result<usize, WorkerError> {
    let (job, identity) = (Arc::clone(job), Arc::clone(identity));
    blocking(move || Ok(batch::find(&job, &identity, lanes)?)).await
}

/// Runs slow work on a separate thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
) -> Result<T, WorkerError> {
    let span = tracing::Span::current();
    let worked = tokio::task::spawn_blocking(move || span.in_scope(work));
    Ok(worked.await.map_err(|_| WorkerError::Task("loader"))??)
}

/// Never ends, even if heartbeats stop: other calls find out the reason.
async fn silence<T>(beating: impl Future<Output = ()>) -> T {
    beating.await;
    std::future::pending().await
}

/// The directories of a job's models on this machine, fetched if necessary.
async fn find_models(identity: &JobIdentity) -> Result<JobModels, LoadError> {
    let model = ModelSource::parse(&identity.spec.model)?;
    let shortlist = identity.spec.shortlist.as_ref().map(|s| ModelSource::parse(&s.model)).transpose()?;
    Ok(JobModels::find(&model, shortlist.as_ref(), |note| tracing::info!("{note}")).await?)
}
