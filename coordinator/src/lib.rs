//! The coordinator: plans a job's shards and blocks, leases them to workers, reduces their reports, and commits finished
//! shards. It never sees the model; a sample's latents live on the workers.
//!
//! [`scheduler`] makes the decisions (a state machine without IO or clock), [`ledger`] is the durable memory, [`commit`]
//! makes a shard's files, `writer` writes them, and [`service`] connects all this to workers. `calibrate` computes the
//! confidence of every prediction at the end. [`operations`] and [`watchdog`] show operators the state of a job.

mod calibrate;
pub mod commit;
pub mod intake;
pub mod job;
mod job_error;
mod lease_log;
pub mod ledger;
pub mod operations;
mod options;
pub mod pilot;
pub mod progress;
mod repair;
pub mod run;
pub mod scheduler;
mod server;
pub mod service;
pub mod status;
mod telemetry;
pub mod watchdog;
mod writer;

pub use job::{Job, JobOptions};
pub use job_error::JobError;
pub use operations::JobOperations;
pub use options::{CoordinatorOptions, MaxBad};
pub use progress::Progress;
pub use run::{Coordinator, RunError, RunOutcome, Then};
pub use server::{ServeError, Server};
