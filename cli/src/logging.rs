//! Logs go to stderr: what operators of long-running processes want by default, only warnings elsewhere.

use std::io::IsTerminal;

use clap::ValueEnum;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::failure::usage;
use crate::otlp;

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// A line for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// What is to be sent before the process ends.
#[derive(Debug)]
pub(crate) struct Logs(Option<SdkTracerProvider>);

impl Logs {
    /// Sends traces that are not sent yet.
    pub(crate) fn finish(&self) {
        self.0.iter().for_each(otlp::finish);
    }
}

/// Starts logging, and tracing where it is asked for; `ELBO_LOG` (like `RUST_LOG`) overrides what is logged.
pub(crate) fn start(service: bool, format: LogFormat, runtime: &Handle) -> anyhow::Result<Logs> {
    // The ledger's database is chatty about its own housekeeping; that it waits for a failing store should be known.
    let default = if service { "info,slatedb=warn" } else { "warn,slatedb=error" };
    let filter = match std::env::var("ELBO_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::try_new(&wanted).map_err(|e| {
            usage(format!("ELBO_LOG={wanted} is no filter ({e}): give a level, or like info,elbo::audit=debug"))
        })?,
        _ => EnvFilter::new(format!("{default},slatedb::retrying_object_store=info")),
    };
    let lines = fmt::layer::<Registry>().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
        LogFormat::Text => {
            lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed()
        }
    };
    let provider = otlp::exporter(runtime)?;
    tracing_subscriber::registry().with(lines).with(provider.as_ref().map(otlp::layer)).init();
    Ok(Logs(provider))
}
