//! Benchmarks of the system's parts. [`engine`] measures a worker's network and compares it with PyTorch's. [`policy`]
//! replays policies on known errors. The rest measures the real coordinator in its own process, with a generated dataset and
//! thousands of simulated workers.
//!
//! [`candle`] runs candle-transformers' networks with the weights of a model directory. [`scenery`] makes a job's files, which
//! is not measured. [`process`] starts, watches and kills the coordinator. [`oracle`] computes the error of every evaluation.
//! [`simulated`] is a worker without a model. [`run()`] goes through the phases of a load, and [`scaling`] runs one job with
//! more and more workers.

pub mod candle;
pub mod engine;
pub mod oracle;
pub mod policy;
pub mod process;
mod random;
pub mod report;
mod run;
pub mod scaling;
pub mod scenery;
pub mod simulated;

use std::path::PathBuf;

pub use report::Report;
pub use run::{CoordinatorBenchOptions, run};

/// A benchmark that failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file or directory of the stage.
    #[error("{action} {path}: {source}; give --dir a directory with enough space")]
    Scenery {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The coordinator could not be started.
    #[error("starting {program}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The coordinator ended unexpectedly.
    #[error("the coordinator ended ({status}): its log is {log}")]
    Ended {
        /// Its exit status.
        status: String,
        /// Where its log is.
        log: PathBuf,
    },
    /// The coordinator gives an unexpected answer.
    #[error("the coordinator {0}")]
    Answer(String),
    /// The system does not report a process's resource usage.
    #[error("reading {0}: this benchmark needs Linux's /proc")]
    Proc(PathBuf),
    /// A simulated worker can't be made.
    #[error(transparent)]
    Client(#[from] elbo_worker::ClientError),
    /// A prediction can't be read.
    #[error(transparent)]
    Table(#[from] elbo_store::table::TableError),
    /// The network can't be made or run.
    #[error(transparent)]
    Model(#[from] elbo_models::ModelError),
    /// The device can't be used.
    #[error(transparent)]
    Device(#[from] elbo_worker::device::DeviceError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A thread panicked, which is a bug.
    #[error("a thread of the network ended unexpectedly: please report this")]
    Lane,
    /// candle-transformers could not be measured.
    #[error("candle-transformers can't run this network: {0}")]
    Candle(String),
    /// PyTorch could not be measured.
    #[error("measuring PyTorch with {python}: {why}; it needs tests/peer/requirements.txt")]
    Peer {
        /// The Python interpreter.
        python: PathBuf,
        /// The reason.
        why: String,
    },
    /// An output that can't be read.
    #[error(transparent)]
    Output(#[from] elbo_output::OutputError),
    /// A `job.json` that can't be read.
    #[error(transparent)]
    Record(#[from] elbo_output::record::RecordError),
    /// An output without the errors of an exhaustive job.
    #[error("{location} can't be replayed: {problem}")]
    NoErrors {
        /// The output.
        location: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A policy that uses more slots than were recorded.
    #[error(
        "a policy needs {needed} slots but only {recorded} are recorded: run the exhaustive job with more \
         --samples, or replay a shorter schedule"
    )]
    TooFewSlots {
        /// Slots the policy needs.
        needed: usize,
        /// Slots that were recorded.
        recorded: usize,
    },
    /// The schedule does not fit the classes.
    #[error(transparent)]
    Policy(#[from] elbo_core::policy::PolicyError),
}
