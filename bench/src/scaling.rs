//! Measures how a job's time depends on the number of workers, and the cost of killed workers or a killed coordinator: the
//! real coordinator with simulated workers whose evaluations all take the same time.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use elbo_core::preset::Preset;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::BenchError;
use crate::process::{Coordinator, free_port};
use crate::run::{planned, unanswered};
use crate::scenery::Scenery;
use crate::simulated::{Behaviour, Simulated, Tally};

/// The job: 2,050 evaluations per image.
const PRESET: Preset = Preset::Pets;
const CLASSES: u32 = 37;

/// The pause between a worker's death and its replacement.
const REPLACED_AFTER: Duration = Duration::from_secs(5);

/// What to measure.
#[derive(Clone, Debug)]
pub struct ScalingBenchOptions {
    /// The `elbo` program.
    pub program: PathBuf,
    /// Directory for the files.
    pub dir: PathBuf,
    /// Numbers of workers, with one run each.
    pub workers: Vec<usize>,
    /// Evaluations per second of a worker.
    pub rate: f64,
    /// How long the run with the most workers should take, in seconds.
    pub seconds: f64,
    /// Workers that die, in a separate run.
    pub deaths: usize,
}

/// One run of the job.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    /// Workers.
    pub workers: usize,
    /// From the workers' start to the coordinator's end.
    pub seconds: f64,
    /// Evaluations divided by the workers' capacity in that time.
    pub efficiency: f64,
    /// Units that were reported twice.
    pub duplicates: u64,
}

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Scaling {
    /// Images.
    pub samples: u64,
    /// Evaluations of the job.
    pub evaluations: u64,
    /// Evaluations per second of a worker.
    pub rate: f64,
    /// The undisturbed runs.
    pub runs: Vec<Run>,
    /// The run with workers that died without notice and were replaced after [`Scaling::replaced_after`].
    pub deaths: Run,
    /// How many workers died.
    pub died: usize,
    /// The pause before a dead worker is replaced, in seconds.
    pub replaced_after: f64,
    /// Seconds of one worker that each death cost, including the pause.
    pub lost_per_death: f64,
    /// The run with a coordinator that was killed in the middle and restarted immediately.
    pub restart: Run,
    /// Seconds from its death until a worker without work got a block.
    pub first_lease_seconds: f64,
    /// How many seconds longer the job took because of it.
    pub lost_by_restart: f64,
}

/// The faults in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    Deaths(usize),
    Restart,
}

/// Runs the benchmark; `note` receives progress messages.
pub async fn run(options: &ScalingBenchOptions, note: impl Fn(&str)) -> Result<Scaling, BenchError> {
    let most = options.workers.iter().copied().max().unwrap_or(1);
    let each = planned(PRESET, CLASSES)?;
    let samples = ((most as f64 * options.rate * options.seconds / each as f64) as u64).max(1);
    let bench = Bench { options, samples, evaluations: samples * each, names: AtomicU64::new(0) };
    let mut runs = Vec::new();
    for &workers in &options.workers {
        note(&format!("{workers} workers"));
        runs.push(bench.run(workers, Trouble::None).await?.0);
    }
    let plain = runs.iter().find(|run| run.workers == most).map_or(0.0, |run| run.seconds);
    note(&format!("{most} workers, of which {} die", options.deaths));
    let (deaths, _) = bench.run(most, Trouble::Deaths(options.deaths)).await?;
    note(&format!("{most} workers, whose coordinator is killed"));
    let (restart, first_lease) = bench.run(most, Trouble::Restart).await?;
    Ok(Scaling {
        samples,
        evaluations: bench.evaluations,
        rate: options.rate,
        runs,
        deaths,
        died: options.deaths,
        replaced_after: REPLACED_AFTER.as_secs_f64(),
        lost_per_death: (deaths.seconds - plain) * most as f64 / options.deaths.max(1) as f64,
        restart,
        first_lease_seconds: first_lease.unwrap_or_default(),
        lost_by_restart: restart.seconds - plain,
    })
}

struct Bench<'a> {
    options: &'a ScalingBenchOptions,
    samples: u64,
    evaluations: u64,
    /// Workers so far, to give each a different name.
    names: AtomicU64,
}

impl Bench<'_> {
    fn worker(&self, address: &str, dies_after: Option<Duration>, tally: &Arc<Tally>) -> Result<Simulated, BenchError> {
        let name = format!("simulated-{}", self.names.fetch_add(1, Ordering::Relaxed));
        let behaviour = Behaviour { rate: self.options.rate, slowness: 1.0, dies_after };
        Ok(Simulated::new(address, name, behaviour, Arc::clone(tally))?)
    }

    /// Runs the job once. After a restart, also returns the time to the first lease.
    async fn run(&self, workers: usize, trouble: Trouble) -> Result<(Run, Option<f64>), BenchError> {
        let (dir, samples) = (self.options.dir.clone(), self.samples);
        let stage = tokio::task::spawn_blocking(move || Scenery::make(&dir, samples, CLASSES))
            .await
            .map_err(|error| BenchError::Answer(format!("was not reached: {error}")))??;
        let port = free_port()?;
        let start = || Coordinator::start(&self.options.program, &stage, PRESET.name(), port);
        let mut coordinator = start()?;
        // Wait for the first lease: the time to list the images does not depend on the workers.
        self.worker(&coordinator.address, None, &Arc::default())?.first_lease().await.map_err(unanswered)?;
        let (tally, started) = (Arc::new(Tally::default()), Instant::now());
        let mut crew = JoinSet::new();
        for number in 0..workers {
            let dies_after = match trouble {
                // The workers die one after the other, in the first two thirds of the time.
                Trouble::Deaths(deaths) if number < deaths => {
                    let share = (number + 1) as f64 / (deaths + 1) as f64;
                    Some(Duration::from_secs_f64(self.options.seconds * share * 2.0 / 3.0))
                }
                _ => None,
            };
            let worker = self.worker(&coordinator.address, dies_after, &tally)?;
            let successor = self.worker(&coordinator.address, None, &tally)?;
            crew.spawn(async move {
                let stop = CancellationToken::new();
                if !worker.run(stop.clone()).await {
                    tokio::time::sleep(REPLACED_AFTER).await;
                    successor.run(stop).await;
                }
            });
        }
        let mut first_lease = None;
        if trouble == Trouble::Restart {
            tokio::time::sleep(Duration::from_secs_f64(self.options.seconds / 2.0)).await;
            coordinator.kill()?;
            coordinator = start()?;
            let probe = self.worker(&coordinator.address, None, &Arc::default())?;
            probe.first_lease().await.map_err(unanswered)?;
            first_lease = Some(coordinator.started.elapsed().as_secs_f64());
        }
        coordinator.wait().await?;
        let seconds = started.elapsed().as_secs_f64();
        crew.join_all().await;
        let able = workers as f64 * self.options.rate * seconds;
        let duplicates = tally.duplicates.load(Ordering::Relaxed);
        Ok((Run { workers, seconds, efficiency: self.evaluations as f64 / able, duplicates }, first_lease))
    }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, evaluations, rate, .. } = self;
        writeln!(f, "{samples} images, {evaluations} evaluations, workers of {rate} evaluations/s")?;
        writeln!(f, "\n{:<12} {:>10} {:>12} {:>12}", "workers", "seconds", "efficiency", "duplicates")?;
        for Run { workers, seconds, efficiency, duplicates } in &self.runs {
            writeln!(f, "{workers:<12} {seconds:>10.1} {:>10.1} % {duplicates:>12}", 100.0 * efficiency)?;
        }
        writeln!(
            f,
            "\n{} of {} workers died and were replaced {} s later",
            self.died, self.deaths.workers, self.replaced_after
        )?;
        writeln!(f, "  seconds                   {:.1}", self.deaths.seconds)?;
        writeln!(
            f,
            "  a worker's time lost      {:.1} s a death, {} s of them the pause",
            self.lost_per_death, self.replaced_after
        )?;
        writeln!(f, "  duplicates                {}", self.deaths.duplicates)?;
        writeln!(f, "\nthe coordinator was killed in the middle and started again")?;
        writeln!(
            f,
            "  seconds                   {:.1}, {:.1} more than undisturbed",
            self.restart.seconds, self.lost_by_restart
        )?;
        writeln!(f, "  first new lease           {:.1} s after its death", self.first_lease_seconds)?;
        write!(f, "  duplicates                {}", self.restart.duplicates)
    }
}
