//! Errors of a block or a whole worker, with remedies.

use elbo_data::ReadError;
use elbo_models::ModelError;

use crate::call_error::{CallError, ClientError};
use crate::loaded_job::LoadError;

/// A whole block can't be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It refers to samples, rounds or prompts that are not the job's.
    #[error(
        "the block refers to a sample, round or prompt that this job does not have: run the same version of elbo everywhere"
    )]
    Foreign,
    /// The captions of some samples can't be encoded.
    #[error("encoding the captions: {0}")]
    Captions(ModelError),
    /// The images' storage does not respond.
    #[error("{0}; check the storage of the images, then start the worker again")]
    Storage(ReadError),
    /// This worker can't read any image.
    #[error(
        "the images of {images} can't be read here, and none of them is blamed for it: {problem}; fix this machine's access to them (mount, credentials, clock), then start the worker again (for `elbo label`, run the same command, which resumes)"
    )]
    Access {
        /// The job's images.
        images: String,
        /// What happened.
        problem: String,
    },
    /// The device failed, or has no room for one image.
    #[error(
        "the device failed: {0}; start the worker again (with a smaller --batch if memory ran out): the work in hand is not lost"
    )]
    Device(String),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// Work could not be given to the engine because its lanes are gone, which is a defect.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the engine has stopped: restart the worker")]
pub struct EngineStopped;

/// An image that was not encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The model can't encode it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] EngineStopped),
}

/// A worker that failed.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The coordinator can't be used.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The job can't be worked on here.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A block failed.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The engine's threads could not be started.
    #[error("starting the engine: {0}")]
    Start(#[from] std::io::Error),
    /// It was told to stop, and could not report in time.
    #[error(
        "told to stop, the worker could not deliver its results within {0} s: what was not acknowledged will be computed again"
    )]
    Grace(u64),
    /// The coordinator has another job: join again.
    #[error("the coordinator has another job now: start the worker again")]
    OtherJob,
    /// A background task panicked, which is a defect.
    #[error("the worker's {0} ended unexpectedly: start the worker again, and report this")]
    Task(&'static str),
}

impl From<EngineStopped> for WorkerError {
    fn from(stopped: EngineStopped) -> Self {
        Self::Block(BlockError::Stopped(stopped))
    }
}

/// The error of a worker whose call was not answered.
pub(crate) fn no_answer(error: CallError) -> WorkerError {
    match error {
        CallError::Fatal(error) => error.into(),
        CallError::OtherJob => WorkerError::OtherJob,
        CallError::Rejected(reason) => ClientError::Refused { address: "this address".into(), reason }.into(),
        CallError::Rejoin => {
            ClientError::Refused { address: "this address".into(), reason: "it forgot this worker".into() }.into()
        }
    }
}
