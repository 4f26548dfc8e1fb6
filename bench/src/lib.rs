//! Measures the parts of the system: [`engine`] a worker's network, beside PyTorch's, [`policy`] what policies make of known
//! errors, and the rest the real coordinator, a process of its own, over a generated dataset, from outside and by what it answers to
//! thousands of simulated workers.
//!
//! [`stage`] makes what a job needs and is never counted, [`process`] starts, watches and kills the coordinator, [`oracle`]
//! knows the errors every evaluation "has", [`simulated`] is a worker without a model, [`run()`] goes through the phases of a load, and
//! [`scaling`] through runs of one job with more and more workers.

pub mod engine;
pub mod oracle;
pub mod policy;
pub mod process;
mod random;
pub mod report;
mod run;
pub mod scaling;
pub mod simulated;
pub mod stage;

use std::path::PathBuf;

pub use report::Report;
pub use run::{Options, run};

/// A benchmark that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file or directory of the stage.
    #[error("{action} {path}: {source}; give --dir a directory with room")]
    Stage {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The coordinator could not be started.
    #[error("starting {program}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The coordinator ended though nobody asked it to.
    #[error("the coordinator ended ({status}): its log is {log}")]
    Ended {
        /// Its exit status.
        status: String,
        /// Where its log is.
        log: PathBuf,
    },
    /// The coordinator does not answer as it should.
    #[error("the coordinator {0}")]
    Answer(String),
    /// The system does not tell what a process uses.
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
    /// A tensor's arithmetic.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A thread ended by a panic, which is a defect.
    #[error("a thread of the network ended unexpectedly: please report this")]
    Lane,
    /// PyTorch could not be measured.
    #[error("measuring PyTorch with {python}: {why}; it needs tests/peer/requirements.txt")]
    Peer {
        /// The Python.
        python: PathBuf,
        /// Why not.
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
    /// A policy that looks at more slots than there are.
    #[error(
        "a policy looks at {needed} slots and {recorded} are recorded: run the exhaustive job with more --samples, or replay a shorter schedule"
    )]
    TooFewSlots {
        /// What it looks at.
        needed: usize,
        /// What there is.
        recorded: usize,
    },
    /// The schedule does not fit the classes.
    #[error(transparent)]
    Policy(#[from] elbo_core::policy::PolicyError),
}
