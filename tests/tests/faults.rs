//! Storage that fails now and then changes no byte of a result: a store that wraps a store, below the real coordinator, ledger
//! and worker in this process.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use elbo_common::fingerprint::JobIdentity;
use elbo_common::layout;
use elbo_common::model_source::JobModels;
use elbo_common::record::JobRecord;
use elbo_common::store::{Location, Store};
use elbo_coordinator::brain::LeasePolicy;
use elbo_coordinator::{Coordinator, Job, JobOptions, MaxBad, Options, Outcome};
use elbo_net::Limits;
use elbo_tests::faults::FaultyStore;
use elbo_tests::{PATIENCE, elbo, job_flags, model, results, run_ok, some_images, with};
use elbo_worker::engine::Problem;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

type Files = Vec<(String, Vec<u8>)>;

/// A small job, what an undisturbed run of it gives, and its model in memory.
struct Case {
    _images: TempDir,
    identity: JobIdentity,
    expected: Files,
    problem: Arc<Problem>,
}

impl Case {
    fn new() -> Self {
        let (images, outs) = (some_images(1), TempDir::new().unwrap());
        let out = outs.path().join("out");
        let mut command = elbo();
        let smaller = [("--keep", "2,1"), ("--samples", "2,3"), ("--shard-size", "3")];
        command.arg("label").args(with(job_flags(images.path(), &out), &smaller)).arg("--write-errors");
        run_ok(&mut command);
        let store = Store::open(&Location::Local(out.clone())).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let identity = runtime.block_on(JobRecord::read(&store)).unwrap().unwrap().identity;
        let models = JobModels { model: model(), shortlist: None };
        let problem = Arc::new(Problem::load(&identity, &models, elbo_worker::Device::Cpu).unwrap());
        Self { _images: images, identity, expected: results(&out), problem }
    }

    /// Runs the job once, with one worker; `None` where it was cut short after `life`, as by `kill -9`.
    async fn run(&self, store: Arc<dyn ObjectStore>, life: Duration) -> Option<Result<Outcome, String>> {
        tokio::time::timeout(life, self.run_to_end(store)).await.ok()
    }

    async fn run_to_end(&self, store: Arc<dyn ObjectStore>) -> Result<Outcome, String> {
        let out = Store::from_parts(store, Location::parse("s3://bucket/out").unwrap());
        let job = Job::open(self.identity.clone(), Path::new(&model()), out, JobOptions::default()).await;
        let job = job.map_err(|e| e.to_string())?;
        if job.is_done() {
            job.close().await.map_err(|e| e.to_string())?;
            return Ok(Outcome::Interrupted);
        }
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let coordinator = format!("http://{}", listener.local_addr().unwrap());
        let options = Options {
            leases: LeasePolicy::default(),
            max_bad: MaxBad::Percent(0.0),
            token: None,
            tls: None,
            limits: Limits::default(),
        };
        let stop = CancellationToken::new();
        let _stopped_when_dropped = stop.clone().drop_guard();
        let running = Coordinator::new(job, options, stop.clone()).map_err(|e| e.to_string())?;
        let worker = elbo_worker::Options {
            decode_memory: 1 << 30,
            coordinator,
            token: None,
            tls: None,
            name: "worker".into(),
            host: "here".into(),
            engines: elbo_worker::Devices::default().engines(1),
            threads: NonZeroUsize::MIN,
            batch: NonZeroUsize::new(16),
            patience: Duration::from_secs(60),
            grace: Duration::from_secs(10),
            model: None,
            problem: Some((elbo_worker::Device::Cpu, Arc::clone(&self.problem))),
            stay: false,
        };
        let worker = tokio::spawn(elbo_worker::run(worker, stop));
        let ended = running.run(listener).await.map_err(|e| e.to_string());
        worker.abort();
        ended
    }
}

/// What is in a store, as [`results`] gives it of a directory.
async fn found(store: &Arc<dyn ObjectStore>) -> Files {
    let out = Store::from_parts(Arc::clone(store), Location::parse("s3://bucket/out").unwrap());
    let mut files = Files::new();
    for part in [layout::PREDICTIONS, layout::ERRORS, layout::QUARANTINE] {
        for path in out.list(part).await.unwrap() {
            files.push((path.to_string(), out.read(&path).await.unwrap().unwrap().to_vec()));
        }
    }
    files
}

async fn record(store: &Arc<dyn ObjectStore>) -> JobRecord {
    let out = Store::from_parts(Arc::clone(store), Location::parse("s3://bucket/out").unwrap());
    JobRecord::read(&out).await.unwrap().unwrap()
}

/// Runs the job over a failing store, with kills, until it is done; the operations and the faults.
async fn disturbed(case: &Case, seed: u64) -> (u64, u64) {
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&memory), seed, 8));
    let mut errors = Vec::new();
    for start in 0.. {
        assert!(start < 20, "seed {seed}: it is never done: {errors:?}");
        // The first runs are cut short at some moment; the later ones may take as long as they need.
        let life = if start < 2 { Duration::from_millis(300 + 170 * ((seed + start) % 9)) } else { PATIENCE };
        match case.run(Arc::clone(&faulty) as _, life).await {
            Some(Ok(_)) => break,
            Some(Err(error)) => errors.push(error),
            None => {}
        }
    }
    assert!(found(&memory).await == case.expected, "seed {seed}: other results than without faults");
    let totals = record(&memory).await.totals.unwrap();
    assert_eq!(totals.evaluations_recomputed, 0, "seed {seed}: what was acknowledged is not computed again");
    let clear = |error: &String| error.contains("run the same command again");
    assert!(errors.len() <= 3 && errors.iter().all(clear), "seed {seed}: {errors:?}");
    faulty.counts()
}

#[test]
fn failing_storage_and_kills_change_no_byte() {
    let case = Arc::new(Case::new());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut operations, mut faults) = (0, 0);
    for seeds in [0..12u64, 12..24] {
        let runs = seeds.map(|seed| {
            let case = Arc::clone(&case);
            runtime.spawn(async move { disturbed(&case, seed).await })
        });
        for run in runs.collect::<Vec<_>>() {
            let (o, f) = runtime.block_on(run).unwrap();
            (operations, faults) = (operations + o, faults + f);
        }
    }
    println!("{operations} operations, {faults} of them spoilt");
    assert!(operations > 2_000 && faults > 100, "{operations} operations, {faults} faults");
}

/// A false conflict can't be told from another coordinator's write, so the coordinator must stop; but nothing is lost.
#[test]
fn a_false_conflict_stops_the_coordinator_with_a_clear_error_and_the_job_resumes() {
    let case = Case::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let conflicting = Arc::new(FaultyStore::new(Arc::clone(&memory), 0, 0).with_conflicts("/wal/", 6));
        let mut stopped = 0;
        for start in 0.. {
            assert!(start < 50, "it is never done");
            match case.run(Arc::clone(&conflicting) as _, PATIENCE).await.unwrap() {
                Ok(_) => break,
                Err(error) => {
                    assert!(error.contains("another coordinator has taken over"), "{error}");
                    stopped += 1;
                }
            }
        }
        assert!(stopped > 0, "no conflict was met");
        assert!(found(&memory).await == case.expected);
        assert_eq!(record(&memory).await.totals.unwrap().evaluations_recomputed, 0);
    });
}
