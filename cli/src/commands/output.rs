//! `elbo report` and `elbo verify`, and the summary after a run: what is in an output.

use std::collections::BTreeMap;

use elbo_common::ids::ShardId;
use elbo_common::layout;
use elbo_common::manifest::{Manifest, Sample};
use elbo_common::predictions::{Prediction, decode_predictions};
use elbo_common::record::JobRecord;
use elbo_common::report::Report;
use elbo_common::store::{Location, Store};
use elbo_common::verify;
use indicatif::HumanCount;

use crate::args::OutputArgs;
use crate::session::Done;

/// An output that holds a job.
async fn open(out: &str) -> anyhow::Result<(Store, JobRecord)> {
    let store = Store::open(&Location::parse(out)?)?;
    let record = JobRecord::read(&store)
        .await?
        .ok_or_else(|| anyhow::anyhow!("{} has no job.json: give the --out of a job", store.location()))?;
    Ok((store, record))
}

async fn predictions(store: &Store) -> anyhow::Result<Vec<Prediction>> {
    let mut rows = Vec::new();
    for path in store.list(layout::PREDICTIONS).await? {
        if let Some(bytes) = store.read(&path).await? {
            rows.extend(decode_predictions(bytes)?);
        }
    }
    Ok(rows)
}

/// Every sample of the manifest, with its prediction if there is one yet.
async fn caption_rows(store: &Store) -> anyhow::Result<Vec<(Sample, Option<Prediction>)>> {
    let bytes = store.read(&layout::manifest()).await?;
    let bytes = bytes.ok_or_else(|| anyhow::anyhow!("{} has no {}", store.location(), layout::MANIFEST))?;
    let manifest = Manifest::open(bytes)?;
    let mut rows = Vec::new();
    for shard in (0..manifest.shards()).map(ShardId) {
        let predictions = match store.read(&layout::predictions(shard)).await? {
            Some(bytes) => decode_predictions(bytes)?,
            None => Vec::new(),
        };
        let mut of_sample: BTreeMap<_, _> = predictions.into_iter().map(|row| (row.sample, row)).collect();
        rows.extend(manifest.shard(shard)?.into_iter().map(|sample| {
            let prediction = of_sample.remove(&sample.id);
            (sample, prediction)
        }));
    }
    Ok(rows)
}

/// `elbo report`.
pub(crate) async fn report(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let report = make_report(&store, &record).await?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

async fn make_report(store: &Store, record: &JobRecord) -> anyhow::Result<Report> {
    let recomputed = record.totals.map_or(0, |t| t.evaluations_recomputed);
    let spec = &record.identity.spec;
    if spec.candidates.is_some() {
        return Ok(Report::of_captions(caption_rows(store).await?, recomputed));
    }
    Ok(Report::new(predictions(store).await?, &spec.classes, spec.prompt_ensemble, recomputed))
}

/// `elbo verify`.
pub(crate) async fn verify(args: OutputArgs) -> anyhow::Result<()> {
    let (store, record) = open(&args.out).await?;
    let verification = verify::verify(&store, record.fingerprint).await?;
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
    print!("{report}");
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
