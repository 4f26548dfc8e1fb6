//! A job's output: its [`layout`], `job.json` ([`record`]), [`predictions`] and [`audit`]s as Parquet, reading all of it back
//! ([`Output`]), and what is made of it: [`verify`], [`report`], [`export`].

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
