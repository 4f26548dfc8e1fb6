//! Logs go to stderr: what operators of long-running processes want by default, only warnings elsewhere.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::failure::usage;

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// A line for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// Starts logging; `ELBO_LOG` (like `RUST_LOG`) overrides what is logged.
pub(crate) fn start(service: bool, format: LogFormat) -> anyhow::Result<()> {
    // The ledger's database is chatty about its own housekeeping; that it waits for a failing store should be known.
    let default = if service { "info,slatedb=warn" } else { "warn,slatedb=error" };
    let filter = match std::env::var("ELBO_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::try_new(&wanted).map_err(|e| {
            usage(format!("ELBO_LOG={wanted} is no filter ({e}): give a level, or like info,elbo::audit=debug"))
        })?,
        _ => EnvFilter::new(format!("{default},slatedb::retrying_object_store=info")),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).init(),
    }
    Ok(())
}
