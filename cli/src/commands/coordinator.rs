//! `elbo coordinator`: the same job as `elbo label`, for workers that connect.

use std::time::Duration;

use anyhow::Context;
use elbo_coordinator::Options;
use elbo_coordinator::brain::LeasePolicy;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::args::CoordinatorArgs;
use crate::commands::output;
use crate::failure::usage;
use crate::shift::{self, Shift};
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
            "workers send the token to this address unencrypted: whoever can listen on the way can use it; give --tls-cert and --tls-key"
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
    let plan = shift::make_plan(job, flags.pilot_images(), &out, &run, &stop).await?;
    let job = shift::open(&plan, &out, &run, &stop).await?;
    let expedition = plan.expedition();
    if job.is_done() && expedition.is_none() {
        let done = shift::already_done(job).await?;
        return output::summary(&out, done).await;
    }
    let scheme = if tls.is_some() { "https" } else { "http" };
    print::note(format_args!("coordinating {} images on {scheme}://{}", job.manifest.len(), listener.local_addr()?));
    let leases = LeasePolicy { time_to_live, ..LeasePolicy::default() };
    let options = Options { leases, max_bad: run.max_bad(), token, tls, limits };
    let shift = Shift { options, run: &run, operator: &operator };
    let done = shift.coordinate(job, expedition, listener, stop, JoinSet::new()).await?;
    output::summary(&out, done).await
}
