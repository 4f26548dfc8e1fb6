//! The worker: leases blocks from a coordinator, evaluates them on its devices, and reports sums.
//!
//! [`worker`] is the life of a worker from joining to leaving. [`loaded_job`] is what it loads for a job. [`prepare`] turns a leased block into latents
//! ([`elbo_images`], then the model's VAE), and [`access`] decides what is at fault when an image can't be read. [`engine`]
//! evaluates latents with the networks of [`elbo_models`], which use the operations of [`elbo_kernels`]. [`report`]
//! delivers the results and keeps those that are not acknowledged. [`http`] and [`metrics`] show operators the state of the
//! worker.

pub mod access;
mod batch;
mod call_error;
pub mod client;
pub mod device;
pub mod engine;
mod error;
pub mod finding;
mod heartbeats;
pub mod held;
pub mod http;
pub mod latent;
mod lease_loop;
pub mod loaded_job;
pub mod metrics;
mod picture;
pub mod prepare;
pub mod report;
pub mod stage;
pub mod worker;

pub use call_error::{CallError, ClientError};
pub use device::{Device, Devices};
pub use error::{BlockError, WorkerError};
pub use worker::{WorkerOptions, run};
