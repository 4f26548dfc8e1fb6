//! `elbo status`: a job's progress, from its coordinator or its output.

use std::fmt::Write;
use std::pin::pin;
use std::time::Duration;

use elbo_coordinator::status::{JobStatus, Shards};
use elbo_output::Output;
use elbo_output::record::{JobRecord, JobState};
use elbo_store::{Location, Store};
use elbo_worker::client::Client;
use elbo_worker::{CallError, ClientError};
use futures::TryStreamExt;
use indicatif::{HumanCount, HumanDuration};

use crate::args::StatusArgs;
use crate::print;

/// Shows a job's status.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let url = args.target.starts_with("http://") || args.target.starts_with("https://");
    let status = if url { of_coordinator(&args).await? } else { of_output(&args.target).await? };
    if args.json { print::json(&status) } else { print::text(text(&status)?) }
}

async fn of_coordinator(args: &StatusArgs) -> anyhow::Result<JobStatus> {
    let (token, tls) = (args.caller.token()?, args.caller.tls(&args.target)?);
    let client = Client::new(&args.target, token.as_deref(), tls.as_ref(), "status".into(), Duration::ZERO)?;
    match client.status().await {
        Ok(reply) => Ok(reply.into()),
        Err(CallError::Fatal(ClientError::Unreachable { address, reason, .. })) => Err(anyhow::anyhow!(
            "no coordinator answers at {address} ({reason}): check the address, or give the job's output instead"
        )),
        Err(CallError::Fatal(error)) => Err(error.into()),
        Err(CallError::Rejected(reason)) => Err(anyhow::anyhow!("{reason}")),
        Err(CallError::Rejoin | CallError::OtherJob) => {
            Err(anyhow::anyhow!("{} is not a coordinator of this version: run the same elbo everywhere", args.target))
        }
    }
}

/// The status from an output alone: its committed shards. Does not open the ledger, since that would fence a running
/// coordinator.
async fn of_output(target: &str) -> anyhow::Result<JobStatus> {
    let out = Store::open(&Location::parse(target)?)?;
    let record = JobRecord::read(&out).await?.ok_or_else(|| {
        anyhow::anyhow!("{target} has no job.json: give a job's output or a coordinator's http:// URL")
    })?;
    let shards = record.manifest.samples.div_ceil(u64::from(record.identity.spec.shard_size));
    let output = Output::new(&out);
    let done = output.shards().await?;
    let (mut samples, mut quarantined, mut evaluations) = (0, 0, 0);
    let mut rows = pin!(output.tallies());
    while let Some(row) = rows.try_next().await? {
        samples += 1;
        quarantined += u64::from(row.quarantined);
        evaluations += u64::from(row.evaluations);
    }
    let finished = record.state == JobState::Done;
    Ok(JobStatus {
        state: if finished { "done" } else { "unfinished" }.into(),
        shards: Shards { done, active: 0, pending: shards.saturating_sub(done) },
        samples_done: samples,
        samples: record.manifest.samples,
        samples_quarantined: quarantined,
        evaluations,
        evaluations_per_second: 0.0,
        eta_seconds: finished.then_some(0.0),
        stalled: None,
        workers: Vec::new(),
    })
}

fn text(status: &JobStatus) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(text, "state        {}", status.state)?;
    if let Some(stalled) = &status.stalled {
        writeln!(text, "stalled      {stalled}")?;
    }
    writeln!(text, "images       {} of {}", HumanCount(status.samples_done), HumanCount(status.samples))?;
    writeln!(text, "quarantined  {}", HumanCount(status.samples_quarantined))?;
    let Shards { done, active, pending } = status.shards;
    writeln!(text, "shards       {done} done, {active} active, {pending} pending")?;
    writeln!(text, "evaluations  {}", HumanCount(status.evaluations))?;
    if status.evaluations_per_second > 0.0 {
        writeln!(text, "rate         {} evaluations/s", HumanCount(status.evaluations_per_second as u64))?;
    }
    if let Some(eta) = status.eta_seconds.filter(|s| *s > 0.0) {
        writeln!(text, "time left    {}", HumanDuration(Duration::from_secs_f64(eta)))?;
    }
    for worker in &status.workers {
        writeln!(
            text,
            "worker       {} on {} ({}): {}{} leases, {} evaluations",
            worker.worker,
            worker.host,
            worker.device,
            worker.activity.map(|activity| format!("{activity}, ")).unwrap_or_default(),
            worker.leases,
            HumanCount(worker.evaluations)
        )?;
    }
    Ok(text)
}
