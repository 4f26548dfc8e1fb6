//! The command line. Flag names are a contract; `JobArgs` are also the keys of job.toml and `ELBO_*` variables.

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use elbo_bench::engine::Subject;
use elbo_coordinator::MaxBad;
use elbo_core::ids::ShardId;
use elbo_core::job::ModelDtype;
use elbo_core::preset::Preset;
use elbo_data::budget::Memory;
use elbo_worker::Devices;

use crate::access::{CallerArgs, GateArgs};
use crate::job_args::{JobArgs, JobSource};
use crate::logging::LogFormat;
use crate::progress::ProgressMode;

/// Label image corpora with a text-to-image diffusion model, without training.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 120, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// How logs are written; ELBO_LOG says which (like elbo=debug,info)
    #[arg(long, global = true, value_enum, env = "ELBO_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub(crate) log: LogFormat,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Label 360 handwritten digits with a small model; both are inside this program
    Demo(DemoArgs),
    /// Label images on this machine
    Label(Box<LabelArgs>),
    /// Coordinate a job for workers on other machines
    Coordinator(Box<CoordinatorArgs>),
    /// Work for a coordinator
    Worker(WorkerArgs),
    /// Show how far a running or finished job is
    Status(StatusArgs),
    /// Summarise a job's results: accuracy, confusion, uncertain and quarantined samples
    Report(OutputArgs),
    /// Check that every sample is exactly once in the predictions
    Verify(OutputArgs),
    /// Write the predictions as CSV, or as JSON beside the images (WebDataset)
    Export(ExportArgs),
    /// Count what a job would evaluate, without running it
    Plan(Box<PlanArgs>),
    /// Show what a model is, what it needs, and what would make it fail
    Inspect(InspectArgs),
    /// Measure parts of the system on this machine
    Bench(BenchArgs),
}

impl Command {
    /// Whether this is a long-running process whose log an operator reads.
    pub(crate) fn is_service(&self) -> bool {
        matches!(self, Self::Coordinator(_) | Self::Worker(_))
    }
}

/// Where to compute.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Devices to compute on, an engine for each: cpu, cuda (every GPU), cuda:0,1, or several as in cpu,cpu [default: cpu]
    #[arg(long, env = "ELBO_DEVICE")]
    pub(crate) device: Option<String>,
    /// CPU threads of each engine [default: all cores, divided among the engines]
    #[arg(long, env = "ELBO_THREADS")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Evaluations in a batch [default: found by measuring]
    #[arg(long, env = "ELBO_BATCH")]
    pub(crate) batch: Option<NonZeroUsize>,
    /// Memory of this process for images that are read and decoded ahead, like 512MiB; one that takes more is decoded alone
    /// [default: 2GiB]
    #[arg(long, env = "ELBO_DECODE_MEMORY", value_name = "SIZE")]
    pub(crate) decode_memory: Option<ByteSize>,
}

impl DeviceArgs {
    /// These flags, with what they leave open taken from a job file.
    pub(crate) fn over(self, file: &JobArgs) -> Self {
        let Self { device, threads, batch, decode_memory } = self;
        Self {
            device: device.or_else(|| file.device.clone()),
            threads,
            batch: batch.or(file.batch),
            decode_memory: decode_memory.or(file.decode_memory),
        }
    }

    /// Bytes that images which are read ahead may take.
    pub(crate) fn decode_bytes(&self) -> u64 {
        self.decode_memory.map_or(Memory::DEFAULT, |size| size.0)
    }
}

impl RunArgs {
    /// How many bad samples are borne.
    pub(crate) fn max_bad(&self) -> MaxBad {
        self.max_bad.unwrap_or(MaxBad::Percent(10.0))
    }

    /// These flags, with what they leave open taken from a job file.
    pub(crate) fn over(self, file: &JobArgs) -> Self {
        Self { max_bad: self.max_bad.or(file.max_bad), progress: self.progress.or(file.progress), ..self }
    }
}

/// How a job is run; changes no result.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Discard what an earlier job left in --out
    #[arg(long, conflicts_with = "resume")]
    pub(crate) fresh: bool,
    /// Resume the job in --out (the default)
    #[arg(long)]
    pub(crate) resume: bool,
    /// Give the images that an earlier run quarantined another try, after their cause was mended
    #[arg(long, conflicts_with = "fresh")]
    pub(crate) retry_quarantined: bool,
    /// Compute shards again whose files `elbo verify` calls damaged, by number or file name: 12 or shard-00012.parquet
    #[arg(long, value_name = "SHARD", value_delimiter = ',', value_parser = shard, conflicts_with = "fresh")]
    pub(crate) recompute: Vec<ShardId>,
    /// Quarantined samples to bear before the job is ended: a number or a share like 5% [default: 10%]
    #[arg(long, env = "ELBO_MAX_BAD")]
    pub(crate) max_bad: Option<MaxBad>,
    /// How to show progress [default: auto]
    #[arg(long, value_enum, env = "ELBO_PROGRESS")]
    pub(crate) progress: Option<ProgressMode>,
}

/// A shard as people and `elbo verify` name it.
fn shard(text: &str) -> Result<ShardId, String> {
    let name = text.rsplit('/').next().unwrap_or(text);
    let name = name.strip_suffix(".parquet").unwrap_or(name);
    let number = name.strip_prefix("shard-").unwrap_or(name).parse();
    number
        .map(ShardId)
        .map_err(|_| format!("'{text}' names no shard: give a number like 12, or a file like shard-00012.parquet"))
}

/// `elbo demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Directory for the results
    #[arg(long, default_value = "elbo-demo")]
    pub(crate) out: PathBuf,
    /// Embedded workers
    #[arg(long, default_value = "2")]
    pub(crate) workers: NonZeroUsize,
    /// Where to compute.
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// How to run.
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// `elbo label`.
#[derive(Debug, Args)]
pub(crate) struct LabelArgs {
    /// The job.
    #[command(flatten)]
    pub(crate) job: JobSource,
    /// Where results go: a directory or a URL like s3://bucket/prefix
    #[arg(long, env = "ELBO_OUT")]
    pub(crate) out: Option<String>,
    /// Embedded workers [default: one per device]
    #[arg(long, env = "ELBO_WORKERS")]
    pub(crate) workers: Option<NonZeroUsize>,
    /// What operators are told.
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    /// Where to compute.
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// How to run.
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// The HTTP side of a process.
#[derive(Clone, Debug, Args)]
pub(crate) struct HttpArgs {
    /// Address for /livez, /readyz, /metrics (Prometheus), /status (JSON) and a page at /, like 0.0.0.0:7601. They only
    /// read, need no token and show no secrets, but names of workers and hosts
    #[arg(long, env = "ELBO_HTTP", value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Names that --http answers to beside addresses, localhost and this host's name: of a service, or behind a proxy
    #[arg(long, env = "ELBO_HTTP_HOST", value_name = "NAME,NAME", value_delimiter = ',')]
    pub(crate) http_host: Vec<String>,
}

/// `elbo coordinator`.
#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    /// The job.
    #[command(flatten)]
    pub(crate) job: JobSource,
    /// Where results go: a directory or a URL like s3://bucket/prefix
    #[arg(long, env = "ELBO_OUT")]
    pub(crate) out: Option<String>,
    /// Address to listen on
    #[arg(long, env = "ELBO_LISTEN", default_value = "127.0.0.1:7600")]
    pub(crate) listen: SocketAddr,
    /// Listen beyond this machine without a token
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Seconds without a sign of life after which a worker's leases go to others
    #[arg(long, env = "ELBO_LEASE_SECONDS", default_value = "30")]
    pub(crate) lease_seconds: f64,
    /// Who may take part.
    #[command(flatten)]
    pub(crate) gate: GateArgs,
    /// What operators are told.
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    /// How to run.
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// `elbo worker`.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// The coordinator's URL
    #[arg(long, env = "ELBO_COORDINATOR")]
    pub(crate) coordinator: String,
    /// The model for this machine, if it is not where the job says: as for `elbo label`
    #[arg(long, env = "ELBO_MODEL")]
    pub(crate) model: Option<String>,
    /// Seconds to wait for a coordinator that can't be reached
    #[arg(long, env = "ELBO_PATIENCE", default_value = "600")]
    pub(crate) patience: u64,
    /// Seconds to finish and report what is being computed, once told to stop (SIGTERM, SIGINT)
    #[arg(long, env = "ELBO_GRACE", default_value = "25")]
    pub(crate) grace: f64,
    /// How it is let in.
    #[command(flatten)]
    pub(crate) caller: CallerArgs,
    /// What operators are told.
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    /// Where to compute.
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// `elbo status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// A running coordinator's URL (http://host:7600 or https://host:7600), or an output
    pub(crate) target: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// How it is let in.
    #[command(flatten)]
    pub(crate) caller: CallerArgs,
}

/// `elbo report` and `elbo verify`.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// A job's output: a directory or a URL
    pub(crate) out: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A job's output: a directory or a URL
    pub(crate) out: String,
    /// csv: one file, a line per image. json: for every image KEY.ext a file KEY.json below --to; for images in a tar, a tar of
    /// the same name with a member KEY.json for each, in the same order
    #[arg(long, value_enum)]
    pub(crate) format: ExportFormat,
    /// Where to: a file for csv, a directory for json; or a URL like s3://bucket/labels.csv
    #[arg(long, value_name = "DEST")]
    pub(crate) to: String,
    /// Best classes to name, with their mean errors (csv: columns class_1, error_1, ...) [default: csv 5, json all]
    #[arg(long, value_name = "K")]
    pub(crate) scores: Option<usize>,
    /// Replace files that are there; without it, nothing is written where one of them is
    #[arg(long)]
    pub(crate) force: bool,
}

/// What predictions are exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExportFormat {
    /// One file
    Csv,
    /// A file per image, or a tar per tar
    Json,
}

/// `elbo plan`.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The job.
    #[command(flatten)]
    pub(crate) job: JobSource,
    /// Evaluations per second of the devices together, for the time it will take
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A directory, hf://owner/name[@revision], or a URL like s3://bucket/model
    pub(crate) model: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo bench`.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// The coordinator, over generated images and with simulated workers: listing, CPU time, memory, ledger, restart
    Coordinator(BenchCoordinatorArgs),
    /// A worker's network: evaluations per second, share of the device's matrix products, where the time goes, beside PyTorch
    Engine(BenchEngineArgs),
    /// What policies make of the errors of an exhaustive job, or of drawn ones: accuracy, evaluations, agreement
    Policy(BenchPolicyArgs),
    /// How a job's time falls with the number of simulated workers, and what deaths of workers and coordinator cost
    Scaling(BenchScalingArgs),
}

/// `elbo bench engine`.
#[derive(Debug, Args)]
pub(crate) struct BenchEngineArgs {
    /// Network: digits, sd15, sd2-base, sdxl, sd3-m, dit-xl-2, or a model directory, whose configuration alone is read
    #[arg(long, default_value = "sd2-base")]
    pub(crate) model: Subject,
    /// Evaluations at a time, a measurement for each; on the CPU they are divided among the threads
    #[arg(long, value_delimiter = ',', default_value = "2")]
    pub(crate) batch: Vec<NonZeroUsize>,
    /// Prompts of every noisy latent; with more than one, what they share is computed once, as in a job
    #[arg(long, default_value = "1")]
    pub(crate) prompts: NonZeroUsize,
    /// Type to compute in: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ModelDtype,
    /// What to compute on: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: Devices,
    /// CPU threads [default: all cores]
    #[arg(long)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Side of the latents [default: the configuration's]
    #[arg(long)]
    pub(crate) latent: Option<NonZeroUsize>,
    /// Seconds a measurement takes at least
    #[arg(long, default_value = "5")]
    pub(crate) seconds: f64,
    /// Measurements of each batch, of which the fastest counts
    #[arg(long, default_value = "3")]
    pub(crate) rounds: NonZeroUsize,
    /// Leave out the large products that the engine is compared with
    #[arg(long)]
    pub(crate) no_peak: bool,
    /// Write a trace of a second at most, or of one pass, which ui.perfetto.dev opens
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Measure nothing: make one pass over the first batch between cuProfilerStart and cuProfilerStop, for `ncu
    /// --profile-from-start off` or `nsys --capture-range cudaProfilerApi`
    #[arg(long, conflicts_with_all = ["profile", "peer", "json"])]
    pub(crate) capture: bool,
    /// Measure PyTorch and diffusers too, with this Python, which has tests/peer/requirements.txt installed; where that fails, the
    /// report says why
    #[arg(long, value_name = "PYTHON")]
    pub(crate) peer: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo bench policy`.
#[derive(Debug, Args)]
pub(crate) struct BenchPolicyArgs {
    /// Output of a job with --policy exhaustive --samples N --write-errors
    #[arg(required_unless_present = "synthetic")]
    pub(crate) out: Option<String>,
    /// Draw the errors of so many classes instead
    #[arg(long, value_name = "CLASSES", conflicts_with = "out")]
    pub(crate) synthetic: Option<NonZeroUsize>,
    /// Images to draw
    #[arg(long, requires = "synthetic", default_value = "200")]
    pub(crate) images: NonZeroUsize,
    /// Contenders that stay after each stage of the reference
    #[arg(long, value_delimiter = ',', default_value = "5,1", conflicts_with = "preset")]
    pub(crate) keep: Vec<u32>,
    /// Timesteps by the end of each stage of the reference
    #[arg(long, value_delimiter = ',', default_value = "20,100", conflicts_with = "preset")]
    pub(crate) samples: Vec<u32>,
    /// A published schedule as the reference [default with --synthetic: imagenet]
    #[arg(long)]
    pub(crate) preset: Option<Preset>,
    /// Levels of races
    #[arg(long, value_delimiter = ',', default_value = "0.05,0.1,0.02,0.01")]
    pub(crate) risk: Vec<f64>,
    /// Slots of a race at most
    #[arg(long, default_value = "250")]
    pub(crate) max_slots: u32,
    /// Images a pilot learns from which timesteps to look at, chosen by the seed; 0 for no pilot
    #[arg(long, default_value = "200")]
    pub(crate) pilot: usize,
    /// Seed of the choice, and of drawn errors
    #[arg(long, default_value = "0")]
    pub(crate) seed: u64,
    /// Write what the pilot found, for --timesteps-from
    #[arg(long, value_name = "FILE")]
    pub(crate) timesteps_to: Option<PathBuf>,
    /// Write the table as CSV
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo bench scaling`.
#[derive(Debug, Args)]
pub(crate) struct BenchScalingArgs {
    /// Numbers of workers, a run for each
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    pub(crate) workers: Vec<NonZeroUsize>,
    /// Evaluations per second of each worker
    #[arg(long, default_value = "1000")]
    pub(crate) rate: f64,
    /// Seconds that the most workers should take; fewer take longer
    #[arg(long, default_value = "60")]
    pub(crate) seconds: f64,
    /// Workers that die in a run with the most workers
    #[arg(long, default_value = "4")]
    pub(crate) deaths: usize,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// `elbo bench coordinator`.
#[derive(Debug, Args)]
pub(crate) struct BenchCoordinatorArgs {
    /// Images
    #[arg(long, default_value = "10000")]
    pub(crate) samples: NonZeroU64,
    /// Classes, each of one prompt
    #[arg(long, default_value = "1000")]
    pub(crate) classes: u32,
    /// Schedule: pets, cifar10, stl10, food, aircraft, flowers, objectnet or imagenet
    #[arg(long, default_value = "imagenet")]
    pub(crate) preset: Preset,
    /// Simulated workers: some come late, some straggle, some die and are replaced
    #[arg(long, default_value = "1000")]
    pub(crate) workers: NonZeroUsize,
    /// Evaluations per second of the average worker; a phase for each
    #[arg(long, value_delimiter = ',', default_value = "92,1000")]
    pub(crate) rate: Vec<f64>,
    /// Seconds that workers of each rate are measured
    #[arg(long, default_value = "60")]
    pub(crate) seconds: f64,
    /// Shards that workers answering at once have to finish, in at most ten times as long
    #[arg(long, default_value = "4")]
    pub(crate) shards: u64,
    /// Seconds of rest before the size of the ledger is looked at
    #[arg(long, default_value = "180")]
    pub(crate) settle: f64,
    /// Directory for the images and the job, kept for the next benchmark [default: a temporary one, removed]
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
