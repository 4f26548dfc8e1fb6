//! Why a call to the coordinator was not answered, and what to do about it.

use elbo_net::{TlsError, TlsProblem};
use elbo_proto::{MAX_MESSAGE_BYTES, TooLarge};

/// A coordinator that can't be worked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("'{0}' is not a coordinator's address: give a URL like http://host:7600 or https://host:7600")]
    Address(String),
    /// TLS can't be spoken.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// Client and coordinator don't agree on TLS.
    #[error("the coordinator at {address} can't be talked to: {problem}")]
    Tls {
        /// Where.
        address: String,
        /// What is wrong.
        problem: TlsProblem,
    },
    /// The token can't be sent.
    #[error("the token holds characters that can't be sent: use printable ASCII")]
    Token,
    /// Nobody answers.
    #[error(
        "the coordinator at {address} has not answered for {seconds} s ({reason}): check that it runs and can be reached, then start this worker again"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// For how long.
        seconds: u64,
        /// The last error.
        reason: String,
    },
    /// A message is too large to be sent.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// A message was too large for whoever got it.
    #[error(
        "a message between this worker and the coordinator at {address} takes more than the {MAX_MESSAGE_BYTES} bytes that either accepts ({reason}): run the same version of elbo on both, and report this if they are"
    )]
    Oversized {
        /// Where.
        address: String,
        /// What was said of it.
        reason: String,
    },
    /// The coordinator said no.
    #[error("the coordinator at {address} refused: {reason}")]
    Refused {
        /// Where.
        address: String,
        /// Its words.
        reason: String,
    },
}

/// How a call ended that was not answered.
#[derive(Debug)]
pub enum CallError {
    /// The coordinator does not know this worker: join again.
    Rejoin,
    /// The coordinator has another job now.
    OtherJob,
    /// The coordinator refused this very call; others may go through.
    Rejected(String),
    /// No more calls.
    Fatal(ClientError),
}

impl From<TooLarge> for CallError {
    fn from(error: TooLarge) -> Self {
        Self::Fatal(error.into())
    }
}
