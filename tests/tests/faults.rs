//! Occasional storage failures change no byte of a result: a failing wrapper around a store, below the real coordinator, ledger
//! and worker in this process. If a worker can no longer read its storage, no image is blamed: real processes, some without the
//! mount or with expiring credentials.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use elbo_coordinator::scheduler::LeasePolicy;
use elbo_coordinator::{Coordinator, CoordinatorOptions, Job, JobOptions, MaxBad, RunOutcome, Server, Then};
use elbo_core::prediction::Prediction;
use elbo_hub::fingerprint::JobIdentity;
use elbo_hub::model_source::JobModels;
use elbo_net::Limits;
use elbo_output::layout;
use elbo_output::record::JobRecord;
use elbo_store::{Location, Store};
use elbo_tests::faults::FaultyStore;
use elbo_tests::patience::{patience, wait_until};
use elbo_tests::proxy::Proxy;
use elbo_tests::servers::{Bucket, S3sFs, SECRET, s3_variables, with_variables};
use elbo_tests::{
    Process, coordinator_flags, copy_tree, elbo, free_address, job_flags, json, model, predictions, results, run,
    run_ok, some_images, sorted, stderr, with,
};
use elbo_worker::loaded_job::LoadedJob;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

type Files = Vec<(String, Vec<u8>)>;

/// A small job, the results of an undisturbed run, and its model in memory.
struct Case {
    _images: TempDir,
    identity: JobIdentity,
    expected: Files,
    loaded: Arc<LoadedJob>,
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
        let loaded = Arc::new(LoadedJob::load(&identity, &models, elbo_worker::Device::Cpu).unwrap());
        Self { _images: images, identity, expected: results(&out), loaded }
    }

    /// Runs the job once with one worker; `None` if it was cut short after `life`, as by `kill -9`.
    async fn run(&self, store: Arc<dyn ObjectStore>, life: Duration) -> Option<Result<RunOutcome, String>> {
        tokio::time::timeout(life, self.run_to_end(store)).await.ok()
    }

    async fn run_to_end(&self, store: Arc<dyn ObjectStore>) -> Result<RunOutcome, String> {
        let out = Store::from_parts(store, Location::parse("s3://bucket/out").unwrap());
        let job = Job::open(self.identity.clone(), Path::new(&model()), out, JobOptions::default()).await;
        let job = job.map_err(|e| e.to_string())?;
        if job.is_done() {
            job.close().await.map_err(|e| e.to_string())?;
            return Ok(RunOutcome::Interrupted);
        }
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let coordinator = format!("http://{}", listener.local_addr().unwrap());
        let options = CoordinatorOptions {
            leases: LeasePolicy::default(),
            max_bad: MaxBad::Percent(0.0),
            token: None,
            tls: None,
            limits: Limits::default(),
        };
        let stop = CancellationToken::new();
        let _stopped_when_dropped = stop.clone().drop_guard();
        let running = Coordinator::new(job, &options, stop.clone()).map_err(|e| e.to_string())?;
        let worker = elbo_worker::WorkerOptions {
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
            loaded: Some((elbo_worker::Device::Cpu, Arc::clone(&self.loaded))),
            stay: false,
        };
        let worker = tokio::spawn(elbo_worker::run(worker, stop));
        let mut server = Server::new(listener, options);
        let ended = running.run(&mut server, Then::End).await.map_err(|e| e.to_string());
        worker.abort();
        ended
    }
}

/// The content of a store, as [`results`] returns it for a directory.
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

/// Runs the job over a failing store, with kills, until it is done; returns the number of operations and of faults.
async fn disturbed(case: &Case, seed: u64) -> (u64, u64) {
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let faulty = Arc::new(FaultyStore::new(Arc::clone(&memory), seed, 8));
    let mut errors = Vec::new();
    for start in 0.. {
        assert!(start < 20, "seed {seed}: the job never finishes: {errors:?}");
        // The first runs are cut short; later ones may take as long as they need.
        let life = if start < 2 { Duration::from_millis(300 + 170 * ((seed + start) % 9)) } else { patience() };
        match case.run(Arc::clone(&faulty) as _, life).await {
            Some(Ok(_)) => break,
            Some(Err(error)) => errors.push(error),
            None => {}
        }
    }
    assert!(found(&memory).await == case.expected, "seed {seed}: the results differ from those without faults");
    let totals = record(&memory).await.totals.unwrap();
    assert_eq!(totals.evaluations_recomputed, 0, "seed {seed}: acknowledged evaluations were computed again");
    let clear = |error: &String| error.contains("run the same command again");
    assert!(errors.len() <= 3 && errors.iter().all(clear), "seed {seed}: {errors:?}");
    faulty.counts()
}

#[test]
fn storage_failures_and_kills_change_no_byte() {
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
    println!("{operations} operations, {faults} of them with faults");
    assert!(operations > 2_000 && faults > 100, "{operations} operations, {faults} faults");
}

/// A false conflict looks like another coordinator's write, so the coordinator must stop; but nothing is lost.
#[test]
fn a_false_conflict_stops_the_coordinator_with_a_clear_error_and_the_job_resumes() {
    let case = Case::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let conflicting = Arc::new(FaultyStore::new(Arc::clone(&memory), 0, 0).with_conflicts("/wal/", 6));
        let mut stopped = 0;
        for start in 0.. {
            assert!(start < 50, "the job never finishes");
            match case.run(Arc::clone(&conflicting) as _, patience()).await.unwrap() {
                Ok(_) => break,
                Err(error) => {
                    assert!(error.contains("another coordinator has taken over"), "{error}");
                    stopped += 1;
                }
            }
        }
        assert!(stopped > 0, "no conflict occurred");
        assert!(found(&memory).await == case.expected);
        assert_eq!(record(&memory).await.totals.unwrap().evaluations_recomputed, 0);
    });
}

/// A job with a small schedule on the images of a location, and its running coordinator.
struct Cluster {
    files: TempDir,
    address: String,
    coordinator: Process,
}

impl Cluster {
    fn start(images: &Path, settings: impl Fn(Command) -> Command, directory: &Path) -> Self {
        let (files, address) = (TempDir::new().unwrap(), free_address());
        let mut command = settings(elbo());
        command.arg("coordinator").args(with(coordinator_flags(images, &files.path().join("out")), &SMALLER));
        command.args(["--listen", &address, "--lease-seconds", "20", "--max-bad", "50%"]).current_dir(directory);
        let log = File::create(files.path().join("coordinator.log")).unwrap();
        let mut coordinator = Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let listens = || {
            assert!(coordinator.is_running());
            std::net::TcpStream::connect(&address).is_ok()
        };
        wait_until(|| "the coordinator does not listen", listens);
        Self { files, address, coordinator }
    }

    fn out(&self) -> PathBuf {
        self.files.path().join("out")
    }

    /// Starts a worker whose log goes to a file of that name.
    fn worker(&self, name: &str, command: Command, directory: &Path) -> Process {
        let (mut command, url) = (command, format!("http://{}", self.address));
        command
            .args(["worker", "--threads", "1", "--batch", "16", "--patience", "20", "--coordinator", &url])
            .current_dir(directory);
        let log = File::create(self.files.path().join(name)).unwrap();
        Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.files.path().join(name)).unwrap()
    }

    fn quarantined(&self) -> u64 {
        let status = json(elbo().args(["status", "--json", &format!("http://{}", self.address)]));
        status["samples_quarantined"].as_u64().unwrap()
    }

    /// Asserts that the job is done, nothing is quarantined, and every image has the scores of an undisturbed run.
    fn check(mut self, expected: &[Prediction]) {
        assert_eq!(self.coordinator.wait(), Some(0), "{}", self.log("coordinator.log"));
        assert!(predictions(&self.out()) == expected, "the predictions differ from an undisturbed run's");
    }
}

const SMALLER: [(&str, &str); 3] = [("--keep", "2,1"), ("--samples", "2,4"), ("--shard-size", "10")];

/// The predictions of an undisturbed run with the small schedule.
fn undisturbed(images: &Path) -> Vec<Prediction> {
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    run_ok(elbo().arg("label").args(with(job_flags(images, &out), &SMALLER)));
    predictions(&out)
}

#[test]
fn a_worker_without_its_mount_leaves_and_no_image_is_blamed() {
    let images = some_images(4);
    let expected = undisturbed(images.path());
    // Each process has its own current directory, like each machine has its own mounts.
    let (with_mount, without, empty) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    copy_tree(images.path(), &with_mount.path().join("images"));
    std::fs::create_dir(empty.path().join("images")).unwrap();
    let cluster = Cluster::start(Path::new("/proc/self/cwd/images"), |command| command, with_mount.path());
    for (name, directory, told) in
        [("without", &without, "there is no /proc/self/cwd/images"), ("empty", &empty, "is empty here")]
    {
        let mut worker = cluster.worker(name, elbo(), directory.path());
        assert_eq!(worker.wait(), Some(1), "{}", cluster.log(name));
        let log = cluster.log(name);
        assert!(log.contains(told) && log.contains("then start the worker again"), "{log}");
        assert_eq!(cluster.quarantined(), 0);
    }
    // A worker without the mount comes and goes while another one works.
    let mut sound = cluster.worker("sound", elbo(), with_mount.path());
    let mut blind = cluster.worker("blind", elbo(), without.path());
    assert_eq!(sound.wait(), Some(0), "{}", cluster.log("sound"));
    // It may have come too late to get a lease.
    let code = blind.wait();
    assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", cluster.log("blind"));
    assert!(cluster.log("coordinator.log").contains("none of them is blamed"), "the log must say why they left");
    cluster.check(&expected);
}

/// Uploads images to a server that checks access keys.
fn on_s3(images: &Path) -> (S3sFs, Bucket) {
    let server = S3sFs::start(true);
    let bucket = server.bucket();
    bucket.upload(images, "images");
    (server, bucket)
}

#[test]
fn a_worker_whose_credentials_expire_leaves_and_no_image_is_blamed() {
    let images = some_images(4);
    let (server, bucket) = on_s3(images.path());
    let expected = undisturbed(images.path());
    let here = TempDir::new().unwrap();
    let refusals = [
        ("400 Bad Request", "ExpiredToken", "renew them"),
        ("403 Forbidden", "RequestTimeTooSkewed", "clock is wrong"),
        ("403 Forbidden", "AccessDenied", "none of 16"),
    ];
    for (status, code, told) in refusals {
        let cluster = Cluster::start(Path::new("s3://corpus/images"), |command| bucket.on(command), here.path());
        let proxy = Proxy::start(&server.endpoint, 0, 0);
        // A few images are read before that.
        proxy.refuse_after(5, status, code);
        let command = || with_variables(elbo(), &s3_variables(&proxy.endpoint));
        let mut refused = cluster.worker("refused", command(), here.path());
        assert_eq!(refused.wait(), Some(1), "{code}: {}", cluster.log("refused"));
        let log = cluster.log("refused");
        assert!(log.contains(code) && log.contains(told) && !log.contains(SECRET), "{log}");
        assert_eq!(cluster.quarantined(), 0, "{code}");
        let mut other = cluster.worker("other", bucket.on(elbo()), here.path());
        let mut again = cluster.worker("again", command(), here.path());
        assert_eq!(other.wait(), Some(0), "{code}: {}", cluster.log("other"));
        assert!(matches!(again.wait(), Some(0 | 1)), "{code}: {}", cluster.log("again"));
        cluster.check(&expected);
    }
}

#[test]
fn a_job_stops_with_a_clear_error_when_its_only_worker_loses_access_and_resumes() {
    let images = some_images(4);
    let (server, _bucket) = on_s3(images.path());
    let expected = undisturbed(images.path());
    for (status, code) in [("400 Bad Request", "ExpiredToken"), ("403 Forbidden", "AccessDenied")] {
        let outs = TempDir::new().unwrap();
        let out = outs.path().join("out");
        let proxy = Proxy::start(&server.endpoint, 0, 0);
        let label = |workers: &str| {
            let mut command = with_variables(elbo(), &s3_variables(&proxy.endpoint));
            command.arg("label").args(with(job_flags(Path::new("s3://corpus/images"), &out), &SMALLER));
            command.args(["--workers", workers]);
            command
        };
        // The listing takes a few requests, and some images are read before that.
        proxy.refuse_after(12, status, code);
        for workers in ["1", "3"] {
            let stopped = run(&mut label(workers));
            let message = stderr(&stopped);
            assert_eq!(stopped.status.code(), Some(1), "{message}");
            for word in [code, "can't be read here", "none of them is blamed", "the same command, which resumes"] {
                assert!(message.contains(word), "'{word}' is not in: {message}");
            }
            let report = json(elbo().args(["report", "--json"]).arg(&out));
            assert_eq!(report["quarantined"], 0, "{report}");
        }
        proxy.accept();
        run_ok(&mut label("2"));
        assert!(predictions(&out) == expected, "{code}: the predictions differ from an undisturbed run's");
    }
}

#[test]
fn missing_images_are_quarantined_after_a_second_attempt_and_the_job_ends() {
    let images = some_images(4);
    let gone = ["three", "seven"];
    for class in gone {
        for image in sorted(&images.path().join(class)) {
            std::fs::remove_file(&image).unwrap();
            std::os::unix::fs::symlink("/no/such/image.png", &image).unwrap();
        }
    }
    let check = |out: &Path| {
        for row in predictions(out) {
            let is_gone = gone.iter().any(|class| row.key.starts_with(class));
            assert_eq!(row.error().is_some_and(|error| error.starts_with("read: ")), is_gone, "{}", row.key);
        }
    };
    // With one engine, with several engines of one process, and with several processes that agree.
    let outs = TempDir::new().unwrap();
    for workers in ["1", "3"] {
        let out = outs.path().join(workers);
        let flags = with(job_flags(images.path(), &out), &SMALLER);
        run_ok(elbo().arg("label").args(flags).args(["--workers", workers, "--max-bad", "50%"]));
        check(&out);
    }
    let here = outs.path();
    let mut cluster = Cluster::start(images.path(), |command| command, here);
    let mut workers = ["one", "two"].map(|name| cluster.worker(name, elbo(), here));
    assert_eq!(cluster.coordinator.wait(), Some(0), "{}", cluster.log("coordinator.log"));
    for (worker, name) in workers.iter_mut().zip(["one", "two"]) {
        assert_eq!(worker.wait(), Some(0), "{}", cluster.log(name));
    }
    check(&cluster.out());
}
