//! Logs go to stderr: what operators of long-running processes want by default, only warnings elsewhere.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging; `ELBO_LOG` (like `RUST_LOG`) and `ELBO_LOG_FORMAT=json` override the defaults.
pub(crate) fn start(service: bool) {
    // The ledger's database is chatty about its own housekeeping; that it waits for a failing store should be known.
    let default = if service { "info,slatedb=warn" } else { "warn,slatedb=error" };
    let default = format!("{default},slatedb::retrying_object_store=info");
    let filter = EnvFilter::try_from_env("ELBO_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr);
    if std::env::var("ELBO_LOG_FORMAT").is_ok_and(|f| f == "json") {
        builder.json().init();
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
