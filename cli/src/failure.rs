//! How a command can fail, and its exit code: 1 failed, 2 bad usage, 3 interrupted but resumable.

use std::process::ExitCode;

use elbo_core::causes::with_causes;
use elbo_core::policy::PolicyError;
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

/// Bad usage, with the flags for these settings in front.
pub(crate) fn bad_setting(settings: &[&str], error: impl std::fmt::Display) -> anyhow::Error {
    let flags: Vec<_> = settings.iter().map(|setting| format!("--{setting}")).collect();
    usage(if flags.is_empty() { error.to_string() } else { format!("{}: {error}", flags.join(" and ")) })
}

/// An impossible policy as bad usage, with the flags at fault.
pub(crate) fn bad_policy(error: PolicyError) -> anyhow::Error {
    bad_setting(error.settings(), &error)
}

/// Prints the error and returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    // A worker that took too long to stop does not hand over its work, but the job continues anyway.
    if error.is::<Interrupted>() || matches!(error.downcast_ref(), Some(WorkerError::Grace(_))) {
        print::note(error);
        return ExitCode::from(3);
    }
    print::note(format_args!("error: {}", with_causes(error.as_ref())));
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
