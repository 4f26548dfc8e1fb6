//! `elbo report` and `elbo verify`, and the summary after a run: what is in an output.

use std::pin::pin;

use elbo_common::manifest::Manifest;
use elbo_common::output::Output;
use elbo_common::record::JobRecord;
use elbo_common::report::{Report, ReportBuilder};
use elbo_common::store::Store;
use elbo_common::text::printable_lines;
use elbo_common::verify;
use futures::TryStreamExt;
use indicatif::HumanCount;

use crate::args::OutputArgs;
use crate::recorded::open;
use crate::shift::Done;

/// `elbo report`.
pub(crate) async fn report(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let report = make_report(&store, &record).await?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", printable_lines(&report.to_string()));
    }
    Ok(())
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
    if spec.audit.is_some() {
        let mut rows = pin!(output.audited());
        while let Some(row) = rows.try_next().await? {
            report.add_audited(&row);
        }
    }
    Ok(report.finish(record.totals, record.timings, record.confidence.clone()))
}

/// `elbo verify`.
pub(crate) async fn verify(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let manifest = Manifest::open(&store, &record.manifest, record.identity.spec.shard_size).await?;
    let verification = verify::verify(&store, &manifest, record.fingerprint).await?;
    if args.json {
        println!("{}", serde_json::to_string(&verification)?);
    } else {
        print!("{verification}");
    }
    if verification.ok { Ok(()) } else { anyhow::bail!("{} is not complete and consistent", store.location()) }
}

/// What a run says at its end.
pub(crate) async fn summary(out: &str, done: Done) -> anyhow::Result<()> {
    let (store, record) = open(out).await?;
    let report = make_report(&store, &record).await?;
    print!("{}", printable_lines(&report.to_string()));
    match done {
        Done::Now(evaluations, time) => {
            let rate = evaluations as f64 / time.as_secs_f64().max(1e-9);
            println!(
                "{} evaluations in {:.1} s ({} evaluations/s)",
                HumanCount(evaluations),
                time.as_secs_f64(),
                HumanCount(rate as u64)
            );
        }
        Done::Before => println!("the job was done before: nothing was computed (--fresh starts over)"),
    }
    println!("predictions: {}/predictions/*.parquet", store.location().to_string().trim_end_matches('/'));
    Ok(())
}
