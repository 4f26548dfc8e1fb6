//! Saying things at a bounded rate, however often somebody else makes them happen.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a message that anybody can cause is logged.
const EVERY: Duration = Duration::from_secs(5);

/// Whether it is time to say something again.
#[derive(Debug, Default)]
pub struct RateLimitedLog(Mutex<Option<Instant>>);

impl RateLimitedLog {
    /// `true` the first time, and then once in a few seconds.
    pub fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}
