//! The coordinator: plans a job's shards and blocks, leases them to workers, reduces what they report, and commits finished
//! shards. It never sees the model; a sample's latents live on the workers.
//!
//! [`scheduler`] decides (a state machine without IO or clock), [`ledger`] remembers, [`commit`] makes a shard's files, `writer` puts them in place, and
//! [`service`] connects them to workers; `calibrate` says at the end how sure every prediction is; [`operations`] and [`watchdog`] tell operators how a job is.

mod audit;
mod calibrate;
pub mod commit;
pub mod intake;
pub mod job;
mod job_error;
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
pub use options::{MaxBad, Options};
pub use progress::Progress;
pub use run::{Coordinator, Outcome, RunError};
