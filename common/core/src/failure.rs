//! Why a sample has no class.

use std::fmt;
use std::str::FromStr;

use crate::ids::SampleId;

/// The step at which a sample failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureStage {
    /// No worker can read its file.
    Read,
    /// A worker could not read its file, but others may be able to.
    Unread,
    /// Its file is not an image, or is damaged.
    Decode,
    /// Its pixels can't be resized for the model.
    Preprocess,
    /// The model can't encode it.
    Encode,
    /// Its evaluations failed.
    Evaluate,
}

impl FailureStage {
    /// All stages.
    pub const ALL: [Self; 6] = [Self::Read, Self::Unread, Self::Decode, Self::Preprocess, Self::Encode, Self::Evaluate];

    /// The name in reports, the ledger and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Unread => "unread",
            Self::Decode => "decode",
            Self::Preprocess => "preprocess",
            Self::Encode => "encode",
            Self::Evaluate => "evaluate",
        }
    }

    /// The stage as written to an output, where it no longer matters that another worker might have read the file.
    pub fn in_output(self) -> Self {
        if self == Self::Unread { Self::Read } else { self }
    }
}

impl fmt::Display for FailureStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an unknown stage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a sample can't fail at '{0}'")]
pub struct UnknownStage(String);

impl FromStr for FailureStage {
    type Err = UnknownStage;

    fn from_str(name: &str) -> Result<Self, UnknownStage> {
        let unknown = || UnknownStage(name.chars().take(40).collect());
        Self::ALL.into_iter().find(|stage| stage.name() == name).ok_or_else(unknown)
    }
}

/// A sample that can't be evaluated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleFailure {
    /// The sample.
    pub sample: SampleId,
    /// Where it failed.
    pub stage: FailureStage,
    /// The reason.
    pub error: String,
}

impl fmt::Display for SampleFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.stage.in_output(), self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_parsed_from_its_name() {
        assert!(FailureStage::ALL.into_iter().all(|stage| stage.name().parse() == Ok(stage)));
        let error = "x".repeat(100).parse::<FailureStage>().unwrap_err().to_string();
        assert_eq!(error, format!("a sample can't fail at '{}'", "x".repeat(40)));
    }
}
