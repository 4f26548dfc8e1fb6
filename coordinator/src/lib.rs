//! The coordinator: plans a job's shards and blocks, leases them to workers, reduces what they report, and commits finished
//! shards. It never sees the model; a sample's latents live on the workers.
//!
//! [`brain`] decides (a state machine without IO or clock), [`ledger`] remembers, [`commit`] writes shards, and
//! [`service`] connects them to workers.

pub mod brain;
pub mod commit;
pub mod job;
pub mod ledger;
pub mod progress;
pub mod run;
pub mod service;

pub use job::{Job, JobError, JobOptions};
pub use progress::Progress;
pub use run::{Coordinator, MaxBad, Options, Outcome, RunError};
