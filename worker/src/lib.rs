//! The worker: leases blocks from a coordinator, evaluates them on its devices, and reports sums.
//!
//! [`worker`] is the life of a worker from joining to leaving; [`prepare`] turns a leased block into latents
//! ([`elbo_images`], then the model's VAE), and [`access`] says whose fault it is when one can't be read; [`engine`] evaluates them with the networks of [`elbo_models`], which are written in
//! the operations of [`elbo_kernels`]; [`report`] delivers the results and keeps what is not acknowledged. [`http`] and [`metrics`] tell operators how it
//! is.

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
pub mod metrics;
mod picture;
pub mod prepare;
pub mod problem;
pub mod report;
pub mod stage;
pub mod worker;

pub use call_error::{CallError, ClientError};
pub use device::{Device, Devices};
pub use error::{BlockError, WorkerError};
pub use worker::{Options, run};
