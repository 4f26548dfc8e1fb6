//! The command line. Flag names are a contract; `JobArgs` are also the keys of job.toml and `ELBO_*` variables.

use std::net::SocketAddr;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use elbo_bench::engine::{Peer, Subject};
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
    /// Log format; ELBO_LOG sets what is logged (like elbo=debug,info)
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
    /// Compute for a coordinator
    Worker(WorkerArgs),
    /// Show the progress of a running or finished job
    Status(StatusArgs),
    /// Summarise a job's results: accuracy, confusion, uncertain and quarantined samples
    Report(OutputArgs),
    /// Check that the predictions contain every sample exactly once
    Verify(OutputArgs),
    /// Write the predictions as CSV, or as one JSON file per image (WebDataset)
    Export(ExportArgs),
    /// Count a job's evaluations without running it
    Plan(Box<PlanArgs>),
    /// Show a model's family, size and memory needs, and any problems with it
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
    /// Devices to compute on, with one engine each: cpu, cuda (every GPU), cuda:0,1, or a list like cpu,cpu [default: cpu]
    #[arg(long, env = "ELBO_DEVICE")]
    pub(crate) device: Option<String>,
    /// CPU threads of each engine [default: all physical cores, divided among the engines]
    #[arg(long, env = "ELBO_THREADS")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Evaluations per batch [default: measured]
    #[arg(long, env = "ELBO_BATCH")]
    pub(crate) batch: Option<NonZeroUsize>,
    /// Memory for images that this process reads and decodes ahead, like 512MiB; a larger image is decoded alone [default:
    /// 2GiB]
    #[arg(long, env = "ELBO_DECODE_MEMORY", value_name = "SIZE")]
    pub(crate) decode_memory: Option<ByteSize>,
}

impl DeviceArgs {
    /// These flags, with missing values taken from a job file.
    pub(crate) fn over(self, file: &JobArgs) -> Self {
        let Self { device, threads, batch, decode_memory } = self;
        Self {
            device: device.or_else(|| file.device.clone()),
            threads,
            batch: batch.or(file.batch),
            decode_memory: decode_memory.or(file.decode_memory),
        }
    }

    /// Memory for images that are read ahead, in bytes.
    pub(crate) fn decode_bytes(&self) -> u64 {
        self.decode_memory.map_or(Memory::DEFAULT, |size| size.0)
    }
}

impl RunArgs {
    /// How many samples may be quarantined before the job fails.
    pub(crate) fn max_bad(&self) -> MaxBad {
        self.max_bad.unwrap_or(MaxBad::Percent(10.0))
    }

    /// These flags, with missing values taken from a job file.
    pub(crate) fn over(self, file: &JobArgs) -> Self {
        Self { max_bad: self.max_bad.or(file.max_bad), progress: self.progress.or(file.progress), ..self }
    }
}

/// How a job is run. These flags don't change results.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Discard the results of an earlier job in --out
    #[arg(long, conflicts_with = "resume")]
    pub(crate) fresh: bool,
    /// Resume the job in --out (the default)
    #[arg(long)]
    pub(crate) resume: bool,
    /// Retry the images that an earlier run quarantined, after you have fixed the cause
    #[arg(long, conflicts_with = "fresh")]
    pub(crate) retry_quarantined: bool,
    /// Recompute shards that `elbo verify` reports as damaged, by number or file name: 12 or shard-00012.parquet
    #[arg(long, value_name = "SHARD", value_delimiter = ',', value_parser = shard, conflicts_with = "fresh")]
    pub(crate) recompute: Vec<ShardId>,
    /// Fail the job if more samples than this are quarantined: a number or a share like 5% [default: 10%]
    #[arg(long, env = "ELBO_MAX_BAD")]
    pub(crate) max_bad: Option<MaxBad>,
    /// How to show progress [default: auto]
    #[arg(long, value_enum, env = "ELBO_PROGRESS")]
    pub(crate) progress: Option<ProgressMode>,
}

/// Parses a shard number, or a file name as `elbo verify` prints it.
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
    /// Output: a directory or a URL like s3://bucket/prefix
    #[arg(long, env = "ELBO_OUT")]
    pub(crate) out: Option<String>,
    /// Embedded workers [default: one per device]
    #[arg(long, env = "ELBO_WORKERS")]
    pub(crate) workers: Option<NonZeroUsize>,
    /// The HTTP server for operators.
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    /// Where to compute.
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// How to run.
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// The HTTP server of a process.
#[derive(Clone, Debug, Args)]
pub(crate) struct HttpArgs {
    /// Address of the HTTP server, like 0.0.0.0:7601: /livez, /readyz, /metrics (Prometheus), /status (JSON) and a page at /.
    /// These are read-only and need no token; they show names of workers and hosts, but no secrets
    #[arg(long, env = "ELBO_HTTP", value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Additional host names that --http accepts, such as a service's or a proxy's; IP addresses, localhost and this host's
    /// name are always accepted
    #[arg(long, env = "ELBO_HTTP_HOST", value_name = "NAME,NAME", value_delimiter = ',')]
    pub(crate) http_host: Vec<String>,
}

/// `elbo coordinator`.
#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    /// The job.
    #[command(flatten)]
    pub(crate) job: JobSource,
    /// Output: a directory or a URL like s3://bucket/prefix
    #[arg(long, env = "ELBO_OUT")]
    pub(crate) out: Option<String>,
    /// Address to listen on
    #[arg(long, env = "ELBO_LISTEN", default_value = "127.0.0.1:7600")]
    pub(crate) listen: SocketAddr,
    /// Allow listening beyond this machine without a token
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Seconds after which a silent worker loses its leases
    #[arg(long, env = "ELBO_LEASE_SECONDS", default_value = "30")]
    pub(crate) lease_seconds: f64,
    /// Who may connect.
    #[command(flatten)]
    pub(crate) gate: GateArgs,
    /// The HTTP server for operators.
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
    /// The model on this machine, if it is not at the job's path; takes the same values as for `elbo label`
    #[arg(long, env = "ELBO_MODEL")]
    pub(crate) model: Option<String>,
    /// Seconds to wait for an unreachable coordinator
    #[arg(long, env = "ELBO_PATIENCE", default_value = "600")]
    pub(crate) patience: u64,
    /// Seconds to finish and report the current computation after SIGTERM or SIGINT
    #[arg(long, env = "ELBO_GRACE", default_value = "25")]
    pub(crate) grace: f64,
    /// Credentials for the coordinator.
    #[command(flatten)]
    pub(crate) caller: CallerArgs,
    /// The HTTP server for operators.
    #[command(flatten)]
    pub(crate) http: HttpArgs,
    /// Where to compute.
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

/// `elbo status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The URL of a running coordinator (http://host:7600 or https://host:7600), or a job's output
    pub(crate) target: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Credentials for the coordinator.
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
    /// csv: one file with a line per image. json: a file KEY.json below --to for every image KEY.ext; for images in a tar, a
    /// tar of the same name with a member KEY.json for each image, in the same order
    #[arg(long, value_enum)]
    pub(crate) format: ExportFormat,
    /// Destination: a file for csv, a directory for json, or a URL like s3://bucket/labels.csv
    #[arg(long, value_name = "DEST")]
    pub(crate) to: String,
    /// How many of the best classes to write, with their mean errors (csv: columns class_1, error_1, ...) [default: csv 5,
    /// json all]
    #[arg(long, value_name = "K")]
    pub(crate) scores: Option<usize>,
    /// Replace existing files; without this flag, nothing is written if one of them exists
    #[arg(long)]
    pub(crate) force: bool,
}

/// Format of exported predictions.
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
    /// Evaluations per second of all devices together, to estimate the time
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
    /// The coordinator with generated images and simulated workers: listing, CPU time, memory, ledger, restart
    Coordinator(BenchCoordinatorArgs),
    /// A worker's network: evaluations per second, share of the device's matrix product rate, time per operation, compared
    /// with PyTorch and candle
    Engine(BenchEngineArgs),
    /// Policies on the errors of an exhaustive job, or on random errors: accuracy, evaluations, agreement
    Policy(BenchPolicyArgs),
    /// How a job's time depends on the number of simulated workers, and the cost of killed workers and coordinators
    Scaling(BenchScalingArgs),
}

/// `elbo bench engine`.
#[derive(Debug, Args)]
pub(crate) struct BenchEngineArgs {
    /// Network: digits, sd15, sd2-base, sdxl, sd3-m, dit-xl-2, or a model directory, of which only the configuration is read
    #[arg(long, default_value = "sd2-base")]
    pub(crate) model: Subject,
    /// Evaluations per batch; each value is measured. On the CPU a batch is divided among the threads
    #[arg(long, value_delimiter = ',', default_value = "2")]
    pub(crate) batch: Vec<NonZeroUsize>,
    /// Prompts per noisy latent; with more than one, shared parts are computed once, as in a job
    #[arg(long, default_value = "1")]
    pub(crate) prompts: NonZeroUsize,
    /// Element type: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ModelDtype,
    /// Device to compute on: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: Devices,
    /// CPU threads [default: all physical cores]
    #[arg(long)]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Height and width of the latents [default: the configuration's]
    #[arg(long)]
    pub(crate) latent: Option<NonZeroUsize>,
    /// Minimum seconds per measurement
    #[arg(long, default_value = "5")]
    pub(crate) seconds: f64,
    /// Measurements per batch size; the fastest counts
    #[arg(long, default_value = "3")]
    pub(crate) rounds: NonZeroUsize,
    /// Skip the large matrix products that the engine is compared with
    #[arg(long)]
    pub(crate) no_peak: bool,
    /// Write a trace of up to one second, or of one pass, for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Don't measure: run one pass over the first batch between cuProfilerStart and cuProfilerStop, for `ncu
    /// --profile-from-start off` or `nsys --capture-range cudaProfilerApi`
    #[arg(long, conflicts_with_all = ["profile", "peer", "json"])]
    pub(crate) capture: bool,
    /// Also measure another implementation of the network: `candle` (candle-transformers, in this process), or PyTorch and
    /// diffusers by a Python interpreter that has tests/peer/requirements.txt installed. May be given once for each; if one
    /// fails, the report says why
    #[arg(long, value_name = "candle|PYTHON")]
    pub(crate) peer: Vec<Peer>,
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
    /// Draw random errors of this many classes instead
    #[arg(long, value_name = "CLASSES", conflicts_with = "out")]
    pub(crate) synthetic: Option<NonZeroUsize>,
    /// Images to draw
    #[arg(long, requires = "synthetic", default_value = "200")]
    pub(crate) images: NonZeroUsize,
    /// Contenders kept after each stage of the reference
    #[arg(long, value_delimiter = ',', default_value = "5,1", conflicts_with = "preset")]
    pub(crate) keep: Vec<u32>,
    /// Total timesteps by the end of each stage of the reference
    #[arg(long, value_delimiter = ',', default_value = "20,100", conflicts_with = "preset")]
    pub(crate) samples: Vec<u32>,
    /// Published schedule to use as the reference [default with --synthetic: imagenet]
    #[arg(long)]
    pub(crate) preset: Option<Preset>,
    /// Risk levels of the races
    #[arg(long, value_delimiter = ',', default_value = "0.05,0.1,0.02,0.01")]
    pub(crate) risk: Vec<f64>,
    /// Maximum slots per race
    #[arg(long, default_value = "250")]
    pub(crate) max_slots: u32,
    /// Images from which a pilot learns which timesteps to use, chosen by the seed; 0 for no pilot
    #[arg(long, default_value = "200")]
    pub(crate) pilot: usize,
    /// Seed for choosing the pilot's images and for random errors
    #[arg(long, default_value = "0")]
    pub(crate) seed: u64,
    /// Write the pilot's timesteps, for --timesteps-from
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
    /// Numbers of workers, with one run each
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    pub(crate) workers: Vec<NonZeroUsize>,
    /// Evaluations per second of each worker
    #[arg(long, default_value = "1000")]
    pub(crate) rate: f64,
    /// Seconds that the run with the most workers should take; the others take longer
    #[arg(long, default_value = "60")]
    pub(crate) seconds: f64,
    /// Workers that are killed in a run with the most workers
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
    /// Classes, with one prompt each
    #[arg(long, default_value = "1000")]
    pub(crate) classes: u32,
    /// Schedule: pets, cifar10, stl10, food, aircraft, flowers, objectnet or imagenet
    #[arg(long, default_value = "imagenet")]
    pub(crate) preset: Preset,
    /// Simulated workers: some come late, some straggle, some die and are replaced
    #[arg(long, default_value = "1000")]
    pub(crate) workers: NonZeroUsize,
    /// Evaluations per second of the average worker, with one phase per value
    #[arg(long, value_delimiter = ',', default_value = "92,1000")]
    pub(crate) rate: Vec<f64>,
    /// Seconds to measure at each rate
    #[arg(long, default_value = "60")]
    pub(crate) seconds: f64,
    /// Shards to finish with workers that answer immediately, within ten times --seconds
    #[arg(long, default_value = "4")]
    pub(crate) shards: u64,
    /// Seconds to wait before the ledger's size is measured
    #[arg(long, default_value = "180")]
    pub(crate) settle: f64,
    /// Directory for the images and the job, kept for the next benchmark [default: a temporary directory that is removed]
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
