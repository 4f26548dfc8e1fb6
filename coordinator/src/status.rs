//! The status of a job, for `elbo status`, the HTTP side and scripts.

use std::time::Duration;

use elbo_core::activity::Activity;
use elbo_net::http::document;
use elbo_proto::v1;
use maud::html;
use serde::Serialize;

use crate::progress::Progress;
use crate::scheduler::WorkerView;
use crate::watchdog::{Observation, WorkerSeen};

/// The JSON object of `elbo status --json` and `/status`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobStatus {
    /// starting, waiting for workers, running, stopping, done; or unfinished, for an output whose job has no coordinator.
    pub state: String,
    /// The shards.
    pub shards: Shards,
    /// Samples that have ended, quarantined ones included.
    pub samples_done: u64,
    /// All samples.
    pub samples: u64,
    /// Samples given up.
    pub samples_quarantined: u64,
    /// Evaluations merged.
    pub evaluations: u64,
    /// Evaluations per second.
    pub evaluations_per_second: f64,
    /// The time left.
    pub eta_seconds: Option<f64>,
    /// A sentence that names the part that stalls the job; `None` while it makes progress.
    pub stalled: Option<String>,
    /// The current workers.
    pub workers: Vec<Worker>,
}

/// Shards by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shards {
    /// Committed.
    pub done: u64,
    /// Open.
    pub active: u64,
    /// Not begun.
    pub pending: u64,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Worker {
    /// Its name.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// Its device.
    pub device: String,
    /// loading, waiting, preparing or computing; `None` if it has not said.
    pub activity: Option<&'static str>,
    /// Leases it holds.
    pub leases: u32,
    /// Evaluations it has reported.
    pub evaluations: u64,
    /// Its rate.
    pub evaluations_per_second: f64,
}

impl From<v1::StatusReply> for JobStatus {
    fn from(reply: v1::StatusReply) -> Self {
        let worker = |w: v1::WorkerStatus| Worker {
            activity: Option::from(w.activity()).map(Activity::name),
            worker: w.worker,
            host: w.host,
            device: w.device,
            leases: w.leases,
            evaluations: w.evaluations,
            evaluations_per_second: w.evaluations_per_second,
        };
        Self {
            state: reply.state,
            shards: Shards { done: reply.shards_done, active: reply.shards_active, pending: reply.shards_pending },
            samples_done: reply.samples_done,
            samples: reply.samples,
            samples_quarantined: reply.samples_quarantined,
            evaluations: reply.evaluations,
            evaluations_per_second: reply.evaluations_per_second,
            eta_seconds: reply.eta_seconds,
            stalled: Some(reply.stalled).filter(|sentence| !sentence.is_empty()),
            workers: reply.workers.into_iter().map(worker).collect(),
        }
    }
}

/// The watchdog's observation of a job.
pub(crate) fn observe(progress: &Progress, now: Duration, storage: Option<(String, Duration)>) -> Observation {
    let seen = |worker: &WorkerView| {
        let WorkerView { activity, quiet, leases, rate, .. } = *worker;
        WorkerSeen { worker: worker.worker.clone(), activity, quiet, leases, rate }
    };
    Observation {
        now,
        merged: progress.evaluations,
        unreported: progress.unreported,
        committed: progress.shards_done,
        storage,
        workers: progress.workers.iter().map(seen).collect(),
    }
}

/// What a coordinator is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Working on its job.
    Working,
    /// Stopping: no more leases are granted.
    Stopping,
    /// Preparing the next job.
    Followed,
}

/// A job's progress as a message of the contract.
pub(crate) fn reply(progress: &Progress, phase: Phase) -> v1::StatusReply {
    let state = match (phase, progress.done, progress.workers.is_empty()) {
        // A script that waits until all is done must not mistake the end of a pilot for it.
        (Phase::Followed, _, _) => "starting",
        (_, true, _) => "done",
        (Phase::Stopping, false, _) => "stopping",
        (Phase::Working, false, true) => "waiting for workers",
        (Phase::Working, false, false) => "running",
    };
    let workers = progress.workers.iter().map(|w| v1::WorkerStatus {
        worker: w.worker.clone(),
        host: w.host.clone(),
        device: w.device.clone(),
        leases: w.leases,
        evaluations: w.evaluations,
        evaluations_per_second: w.rate,
        activity: v1::Activity::from(w.activity).into(),
    });
    v1::StatusReply {
        state: state.into(),
        shards_done: progress.shards_done,
        shards_active: progress.shards_active,
        shards_pending: progress.shards_pending,
        samples: progress.samples,
        samples_done: progress.samples_done,
        samples_quarantined: progress.samples_quarantined,
        evaluations: progress.evaluations,
        evaluations_per_second: progress.rate.unwrap_or(0.0),
        eta_seconds: progress.eta().map(|eta| eta.as_secs_f64()),
        workers: workers.collect(),
        stalled: progress.stalled.clone().unwrap_or_default(),
    }
}

/// An HTML page with the progress of the job called `job`.
pub(crate) fn page(job: &str, epoch: u64, progress: &Progress, status: &JobStatus) -> String {
    let share = 100.0 * progress.share();
    let Shards { done, active, pending } = status.shards;
    let total = progress.evaluations_total.map_or("?".into(), |total| total.to_string());
    let facts = [
        ("images", format!("{} of {}", status.samples_done, status.samples)),
        ("quarantined", status.samples_quarantined.to_string()),
        ("shards", format!("{done} done, {active} active, {pending} pending")),
        ("evaluations", format!("{} of {total}", status.evaluations)),
        ("rate", format!("{:.1} evaluations/s", status.evaluations_per_second)),
        ("coordinator", format!("epoch {epoch}, elbo {}", env!("CARGO_PKG_VERSION"))),
    ];
    // Workers choose their own names, which are escaped like all text.
    let body = html! {
        h1 { "elbo: job " (job) " is " (status.state) }
        progress max="100" value=(format!("{share:.2}")) {}
        p { (format!("{share:.1}%")) @if let Some(eta) = progress.eta() { ", " (duration(eta)) " left" } }
        @if let Some(stalled) = &status.stalled { p.stalled { (stalled) } }
        table {
            @for (name, value) in facts { tr { th { (name) } td { (value) } } }
        }
        h1 { "workers" }
        table {
            tr {
                th { "worker" } th { "host" } th { "device" } th { "activity" }
                th.number { "leases" } th.number { "evaluations" } th.number { "per second" }
            }
            @for worker in &status.workers {
                tr {
                    td { (worker.worker) } td { (worker.host) } td { (worker.device) }
                    td { (worker.activity.unwrap_or("-")) }
                    td.number { (worker.leases) } td.number { (worker.evaluations) }
                    td.number { (format!("{:.1}", worker.evaluations_per_second)) }
                }
            }
        }
    };
    document(&format!("{share:.0}% elbo {job}"), body)
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_of_several_jobs_is_reported_as_done() {
        let state = |done, phase| reply(&Progress { done, ..Progress::default() }, phase).state;
        assert_eq!(state(false, Phase::Working), "waiting for workers");
        assert_eq!(state(false, Phase::Stopping), "stopping");
        assert_eq!(state(true, Phase::Stopping), "done");
        assert_eq!(state(true, Phase::Followed), "starting");
    }

    #[test]
    fn the_page_escapes_the_names_of_workers() {
        let evil = "<script>alert('1')</script>";
        let progress = Progress { evaluations_total: Some(200), evaluations: 50, ..Progress::default() };
        let mut status = JobStatus::from(reply(&progress, Phase::Working));
        status.stalled = Some("a & b".into());
        status.workers.push(Worker {
            worker: evil.into(),
            host: evil.into(),
            device: "\"><img src=x>".into(),
            activity: None,
            leases: 1,
            evaluations: 0,
            evaluations_per_second: 0.0,
        });
        let page = page("abc", 3, &progress, &status);
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
        assert!(page.contains("&lt;script&gt;alert('1')&lt;/script&gt;") && page.contains("a &amp; b"));
        assert!(page.contains("25.0%") && page.contains("epoch 3"));
    }
}
