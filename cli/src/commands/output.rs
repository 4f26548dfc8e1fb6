//! `elbo report` and `elbo verify`, and the summary after a run.

use std::collections::BTreeMap;
use std::pin::pin;

use elbo_coordinator::ledger;
use elbo_core::failure::SampleFailure;
use elbo_core::ids::ShardId;
use elbo_data::manifest::Manifest;
use elbo_output::Output;
use elbo_output::layout;
use elbo_output::record::{JobRecord, JobState};
use elbo_output::report::{Report, ReportBuilder};
use elbo_output::verify::{self, Expected};
use elbo_store::Store;
use futures::TryStreamExt;
use indicatif::HumanCount;

use crate::args::OutputArgs;
use crate::job_runner::Done;
use crate::print;
use crate::recorded::open;

/// `elbo report`.
pub(crate) async fn report(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let report = make_report(&store, &record).await?;
    if args.json { print::json(&report) } else { print::text(&report) }
}

async fn make_report(store: &Store, record: &JobRecord) -> anyhow::Result<Report> {
    let spec = &record.identity.spec;
    let output = Output::new(store);
    let mut report = ReportBuilder::new(&spec.classes, spec.prompt_ensemble, spec.top_k);
    if spec.candidates.is_some() {
        let manifest = Manifest::open(store, &record.manifest, spec.shard_size).await?;
        let mut rows = pin!(output.samples_and_predictions(manifest));
        while let Some((sample, prediction)) = rows.try_next().await? {
            report.add_captioned(&sample, prediction.as_ref());
        }
    } else {
        let mut rows = pin!(output.judgements());
        while let Some(row) = rows.try_next().await? {
            report.add(&row);
        }
    }
    if record.state != JobState::Done {
        add_unwritten(&mut report, store, record).await?;
    }
    if spec.audit.is_some() {
        let mut rows = pin!(output.audited());
        while let Some(row) = rows.try_next().await? {
            report.add_audited(&row);
        }
    }
    let report = report.finish(record.totals, record.timings, record.confidence.clone());
    Ok(Report { passed_over: record.manifest.passed_over.clone(), ..report })
}

/// Adds the quarantined samples of unfinished shards, which only the ledger has. If the ledger is in use and can't be read,
/// the report leaves them out.
async fn add_unwritten(report: &mut ReportBuilder, store: &Store, record: &JobRecord) -> anyhow::Result<()> {
    let failures = match ledger::given_up(store).await {
        Ok(failures) => failures,
        Err(error) => {
            print::note(format_args!("quarantined images of unfinished shards are left out: {error}"));
            return Ok(());
        }
    };
    let shard_size = record.identity.spec.shard_size;
    let mut by_shard: BTreeMap<ShardId, Vec<SampleFailure>> = BTreeMap::new();
    for failure in failures {
        by_shard.entry(failure.sample.shard(shard_size)).or_default().push(failure);
    }
    if by_shard.is_empty() {
        return Ok(());
    }
    let manifest = Manifest::open(store, &record.manifest, shard_size).await?;
    let written = store.list(layout::PREDICTIONS).await?;
    // Samples that are being retried still have the rows of their last attempt.
    for (shard, failures) in by_shard.into_iter().filter(|(shard, _)| !written.contains(&layout::predictions(*shard))) {
        let samples = manifest.shard(shard).await?;
        for failure in failures {
            if let Ok(at) = samples.binary_search_by_key(&failure.sample, |sample| sample.id) {
                report.add_unwritten(&samples[at].key, &failure.to_string());
            }
        }
    }
    Ok(())
}

/// `elbo verify`.
pub(crate) async fn verify(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let manifest = Manifest::open(&store, &record.manifest, record.identity.spec.shard_size).await?;
    let marks = match ledger::marks(&store).await {
        Ok(marks) => marks,
        Err(error) => {
            tracing::warn!("files are checked without the ledger's checksums: {error}");
            None
        }
    };
    let verification = verify::verify(&store, &manifest, &Expected::of(&record, marks)).await?;
    let printed = if args.json { print::json(&verification) } else { print::text(&verification) };
    printed?;
    if verification.ok { Ok(()) } else { anyhow::bail!("{} is not complete and consistent", store.location()) }
}

/// Prints the summary at the end of a run.
pub(crate) async fn summary(out: &str, done: Done) -> anyhow::Result<()> {
    let (store, record) = open(out).await?;
    let report = make_report(&store, &record).await?;
    print::text(&report)?;
    match done {
        Done::Now(evaluations, time) => {
            let rate = evaluations as f64 / time.as_secs_f64().max(1e-9);
            print::line(format_args!(
                "{} evaluations in {:.1} s ({} evaluations/s)",
                HumanCount(evaluations),
                time.as_secs_f64(),
                HumanCount(rate as u64)
            ))?;
        }
        Done::Before => print::line("the job was already done: nothing was computed (--fresh starts over)")?,
    }
    print::line(format_args!(
        "predictions: {}/predictions/*.parquet",
        store.location().to_string().trim_end_matches('/')
    ))
}
