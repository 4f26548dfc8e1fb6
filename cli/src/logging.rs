//! Logging to stderr. The default level is info for long-running processes, and warnings otherwise.

use std::io::IsTerminal;

use clap::ValueEnum;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use crate::failure::usage;
use crate::otlp;

/// Log format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One readable line per event
    #[default]
    Text,
    /// One JSON object per line
    Json,
}

/// The traces to send before the process ends.
#[derive(Debug)]
pub(crate) struct Logs(Option<SdkTracerProvider>);

impl Logs {
    /// Sends the remaining traces.
    pub(crate) fn finish(&self) {
        self.0.iter().for_each(otlp::finish);
    }
}

/// Starts logging, and tracing if requested. `ELBO_LOG` (like `RUST_LOG`) overrides what is logged.
pub(crate) fn start(service: bool, format: LogFormat, runtime: &Handle) -> anyhow::Result<Logs> {
    // The ledger's database logs much about its housekeeping, so only its warnings are logged, and its retries on a failing
    // store. What stops the AWS library is in the store's own errors.
    let default = if service { "info,slatedb=warn,aws_config=off" } else { "warn,slatedb=error,aws_config=off" };
    let filter = match std::env::var("ELBO_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::try_new(&wanted).map_err(|e| {
            usage(format!(
                "ELBO_LOG={wanted} is not a valid filter ({e}): give a level, or like \
                 info,elbo::audit=debug"
            ))
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
