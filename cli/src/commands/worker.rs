//! `elbo worker`: computes for a coordinator until its job is done.

use std::sync::Arc;
use std::time::Duration;

use elbo_worker::http::WorkerOperations;

use crate::args::WorkerArgs;
use crate::failure::usage;
use crate::{session, stop};

/// Works for a coordinator.
pub(crate) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let devices = session::devices(&args.device)?;
    let grace = Duration::try_from_secs_f64(args.grace).map_err(|_| usage("--grace must be a number of seconds"))?;
    let host = session::host();
    let (token, tls) = (args.caller.token()?, args.caller.tls(&args.coordinator)?);
    let operator = session::operate(args.http).await?;
    operator.started(Arc::new(WorkerOperations {
        coordinator: args.coordinator.clone(),
        device: args.device.device.clone().unwrap_or_else(|| "cpu".into()),
    }));
    let options = elbo_worker::WorkerOptions {
        coordinator: args.coordinator,
        token,
        tls,
        name: format!("{host}-{}", uuid::Uuid::new_v4()),
        host,
        engines: devices.engines(devices.count()),
        threads: session::threads(&args.device, devices.count()),
        batch: args.device.batch,
        decode_memory: args.device.decode_bytes(),
        patience: Duration::from_secs(args.patience),
        grace,
        model: args.model,
        loaded: None,
        stay: true,
    };
    Ok(elbo_worker::run(options, stop::on_signal()?).await?)
}
