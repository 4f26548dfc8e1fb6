//! What a worker is at.

/// What a worker is at, as it tells its coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// Fetching or loading the model, or encoding the prompts.
    Loading,
    /// It has no lease.
    Waiting,
    /// Its device waits for images.
    Preparing,
    /// Its device computes.
    Computing,
}

impl Activity {
    /// As status, logs and metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Computing => "computing",
        }
    }
}
