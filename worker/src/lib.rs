//! The worker: leases blocks from a coordinator, evaluates them on its devices, and reports sums.
//!
//! [`worker`] is the life of a worker from joining to leaving; [`prepare`] turns a leased block into latents
//! ([`elbo_images`], then the model's VAE), and [`access`] says whose fault it is when one can't be read; [`engine`] evaluates them with the networks of [`models`], which are written in
//! the operations of [`elbo_kernels`]; [`report`] delivers the results and keeps what is not acknowledged. [`http`] and [`metrics`] tell operators how it
//! is.

pub mod access;
mod batch;
pub mod client;
pub mod device;
pub mod engine;
pub mod held;
pub mod http;
pub mod latent;
mod lessee;
pub mod metrics;
pub mod models;
mod picture;
pub mod prepare;
pub mod problem;
mod pulse;
pub mod report;
pub mod stage;
pub mod worker;

pub use device::{Device, Devices};
pub use worker::{Options, WorkerError, run};
