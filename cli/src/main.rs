//! `elbo`: labels image corpora with a diffusion model.

// println! and eprintln! panic when the reader has gone; `print` does not.
#![warn(clippy::print_stdout, clippy::print_stderr)]
#![allow(rustdoc::broken_intra_doc_links, reason = "comments on flags are help texts, where brackets are not links")]

mod access;
mod args;
mod commands;
mod failure;
mod job_args;
mod job_runner;
mod logging;
mod otlp;
mod pilot;
mod print;
mod progress;
mod recorded;
mod session;
mod stop;

use std::process::ExitCode;

use clap::Parser;

/// Batches allocate and free megabytes of activations, which the C library's allocator keeps returning to the system. On
/// large batches, a third of the measured time went to page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(told) => {
            let code = u8::try_from(told.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from);
            return print::help(&told).map_or_else(|error| failure::report(&error), |()| code);
        }
    };
    elbo_store::tls::use_ring();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            print::note(format_args!("error: starting the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let logs = match logging::start(cli.command.is_service(), cli.log, runtime.handle()) {
        Ok(logs) => logs,
        Err(error) => return failure::report(&error),
    };
    let ended = runtime.block_on(commands::run(cli.command));
    logs.finish();
    // Background tasks hold no data that isn't durable.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
