//! Names the part that stalls a job, once there has been no progress for a while.
//!
//! A plain state machine over observations; the time is passed in. It uses two clocks. One counts merged evaluations, and
//! stops when the output's storage does. The other counts evaluations finished anywhere, which workers report in their
//! heartbeats, and stops when all workers do.

use std::time::Duration;

use elbo_core::activity::Activity;

/// A job is stalled only if it made no progress for this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A slow device needs longer for a batch: wait for three batches of this many evaluations.
const BATCH: f64 = 64.0;

/// How often a lasting stall is reported again.
const REMINDER: Duration = Duration::from_secs(300);

/// A worker, as the watchdog sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerSeen {
    /// Its name.
    pub worker: String,
    /// What it is doing; `None` if it has not said.
    pub activity: Option<Activity>,
    /// How long it has made no progress at that.
    pub quiet: Duration,
    /// Leases it holds.
    pub leases: u32,
    /// Evaluations per second, 0 while unknown.
    pub rate: f64,
}

/// A job at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Time since the coordinator started.
    pub now: Duration,
    /// Evaluations merged.
    pub merged: u64,
    /// Evaluations that workers have finished but not reported yet.
    pub unreported: u64,
    /// Shards committed.
    pub committed: u64,
    /// The longest running use of the output's storage, and its duration.
    pub storage: Option<(String, Duration)>,
    /// The current workers.
    pub workers: Vec<WorkerSeen>,
}

/// The part that stalls a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// There are no workers.
    Workers,
    /// The output's storage.
    Storage,
    /// The workers' devices.
    Device,
    /// The images' storage, or decoding them.
    Loader,
    /// The model's storage, or loading it.
    Model,
    /// Workers ask for work that exists, and get none.
    Coordinator,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 6] =
        [Self::Workers, Self::Storage, Self::Device, Self::Loader, Self::Model, Self::Coordinator];

    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Workers => "workers",
            Self::Storage => "storage",
            Self::Device => "device",
            Self::Loader => "loader",
            Self::Model => "model",
            Self::Coordinator => "coordinator",
        }
    }
}

/// A job that makes no progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// The part at fault.
    pub part: Part,
    /// The observation, and what to check.
    pub sentence: String,
}

/// Something to tell an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StallEvent {
    /// The job is stalled, by a new part or still by the same one.
    Stalled(Stall),
    /// The job makes progress again.
    Resumed,
}

/// A count, and the time of its last change.
#[derive(Clone, Copy, Debug, Default)]
struct Clock {
    count: u64,
    since: Duration,
}

impl Clock {
    /// How long the count has not changed.
    fn still(&mut self, now: Duration, count: u64) -> Duration {
        if count != self.count {
            *self = Self { count, since: now };
        }
        now.saturating_sub(self.since)
    }
}

/// Watches a job.
#[derive(Debug, Default)]
pub struct Watchdog {
    merged: Clock,
    finished: Clock,
    deserted: Option<Duration>,
    stall: Option<Stall>,
    told: Duration,
}

impl Watchdog {
    /// The current stall.
    pub fn stall(&self) -> Option<&Stall> {
        self.stall.as_ref()
    }

    /// Takes in an observation. Returns the event to report, if any.
    pub fn look(&mut self, seen: &Observation) -> Option<StallEvent> {
        let stall = self.judge(seen);
        let before = std::mem::replace(&mut self.stall, stall);
        match (&before, &self.stall) {
            (Some(_), None) => Some(StallEvent::Resumed),
            (Some(old), Some(new)) if old.part == new.part && seen.now.saturating_sub(self.told) < REMINDER => None,
            (_, Some(new)) => {
                self.told = seen.now;
                Some(StallEvent::Stalled(new.clone()))
            }
            (None, None) => None,
        }
    }

    fn judge(&mut self, seen: &Observation) -> Option<Stall> {
        // A commit merges nothing, but is progress.
        let unmerged = self.merged.still(seen.now, seen.merged.wrapping_add(seen.committed));
        if let Some((what, lasts)) = &seen.storage
            && unmerged >= PATIENCE
            && *lasts >= PATIENCE
        {
            return stalled(
                Part::Storage,
                format!(
                    "the output's storage has not answered for {} ({what}): look at that storage and the network to it",
                    period(*lasts)
                ),
            );
        }
        if seen.workers.is_empty() {
            let alone = seen.now.saturating_sub(*self.deserted.get_or_insert(seen.now));
            return (alone >= PATIENCE).then(|| Stall {
                part: Part::Workers,
                sentence: format!(
                    "no worker has been there for {}: start some with `elbo worker --coordinator URL`, or look at the logs of those that ended",
                    period(alone)
                ),
            });
        }
        if self.deserted.take().is_some() {
            // Give the first new worker time to begin.
            self.finished.since = seen.now;
        }
        let unfinished = self.finished.still(seen.now, seen.merged.wrapping_add(seen.unreported));
        if unfinished < patience(&seen.workers) { None } else { blame(&seen.workers, unfinished) }
    }
}

/// How long these workers may go without progress: the fastest must have had time for its batch.
fn patience(workers: &[WorkerSeen]) -> Duration {
    let fastest = workers.iter().map(|w| w.rate).fold(0.0, f64::max);
    let batch = if fastest > 0.0 { 3.0 * BATCH / fastest } else { 0.0 };
    Duration::try_from_secs_f64(batch).unwrap_or(PATIENCE).max(PATIENCE)
}

/// The part that most of the stalled workers have in common. On a tie, the activity nearest to a result wins.
fn blame(workers: &[WorkerSeen], since: Duration) -> Option<Stall> {
    let at = |activity| workers.iter().filter(move |w| w.activity == Some(activity));
    let most = [Activity::Computing, Activity::Preparing, Activity::Loading, Activity::Waiting];
    let most = most.into_iter().rev().max_by_key(|activity| at(*activity).count());
    let Some((activity, worker)) = most.and_then(|a| Some((a, at(a).max_by_key(|w| w.quiet)?))) else {
        let leases: u32 = workers.iter().map(|w| w.leases).sum();
        return stalled(
            Part::Device,
            format!(
                "{} workers with {leases} leases have made no progress for {}: look at their logs and devices",
                workers.len(),
                period(since)
            ),
        );
    };
    let who = format!("{} of {} workers", at(activity).count(), workers.len());
    let (name, since) = (&worker.worker, period(since));
    match activity {
        Activity::Computing => stalled(
            Part::Device,
            format!(
                "{who} are computing, but there has been no result for {since}: look at their devices, and the log of {name}"
            ),
        ),
        Activity::Preparing => stalled(
            Part::Loader,
            format!(
                "{who} are waiting for images, but none has come for {since}: look at the images' storage and the network to it, and the log of {name}"
            ),
        ),
        Activity::Loading => stalled(
            Part::Model,
            format!(
                "{who} have been loading the model for {since}: look at the model's storage, and the log of {name}"
            ),
        ),
        Activity::Waiting => stalled(
            Part::Coordinator,
            format!(
                "{who} ask for work and have got none for {since}: look at this coordinator's log; you can restart it without losing acknowledged results"
            ),
        ),
    }
}

fn stalled(part: Part, sentence: String) -> Option<Stall> {
    Some(Stall { part, sentence })
}

/// Formats a duration.
fn period(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 120 { format!("{seconds} s") } else { format!("{} min", seconds / 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(activity: Option<Activity>) -> WorkerSeen {
        WorkerSeen { worker: "w".into(), activity, quiet: Duration::from_secs(100), leases: 2, rate: 10.0 }
    }

    fn seconds(now: u64) -> Observation {
        Observation { now: Duration::from_secs(now), merged: 5, ..Observation::default() }
    }

    /// The part reported by the 100th second for a job that stalls in its 10th.
    fn part(seen: impl Fn(Observation) -> Observation) -> Option<Part> {
        let mut watchdog = Watchdog::default();
        assert_eq!(watchdog.look(&seen(seconds(10))), None);
        assert_eq!(watchdog.look(&seen(seconds(69))), None);
        watchdog.look(&seen(seconds(100)));
        watchdog.stall().map(|stall| stall.part)
    }

    #[test]
    fn the_stalled_part_is_named() {
        let with = |workers: &[Option<Activity>]| {
            let workers: Vec<_> = workers.iter().map(|a| worker(*a)).collect();
            part(|seen| Observation { workers: workers.clone(), ..seen })
        };
        use Activity::{Computing, Loading, Preparing, Waiting};
        assert_eq!(with(&[]), Some(Part::Workers));
        assert_eq!(with(&[None]), Some(Part::Device));
        assert_eq!(with(&[Some(Computing), Some(Waiting)]), Some(Part::Device));
        assert_eq!(with(&[Some(Preparing), Some(Preparing), Some(Computing)]), Some(Part::Loader));
        assert_eq!(with(&[Some(Loading), None]), Some(Part::Model));
        assert_eq!(with(&[Some(Waiting)]), Some(Part::Coordinator));
        let waiting = |lasts| {
            let storage = Some(("making results durable".to_owned(), Duration::from_secs(lasts)));
            move |seen| Observation { storage: storage.clone(), workers: vec![worker(Some(Computing))], ..seen }
        };
        assert_eq!(part(waiting(80)), Some(Part::Storage));
        assert_eq!(part(waiting(2)), Some(Part::Device));
    }

    #[test]
    fn finished_evaluations_count_as_progress_unless_the_storage_stalls() {
        let mut watchdog = Watchdog::default();
        let mut seen = Observation { workers: vec![worker(Some(Activity::Computing))], ..seconds(0) };
        for now in (0..600).step_by(30) {
            seen = Observation { now: Duration::from_secs(now), unreported: now, ..seen };
            assert_eq!(watchdog.look(&seen), None);
        }
        seen.storage = Some(("making results durable".into(), Duration::from_secs(300)));
        let Some(StallEvent::Stalled(stall)) = watchdog.look(&seen) else {
            panic!("the storage stall was not reported")
        };
        assert!(stall.sentence.contains("has not answered for 5 min (making results durable)"), "{}", stall.sentence);
    }

    #[test]
    fn a_slow_device_gets_enough_time_for_a_batch() {
        let mut watchdog = Watchdog::default();
        let slow = vec![WorkerSeen { rate: 0.5, ..worker(Some(Activity::Computing)) }];
        assert_eq!(watchdog.look(&Observation { workers: slow.clone(), ..seconds(1) }), None);
        assert_eq!(watchdog.look(&Observation { workers: slow.clone(), ..seconds(384) }), None);
        assert!(watchdog.look(&Observation { workers: slow, ..seconds(386) }).is_some());
    }

    #[test]
    fn a_stall_is_reported_once_then_on_a_new_cause_every_few_minutes_and_at_its_end() {
        let mut watchdog = Watchdog::default();
        let mut told = Vec::new();
        for now in 0..=800 {
            let workers = if now < 500 { vec![] } else { vec![worker(Some(Activity::Loading))] };
            let merged = if now < 800 { 5 } else { 6 };
            match watchdog.look(&Observation { workers, merged, ..seconds(now) }) {
                Some(StallEvent::Stalled(stall)) => told.push((now, Some(stall.part))),
                Some(StallEvent::Resumed) => told.push((now, None)),
                None => {}
            }
        }
        let expected =
            [(60, Some(Part::Workers)), (360, Some(Part::Workers)), (500, None), (560, Some(Part::Model)), (800, None)];
        assert_eq!(told, expected);
    }
}
