//! The pure core: what a job is, which evaluations it consists of, and how their errors become predictions.
//!
//! Everything here is a pure function of its arguments: no files, clocks, network or threads, and no random number without a
//! seed. So a result depends only on the job. The crate's `clippy.toml` enforces this.
//!
//! A [`sample`] gets one of several [`class`]es, which prompts describe; [`ensemble`] groups the prompts into contenders. A
//! [`policy`] decides which evaluations come next ([`unit`](mod@unit)). Each evaluation adds [`noise`] according to the
//! [`schedule`]; its error ([`loss`], [`score`]) is added to the [`sums`]. The sums give a [`prediction`], and a
//! [`calibration`] gives its confidence.

pub mod activity;
pub mod audit;
pub mod calibration;
pub mod causes;
pub mod class;
pub mod draw;
pub mod ensemble;
pub mod failure;
pub mod hand_table;
pub mod ids;
pub mod interval;
pub mod job;
pub mod loss;
pub mod noise;
pub mod policy;
pub mod prediction;
pub mod preset;
pub mod python_json;
pub mod ranking;
pub mod sample;
pub mod schedule;
pub mod score;
pub mod sums;
pub mod text;
pub mod unit;
