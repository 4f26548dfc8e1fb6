//! What a worker is doing.

/// What a worker is doing, as it reports to its coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// Fetching or loading the model, or encoding the prompts.
    Loading,
    /// It has no lease.
    Waiting,
    /// Its device is waiting for images.
    Preparing,
    /// Its device is computing.
    Computing,
}

impl Activity {
    /// The name in status, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Computing => "computing",
        }
    }
}
