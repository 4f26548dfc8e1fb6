//! A job's progress, and the time it will still take.

use std::collections::VecDeque;
use std::time::Duration;

use crate::scheduler::{Scheduler, WorkerView};

/// A snapshot of a running job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Shards committed.
    pub shards_done: u64,
    /// Shards open.
    pub shards_active: u64,
    /// Shards not begun.
    pub shards_pending: u64,
    /// Samples in the manifest.
    pub samples: u64,
    /// Samples that have ended, quarantined ones included.
    pub samples_done: u64,
    /// Samples given up.
    pub samples_quarantined: u64,
    /// Evaluations reduced so far, in all runs of the job.
    pub evaluations: u64,
    /// Evaluations reduced since this coordinator started.
    pub evaluations_here: u64,
    /// Evaluations that workers have finished but not reported yet.
    pub unreported: u64,
    /// Evaluations of the whole job, if no further sample is given up. This is a maximum if classes have different numbers
    /// of prompts. For a race it is an estimate from the samples that have ended, `None` before there are any.
    pub evaluations_total: Option<u64>,
    /// Evaluations per second over the last half minute; `None` before there is a value.
    pub rate: Option<f64>,
    /// The current workers.
    pub workers: Vec<WorkerView>,
    /// Whether all shards are committed.
    pub done: bool,
    /// A sentence that names the part that stalls the job, if any.
    pub stalled: Option<String>,
}

impl Progress {
    /// The share of the work that is done, in [0, 1]; 0 while unknown.
    pub fn share(&self) -> f64 {
        let share = |total: u64| (self.evaluations + self.unreported) as f64 / total.max(1) as f64;
        self.evaluations_total.map_or(0.0, share).min(1.0)
    }

    /// The time left at the current rate.
    pub fn eta(&self) -> Option<Duration> {
        let left = self.evaluations_total?.saturating_sub(self.evaluations + self.unreported) as f64;
        let seconds = left / self.rate.filter(|r| *r > 0.0)?;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Turns counts into rates over a sliding window.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// (time, evaluations), oldest first.
    points: VecDeque<(Duration, u64)>,
}

const WINDOW: Duration = Duration::from_secs(30);

impl Meter {
    fn rate(&mut self, now: Duration, evaluations: u64) -> Option<f64> {
        while self.points.len() > 2 && self.points.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) > WINDOW) {
            self.points.pop_front();
        }
        if self.points.back().is_none_or(|(at, _)| now.saturating_sub(*at) >= Duration::from_millis(200)) {
            self.points.push_back((now, evaluations));
        }
        let (start, first) = *self.points.front()?;
        let seconds = now.saturating_sub(start).as_secs_f64();
        (seconds >= 0.5 && evaluations > first).then(|| (evaluations - first) as f64 / seconds)
    }

    /// The progress of a job right now.
    pub(crate) fn snapshot(&mut self, scheduler: &Scheduler, now: Duration) -> Progress {
        let (totals, workers) = (scheduler.totals(), scheduler.workers());
        let (shards_done, shards_active, shards_pending) = scheduler.shard_counts();
        let unreported = workers.iter().map(|w| w.unreported).sum();
        Progress {
            shards_done,
            shards_active,
            shards_pending,
            samples: scheduler.job().samples(),
            samples_done: totals.samples,
            samples_quarantined: totals.quarantined,
            evaluations: totals.evaluations,
            evaluations_here: scheduler.merged_here(),
            unreported,
            evaluations_total: scheduler.expected_evaluations(),
            rate: self.rate(now, scheduler.merged_here() + unreported),
            workers,
            done: scheduler.is_done(),
            stalled: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_covers_the_last_half_minute() {
        let mut meter = Meter::default();
        assert_eq!(meter.rate(Duration::ZERO, 1_000), None);
        // A slow hundred seconds, then a fast one.
        for s in 1..=100 {
            meter.rate(Duration::from_secs(s), 1_000 + s * 10);
        }
        for s in 1..=60 {
            meter.rate(Duration::from_secs(100 + s), 2_000 + s * 500);
        }
        let rate = meter.rate(Duration::from_secs(161), 2_000 + 61 * 500).unwrap();
        assert!((rate - 500.0).abs() < 1.0, "{rate}");
    }

    #[test]
    fn the_eta_is_the_remaining_work_at_the_current_rate() {
        let progress = Progress {
            evaluations: 50,
            unreported: 10,
            evaluations_total: Some(100),
            rate: Some(8.0),
            ..Progress::default()
        };
        assert_eq!(progress.eta(), Some(Duration::from_secs(5)));
        assert_eq!(Progress::default().eta(), None);
    }
}
