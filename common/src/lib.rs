//! The vocabulary both sides of `elbo` speak: what a job is, which evaluations it consists of, and how their errors become
//! predictions.
//!
//! The numeric core ([`schedule`], [`noise`], [`score`], [`sums`], [`policy`], [`ensemble`], [`unit`]) is synchronous, does no IO
//! and reads no clock, so that a result is a pure function of the job. [`store`], [`dataset`], [`manifest`], [`predictions`], [`output`] and
//! [`export`] are the rim: what is read
//! from and written to object storage.

pub mod activity;
pub mod audit;
pub mod budget;
pub mod calibration;
pub mod checksum;
pub mod class;
pub mod dataset;
pub mod ensemble;
pub mod export;
pub mod files;
pub mod fingerprint;
pub mod hand_table;
pub mod ids;
pub mod interval;
pub mod job;
pub mod layout;
pub mod loss;
pub mod manifest;
pub mod model_files;
pub mod model_source;
pub mod noise;
pub mod output;
mod parquet_file;
pub mod policy;
pub mod predictions;
pub mod preset;
pub mod python_json;
pub mod record;
pub mod recorded;
pub mod report;
pub mod schedule;
pub mod score;
pub mod store;
pub mod sums;
pub mod table;
pub mod text;
pub mod unit;
pub mod verify;
pub mod weight_files;
