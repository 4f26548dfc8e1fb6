//! The phases of the coordinator benchmark: start, steady work, flat out, rest, kill and restart.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use elbo_core::ensemble::Contenders;
use elbo_core::job::DEFAULT_SHARD_SIZE;
use elbo_core::policy::Course;
use elbo_core::preset::Preset;
use elbo_output::predictions::decode_predictions;
use elbo_proto::v1;
use elbo_proto::v1::coordinator_client::CoordinatorClient;
use elbo_worker::CallError;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::process::{Coordinator, bytes_below, free_port};
use crate::report::{Feeds, FlatOut, Predictions, Quantiles, Report, Start, Steady};
use crate::scenery::Scenery;
use crate::simulated::{Behaviour, Simulated, Tally};
use crate::{BenchError, oracle};

/// Training timesteps of the simulated model.
const TIMESTEPS: u32 = 1000;

/// Workers join one after the other, over a sixth of the measured time. The measurement begins after another sixth.
const JOINING: u32 = 6;

/// The pause between a worker's death and its replacement.
const REPLACED_AFTER: Duration = Duration::from_secs(5);

/// One in this many workers takes ten times as long as it announced.
const STRAGGLERS: usize = 50;

/// One in this many workers dies during a phase.
const MORTALS: usize = 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct CoordinatorBenchOptions {
    /// The `elbo` program.
    pub program: PathBuf,
    /// Directory for the files; a temporary one if `None`.
    pub dir: Option<PathBuf>,
    /// Images.
    pub samples: u64,
    /// Classes.
    pub classes: u32,
    /// Schedule.
    pub preset: Preset,
    /// Simulated workers.
    pub workers: usize,
    /// Evaluations per second of the average worker, with one phase per value.
    pub rates: Vec<f64>,
    /// How long each phase of steady work is measured.
    pub seconds: Duration,
    /// Shards to commit in the flat-out phase, within ten times `seconds`.
    pub shards: u64,
    /// How long to wait before the ledger's size is measured.
    pub settle: Duration,
}

/// Runs a benchmark; `note` receives progress messages.
pub async fn run(options: &CoordinatorBenchOptions, note: impl Fn(&str)) -> Result<Report, BenchError> {
    let temporary = match options.dir {
        Some(_) => None,
        None => Some(tempfile::tempdir().map_err(|source| BenchError::Scenery {
            action: "creating",
            path: std::env::temp_dir(),
            source,
        })?),
    };
    let dir = options.dir.clone().or_else(|| temporary.as_ref().map(|d| d.path().to_owned())).unwrap_or_default();
    let CoordinatorBenchOptions { samples, classes, .. } = *options;
    note(&format!("making {samples} empty images in {}", dir.display()));
    let stage = tokio::task::spawn_blocking(move || Scenery::make(&dir, samples, classes))
        .await
        .map_err(|error| BenchError::Answer(format!("was not reached: {error}")))??;
    let bench = Bench { options, stage, workers: AtomicU64::new(0) };
    note("starting the coordinator");
    let mut coordinator = bench.start()?;
    let start = bench.until_first_lease(&mut coordinator).await?;
    let mut steady = Vec::new();
    for &rate in &options.rates {
        note(&format!("{} workers of {rate} evaluations/s", options.workers));
        steady.push(bench.steady(&mut coordinator, rate).await?);
    }
    note(&format!("{} workers that answer at once", options.workers));
    let flat_out = bench.flat_out(&mut coordinator).await?;
    note("killing the coordinator and starting it again");
    coordinator.kill()?;
    let mut again = bench.start()?;
    let restart = Start { manifest_seconds: None, ..bench.until_first_lease(&mut again).await? };
    again.kill()?;
    Ok(Report {
        samples,
        classes,
        preset: options.preset.to_string(),
        workers: options.workers,
        start,
        steady,
        flat_out,
        restart,
        predictions: bench.check()?,
    })
}

struct Bench<'a> {
    options: &'a CoordinatorBenchOptions,
    stage: Scenery,
    /// Workers so far, to give each a different name.
    workers: AtomicU64,
}

impl Bench<'_> {
    fn start(&self) -> Result<Coordinator, BenchError> {
        Coordinator::start(&self.options.program, &self.stage, self.options.preset.name(), free_port()?)
    }

    fn worker(&self, address: &str, behaviour: Behaviour, tally: &Arc<Tally>) -> Result<Simulated, BenchError> {
        let name = format!("simulated-{}", self.workers.fetch_add(1, Ordering::Relaxed));
        Ok(Simulated::new(address, name, behaviour, Arc::clone(tally))?)
    }

    /// Measures the time to the first lease. A coordinator listens from the beginning, but answers once it has its job.
    async fn until_first_lease(&self, coordinator: &mut Coordinator) -> Result<Start, BenchError> {
        let idle = Behaviour { rate: 1.0, slowness: 1.0, dies_after: None };
        let probe = self.worker(&coordinator.address, idle, &Arc::default())?;
        let job = self.stage.out.join("job.json");
        let mut manifest = None;
        let mut first = std::pin::pin!(probe.first_lease());
        loop {
            tokio::select! {
                leased = &mut first => {
                    leased.map_err(unanswered)?;
                    break;
                }
                () = tokio::time::sleep(Duration::from_millis(20)) => {
                    coordinator.check()?;
                    if manifest.is_none() && job.exists() {
                        manifest = Some(coordinator.started.elapsed().as_secs_f64());
                    }
                }
            }
        }
        Ok(Start {
            manifest_seconds: manifest,
            first_lease_seconds: coordinator.started.elapsed().as_secs_f64(),
            cpu_seconds: coordinator.cpu()?.as_secs_f64(),
            memory: coordinator.memory()?,
        })
    }

    /// Runs workers around a rate: they differ, join late, straggle, die and are replaced.
    async fn steady(&self, coordinator: &mut Coordinator, rate: f64) -> Result<Steady, BenchError> {
        let (tally, stop) = (Arc::new(Tally::default()), CancellationToken::new());
        let count = self.options.workers;
        let joining = self.options.seconds / JOINING;
        let phase = 2 * joining + self.options.seconds;
        let mut crew = JoinSet::new();
        let mut able = 0.0;
        for i in 0..count {
            // Evenly spread from 0.5 to 1.5 times the rate.
            let own = rate * (0.5 + i as f64 / count as f64);
            let slowness = if i % STRAGGLERS == STRAGGLERS / 2 { 10.0 } else { 1.0 };
            able += own / slowness;
            let share = i as f64 / count as f64;
            let dies_after = (i % MORTALS == MORTALS / 2).then(|| phase.mul_f64(0.2 + 0.8 * share));
            let behaviour = Behaviour { rate: own, slowness, dies_after };
            let successor = Behaviour { dies_after: None, ..behaviour };
            let worker = self.worker(&coordinator.address, behaviour, &tally)?;
            let successor = self.worker(&coordinator.address, successor, &tally)?;
            // Workers with similar rates don't join at the same time.
            let delay = joining.mul_f64((i * 7919 % count.max(1)) as f64 / count as f64);
            let stop = stop.clone();
            crew.spawn(async move {
                tokio::time::sleep(delay).await;
                if worker.run(stop.clone()).await || stop.is_cancelled() {
                    return false;
                }
                tokio::time::sleep(REPLACED_AFTER).await;
                successor.run(stop).await;
                true
            });
        }
        tokio::time::sleep(2 * joining).await;
        coordinator.check()?;
        coordinator.forget_peak()?;
        drop((tally.take_lease_seconds(), tally.take_report_seconds()));
        let (before, cpu, started) = (Counts::of(&tally), coordinator.cpu()?, Instant::now());
        tokio::time::sleep(self.options.seconds).await;
        let (spent, seconds) = ((coordinator.cpu()? - cpu).as_secs_f64(), started.elapsed().as_secs_f64());
        let (counts, memory) = (Counts::of(&tally).since(before), coordinator.memory()?);
        let ledger_bytes = bytes_below(&self.stage.out.join("ledger"));
        let (lease, report) = (tally.take_lease_seconds(), tally.take_report_seconds());
        coordinator.check()?;
        stop.cancel();
        let died = crew.join_all().await.into_iter().filter(|died| *died).count();
        let per_second = |n: u64| n as f64 / seconds;
        Ok(Steady {
            rate,
            seconds,
            died,
            cpu_per_100_workers: spent / seconds / (count as f64 / 100.0),
            leases_per_second: per_second(counts.leases),
            reports_per_second: per_second(counts.reports),
            evaluations_per_second: per_second(counts.evaluations),
            busy: per_second(counts.evaluations) / able,
            duplicates: counts.duplicates,
            refused: counts.refused,
            lease: Quantiles::of(lease),
            report: Quantiles::of(report),
            memory,
            ledger_bytes,
        })
    }

    /// Runs workers that answer immediately, and then waits.
    async fn flat_out(&self, coordinator: &mut Coordinator) -> Result<FlatOut, BenchError> {
        let (tally, stop) = (Arc::new(Tally::default()), CancellationToken::new());
        let rate = self.options.rates.iter().copied().fold(1.0, f64::max);
        let mut crew = JoinSet::new();
        for _ in 0..self.options.workers {
            let behaviour = Behaviour { rate, slowness: 0.0, dies_after: None };
            crew.spawn(self.worker(&coordinator.address, behaviour, &tally)?.run(stop.clone()));
        }
        let ledger = self.stage.out.join("ledger");
        coordinator.forget_peak()?;
        let (cpu, started) = (coordinator.cpu()?, Instant::now());
        let mut ledger_peak_bytes = 0;
        while started.elapsed() < self.options.seconds.saturating_mul(10) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            coordinator.check()?;
            ledger_peak_bytes = bytes_below(&ledger).max(ledger_peak_bytes);
            if status(&coordinator.address).await?.shards_done >= self.options.shards {
                break;
            }
        }
        let (spent, seconds) = ((coordinator.cpu()? - cpu).as_secs_f64(), started.elapsed().as_secs_f64());
        let (counts, memory) = (Counts::of(&tally), coordinator.memory()?);
        let report = Quantiles::of(tally.take_report_seconds());
        stop.cancel();
        crew.join_all().await;
        let status = status(&coordinator.address).await?;
        tokio::time::sleep(self.options.settle).await;
        coordinator.check()?;
        let done_evaluations =
            status.shards_done * u64::from(DEFAULT_SHARD_SIZE) * planned(self.options.preset, self.options.classes)?;
        let per_cpu_second = |n: u64| n as f64 / spent.max(1e-9);
        let feeds = |&rate: &f64| Feeds { rate, workers: per_cpu_second(counts.evaluations) / rate };
        Ok(FlatOut {
            seconds,
            cores: spent / seconds,
            units_per_second: counts.units as f64 / seconds,
            units_per_cpu_second: per_cpu_second(counts.units),
            evaluations_per_cpu_second: per_cpu_second(counts.evaluations),
            feeds: self.options.rates.iter().map(feeds).collect(),
            duplicates: counts.duplicates,
            refused: counts.refused,
            report,
            shards_done: status.shards_done,
            shards_active: status.shards_active,
            evaluations_open: status.evaluations.saturating_sub(done_evaluations),
            memory,
            ledger_peak_bytes,
            ledger_settled_bytes: bytes_below(&ledger),
            settle_seconds: self.options.settle.as_secs_f64(),
        })
    }

    /// Compares the predictions of committed shards with the expected ones.
    fn check(&self) -> Result<Predictions, BenchError> {
        let (classes, planned) = (self.options.classes, planned(self.options.preset, self.options.classes)?);
        let mut found = Predictions::default();
        let Ok(files) = std::fs::read_dir(self.stage.out.join("predictions")) else { return Ok(found) };
        for file in files.flatten() {
            let read = |source| BenchError::Scenery { action: "reading", path: file.path(), source };
            for row in decode_predictions(Bytes::from(std::fs::read(file.path()).map_err(read)?))? {
                let class = row.labelled().map(|labelled| labelled.class.0);
                let expected = oracle::winner(row.sample, classes).map(|prompt| prompt as i32);
                found.checked += 1;
                found.wrong += u64::from(class != expected || u64::from(row.evaluations) != planned);
            }
        }
        Ok(found)
    }
}

/// Evaluations per image.
pub(crate) fn planned(preset: Preset, classes: u32) -> Result<u64, BenchError> {
    let contenders = Contenders::prompts(classes as usize);
    let course = Course::new(&preset.policy(), None, TIMESTEPS, Some(&contenders))?;
    Ok(course.costs(&contenders).iter().map(|cost| cost.evaluations).sum())
}

async fn status(address: &str) -> Result<v1::StatusReply, BenchError> {
    let failed = |error: &dyn std::fmt::Display| BenchError::Answer(format!("tells no status: {error}"));
    let mut client = CoordinatorClient::connect(address.to_owned()).await.map_err(|e| failed(&e))?;
    Ok(client.status(v1::StatusRequest {}).await.map_err(|e| failed(&e.message()))?.into_inner())
}

pub(crate) fn unanswered(error: CallError) -> BenchError {
    match error {
        CallError::Rejoin => BenchError::Answer("forgot a worker that had just joined".into()),
        CallError::OtherJob => BenchError::Answer("has another job than it had".into()),
        CallError::Rejected(reason) => BenchError::Answer(format!("refused a call: {reason}")),
        CallError::Fatal(error) => error.into(),
    }
}

/// A snapshot of a tally.
#[derive(Clone, Copy, Debug)]
struct Counts {
    leases: u64,
    reports: u64,
    units: u64,
    duplicates: u64,
    evaluations: u64,
    refused: u64,
}

impl Counts {
    fn of(tally: &Tally) -> Self {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Self {
            leases: load(&tally.leases),
            reports: load(&tally.reports),
            units: load(&tally.units),
            duplicates: load(&tally.duplicates),
            evaluations: load(&tally.evaluations),
            refused: load(&tally.refused),
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            leases: self.leases - before.leases,
            reports: self.reports - before.reports,
            units: self.units - before.units,
            duplicates: self.duplicates - before.duplicates,
            evaluations: self.evaluations - before.evaluations,
            refused: self.refused - before.refused,
        }
    }
}
