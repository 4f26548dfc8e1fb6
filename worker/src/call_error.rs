//! Errors of calls to the coordinator, with remedies.

use elbo_net::{TlsError, TlsProblem};
use elbo_proto::{MAX_MESSAGE_BYTES, TooLarge};

/// A coordinator that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is invalid.
    #[error("'{0}' is not a coordinator's address: give a URL like http://host:7600 or https://host:7600")]
    Address(String),
    /// TLS can't be set up.
    #[error(transparent)]
    Setup(#[from] TlsError),
    /// Client and coordinator don't agree on TLS.
    #[error("can't connect to the coordinator at {address}: {problem}")]
    Tls {
        /// The coordinator's address.
        address: String,
        /// What is wrong.
        problem: TlsProblem,
    },
    /// The token can't be sent.
    #[error("the token holds characters that can't be sent: use printable ASCII")]
    Token,
    /// The coordinator does not answer.
    #[error(
        "the coordinator at {address} has not answered for {seconds} s ({reason}): check that it runs and can be reached, then start this worker again"
    )]
    Unreachable {
        /// The coordinator's address.
        address: String,
        /// How long it has not answered.
        seconds: u64,
        /// The last error.
        reason: String,
    },
    /// A message is too large to be sent.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// A message was too large for its receiver.
    #[error(
        "a message between this worker and the coordinator at {address} is larger than the {MAX_MESSAGE_BYTES} bytes that each accepts ({reason}): run the same version of elbo on both; if they do, report this"
    )]
    Oversized {
        /// The coordinator's address.
        address: String,
        /// The reason given.
        reason: String,
    },
    /// The coordinator refused.
    #[error("the coordinator at {address} refused: {reason}")]
    Refused {
        /// The coordinator's address.
        address: String,
        /// Its reason.
        reason: String,
    },
}

/// The outcome of a call that was not answered.
#[derive(Debug)]
pub enum CallError {
    /// The coordinator does not know this worker: join again.
    Rejoin,
    /// The coordinator has another job now.
    OtherJob,
    /// The coordinator refused this call; others may succeed.
    Rejected(String),
    /// No more calls can succeed.
    Fatal(ClientError),
}

impl From<TooLarge> for CallError {
    fn from(error: TooLarge) -> Self {
        Self::Fatal(error.into())
    }
}
