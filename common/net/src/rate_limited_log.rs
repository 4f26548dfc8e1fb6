//! Limits how often a message is logged, however often clients trigger it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The interval between logged messages that clients can trigger.
const EVERY: Duration = Duration::from_secs(5);

/// Whether a message is due to be logged again.
#[derive(Debug, Default)]
pub struct RateLimitedLog(Mutex<Option<Instant>>);

impl RateLimitedLog {
    /// Returns `true` the first time, and then once every few seconds.
    pub fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}
