//! How a command can fail, and its exit code: 1 failed, 2 bad usage, 3 interrupted but resumable.

use std::process::ExitCode;

use elbo_store::DiskFault;
use elbo_worker::WorkerError;

use crate::print;

/// Bad usage: the command line or job file asks for something impossible.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub String);

/// Stopped on request with everything durable.
#[derive(Debug, thiserror::Error)]
#[error("interrupted: everything acknowledged is saved; run the same command again to resume")]
pub(crate) struct Interrupted;

/// Turns an error into bad usage.
pub(crate) fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    Usage(error.to_string()).into()
}

/// Prints the error and returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // A worker that took too long to stop does not hand over its work, but the job continues anyway.
    if error.is::<Interrupted>() || matches!(error.downcast_ref(), Some(WorkerError::Grace(_))) {
        print::note(error);
        return ExitCode::from(3);
    }
    print::note(format_args!("error: {}", chain(error)));
    // A full disk loses no data: the same command resumes once there is space.
    let is_resumable = error.chain().any(|cause| cause.is::<DiskFault>());
    ExitCode::from(if error.is::<Usage>() {
        2
    } else if is_resumable {
        3
    } else {
        1
    })
}

/// The error and its causes on one line, without causes that an outer message already contains.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
