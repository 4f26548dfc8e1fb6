//! What a job is, which evaluations it consists of, and how their errors become predictions.
//!
//! Everything here is a pure function of its arguments: nothing reads a file, a clock or the network, starts a thread, or draws a
//! random number that is not seeded, so that a result depends on the job alone. The crate's `clippy.toml` holds it to that.
//!
//! A [`sample`] is judged among [`class`]es, which are given by prompts; [`ensemble`] joins a class's prompts to a contender.
//! A [`policy`] says which evaluations come next ([`unit`](mod@unit)): each adds [`noise`] by the [`schedule`], and its error ([`loss`],
//! [`score`]) goes into sums ([`sums`]). What they say is a [`prediction`], whose confidence is by a [`calibration`].

pub mod activity;
pub mod audit;
pub mod calibration;
pub mod class;
pub mod ensemble;
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
pub mod sample;
pub mod schedule;
pub mod score;
pub mod sums;
pub mod text;
pub mod unit;
