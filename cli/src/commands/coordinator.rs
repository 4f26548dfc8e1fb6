//! `elbo coordinator`: runs the same job as `elbo label`, with workers that connect over the network.

use std::time::Duration;

use anyhow::Context;
use elbo_coordinator::CoordinatorOptions;
use elbo_coordinator::scheduler::LeasePolicy;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::args::CoordinatorArgs;
use crate::commands::output;
use crate::failure::usage;
use crate::job_runner::{self, JobRunner};
use crate::{print, session, stop};

/// Coordinates a job until it is done or stopped.
pub(crate) async fn run(args: CoordinatorArgs) -> anyhow::Result<()> {
    let flags = args.job.resolve()?;
    let out = args.out.or(flags.out.clone()).ok_or_else(|| usage("--out is missing: say where the results go"))?;
    let (token, tls) = (args.gate.token()?, args.gate.tls()?);
    if token.is_none() && !args.listen.ip().is_loopback() && !args.insecure {
        return Err(usage(format!(
            "listening on {} lets anyone who can reach it take part: give --token-file (or ELBO_TOKEN), or --insecure to accept that",
            args.listen
        )));
    }
    if token.is_some() && tls.is_none() && !args.listen.ip().is_loopback() {
        tracing::warn!(
            listen = %args.listen,
            "workers send the token to this address unencrypted, so anyone on the network path can steal it; give \
             --tls-cert and --tls-key"
        );
    }
    let time_to_live = Duration::try_from_secs_f64(args.lease_seconds)
        .ok()
        .filter(|d| *d >= Duration::from_millis(500))
        .ok_or_else(|| usage("--lease-seconds must be at least 0.5"))?;
    let limits = session::allow_connections();
    let operator = session::operate(args.http).await?;
    let job = session::identify(&flags).await?;
    let stop = stop::on_signal()?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("listening on {}: choose another address with --listen", args.listen))?;
    let run = args.run.over(&flags);
    let plan = job_runner::make_plan(job, flags.pilot_images(), &out, &run, &stop).await?;
    let job = job_runner::open(&plan, &out, &run, &stop).await?;
    let pilot_run = plan.pilot_run();
    if job.is_done() && pilot_run.is_none() {
        let done = job_runner::already_done(job).await?;
        return output::summary(&out, done).await;
    }
    let scheme = if tls.is_some() { "https" } else { "http" };
    print::note(format_args!("coordinating {} images on {scheme}://{}", job.manifest.len(), listener.local_addr()?));
    let leases = LeasePolicy { time_to_live, ..LeasePolicy::default() };
    let options = CoordinatorOptions { leases, max_bad: run.max_bad(), token, tls, limits };
    let job_runner = JobRunner { options, run: &run, operator: &operator };
    let done = job_runner.coordinate(job, pilot_run, listener, stop, JoinSet::new()).await?;
    output::summary(&out, done).await
}
