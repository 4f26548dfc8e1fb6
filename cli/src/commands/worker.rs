//! `elbo worker`: computes for a coordinator until its job is done.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use elbo_worker::http::WorkerOperations;

use crate::args::WorkerArgs;
use crate::{session, stop};

/// Works for a coordinator.
pub(crate) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let threads = session::threads(&args.device, NonZeroUsize::MIN)?;
    let host = session::host();
    let (token, tls) = (args.caller.token()?, args.caller.tls(&args.coordinator)?);
    let operator = session::operate(args.http).await?;
    operator.started(Arc::new(WorkerOperations {
        coordinator: args.coordinator.clone(),
        device: args.device.device.clone().unwrap_or_else(|| "cpu".into()),
    }));
    let options = elbo_worker::Options {
        coordinator: args.coordinator,
        token,
        tls,
        name: format!("{host}-{}", uuid::Uuid::new_v4()),
        host,
        threads,
        batch: args.device.batch,
        patience: Duration::from_secs(args.patience),
        model: args.model,
        problem: None,
        stay: true,
    };
    Ok(elbo_worker::run(options, stop::on_signal()?).await?)
}
