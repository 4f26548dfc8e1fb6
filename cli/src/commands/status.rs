//! `elbo status`: how far a job is, asked of its coordinator or read from its output.

use std::pin::pin;

use elbo_common::output::Output;
use elbo_common::record::{JobRecord, JobState};
use elbo_common::store::{Location, Store};
use elbo_proto::v1;
use futures::TryStreamExt;
use indicatif::{HumanCount, HumanDuration};
use serde::Serialize;
use tonic::Request;

use crate::args::StatusArgs;
use crate::session;

#[derive(Debug, Serialize)]
struct Status {
    state: String,
    shards: Shards,
    samples_done: u64,
    samples: u64,
    samples_quarantined: u64,
    evaluations: u64,
    evaluations_per_second: f64,
    eta_seconds: Option<f64>,
    workers: Vec<Worker>,
}

#[derive(Debug, Serialize)]
struct Shards {
    done: u64,
    active: u64,
    pending: u64,
}

#[derive(Debug, Serialize)]
struct Worker {
    worker: String,
    host: String,
    device: String,
    leases: u32,
    evaluations: u64,
    evaluations_per_second: f64,
}

/// Shows a job's status.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let url = args.target.starts_with("http://") || args.target.starts_with("https://");
    let status = if url { of_coordinator(&args).await? } else { of_output(&args.target).await? };
    if args.json {
        println!("{}", serde_json::to_string(&status)?);
    } else {
        print(&status);
    }
    Ok(())
}

async fn of_coordinator(args: &StatusArgs) -> anyhow::Result<Status> {
    let unreachable = |e: &dyn std::fmt::Display| {
        anyhow::anyhow!(
            "no coordinator answers at {} ({e}): check the address, or give the job's output instead",
            args.target
        )
    };
    let mut client =
        v1::coordinator_client::CoordinatorClient::connect(args.target.clone()).await.map_err(|e| unreachable(&e))?;
    let mut request = Request::new(v1::StatusRequest {});
    if let Some(token) = session::read_token(&args.token)? {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
    }
    let reply = client.status(request).await.map_err(|e| match e.code() {
        tonic::Code::Unauthenticated => anyhow::anyhow!("{}", e.message()),
        _ => unreachable(&e.message()),
    })?;
    let reply = reply.into_inner();
    Ok(Status {
        state: reply.state,
        shards: Shards { done: reply.shards_done, active: reply.shards_active, pending: reply.shards_pending },
        samples_done: reply.samples_done,
        samples: reply.samples,
        samples_quarantined: reply.samples_quarantined,
        evaluations: reply.evaluations,
        evaluations_per_second: reply.evaluations_per_second,
        eta_seconds: reply.eta_seconds,
        workers: reply
            .workers
            .into_iter()
            .map(|w| Worker {
                worker: w.worker,
                host: w.host,
                device: w.device,
                leases: w.leases,
                evaluations: w.evaluations,
                evaluations_per_second: w.evaluations_per_second,
            })
            .collect(),
    })
}

/// What an output shows by itself: committed shards. The ledger is left alone, since opening it would fence a running
/// coordinator.
async fn of_output(target: &str) -> anyhow::Result<Status> {
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
    Ok(Status {
        state: if finished { "done" } else { "unfinished" }.into(),
        shards: Shards { done, active: 0, pending: shards.saturating_sub(done) },
        samples_done: samples,
        samples: record.manifest.samples,
        samples_quarantined: quarantined,
        evaluations,
        evaluations_per_second: 0.0,
        eta_seconds: finished.then_some(0.0),
        workers: Vec::new(),
    })
}

fn print(status: &Status) {
    println!("state        {}", status.state);
    println!("images       {} of {}", HumanCount(status.samples_done), HumanCount(status.samples));
    println!("quarantined  {}", HumanCount(status.samples_quarantined));
    let Shards { done, active, pending } = status.shards;
    println!("shards       {done} done, {active} active, {pending} pending");
    println!("evaluations  {}", HumanCount(status.evaluations));
    if status.evaluations_per_second > 0.0 {
        println!("rate         {} evaluations/s", HumanCount(status.evaluations_per_second as u64));
    }
    if let Some(eta) = status.eta_seconds.filter(|s| *s > 0.0) {
        println!("time left    {}", HumanDuration(std::time::Duration::from_secs_f64(eta)));
    }
    for worker in &status.workers {
        println!(
            "worker       {} on {} ({}): {} leases, {} evaluations",
            worker.worker,
            worker.host,
            worker.device,
            worker.leases,
            HumanCount(worker.evaluations)
        );
    }
}
