//! A job's output: its [`layout`], `job.json` ([`record`]), and its [`predictions`] and [`audit`]s as Parquet. [`Output`] reads
//! all of it back; [`verify`], [`report`] and [`export`] use it.

pub mod audit;
pub mod export;
pub mod layout;
mod output;
pub mod predictions;
pub mod record;
pub mod recorded;
pub mod report;
pub mod verify;

pub use output::{Output, OutputError};
