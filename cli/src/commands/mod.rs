//! The commands, one file each.

mod bench;
mod coordinator;
mod demo;
mod export;
mod inspect;
mod label;
mod output;
mod plan;
mod status;
mod worker;

use crate::args::Command;

/// Runs a command.
pub(crate) async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(args) => demo::run(args).await,
        Command::Label(args) => label::run(*args).await,
        Command::Coordinator(args) => coordinator::run(*args).await,
        Command::Worker(args) => worker::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Report(args) => output::report(args).await,
        Command::Verify(args) => output::verify(args).await,
        Command::Export(args) => export::run(args).await,
        Command::Plan(args) => plan::run(*args).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Bench(args) => bench::run(args).await,
    }
}
