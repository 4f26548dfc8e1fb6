//! How a job is, as `elbo status`, the HTTP side and scripts see it.

use std::fmt::Write;
use std::time::Duration;

use elbo_core::activity::Activity;
use elbo_net::http::{document, escape};
use elbo_proto::v1;
use serde::Serialize;

use crate::progress::Progress;
use crate::scheduler::WorkerView;
use crate::watchdog::{Observation, Seen};

/// The JSON object of `elbo status --json` and `/status`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobStatus {
    /// starting, waiting for workers, running, stopping, done; or unfinished, of an output whose job nobody works on.
    pub state: String,
    /// The shards.
    pub shards: Shards,
    /// Samples that have ended, quarantined ones included.
    pub samples_done: u64,
    /// Samples in all.
    pub samples: u64,
    /// Samples given up.
    pub samples_quarantined: u64,
    /// Evaluations merged.
    pub evaluations: u64,
    /// Evaluations a second.
    pub evaluations_per_second: f64,
    /// The time left.
    pub eta_seconds: Option<f64>,
    /// Which part holds the job up, in a sentence; `None` while it gets on.
    pub stalled: Option<String>,
    /// The workers that are there.
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
    /// loading, waiting, preparing or computing; `None` where it has not said.
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

/// What the watchdog sees of a job.
pub(crate) fn observe(progress: &Progress, now: Duration, storage: Option<(String, Duration)>) -> Observation {
    let seen = |worker: &WorkerView| {
        let WorkerView { activity, quiet, leases, rate, .. } = *worker;
        Seen { worker: worker.worker.clone(), activity, quiet, leases, rate }
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

/// What a coordinator is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its job.
    Working,
    /// Its end: no more leases are given.
    Stopping,
    /// The job that follows, which is being prepared.
    Followed,
}

/// A job's progress as the contract has it.
pub(crate) fn reply(progress: &Progress, phase: Phase) -> v1::StatusReply {
    let state = match (phase, progress.done, progress.workers.is_empty()) {
        // A script that waits until all is done must not take a pilot's end for it.
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

/// A page for people: how far the job called `job` is.
pub(crate) fn page(job: &str, epoch: u64, progress: &Progress, status: &JobStatus) -> String {
    let mut body = format!("<h1>elbo: job {} is {}</h1>", escape(job), escape(&status.state));
    let share = 100.0 * progress.share();
    let left = progress.eta().map(|eta| format!(", {} left", duration(eta))).unwrap_or_default();
    // Writing to a string does not fail.
    let _ = write!(body, "<progress max=\"100\" value=\"{share:.2}\"></progress><p>{share:.1}%{left}</p>");
    if let Some(stalled) = &status.stalled {
        let _ = write!(body, "<p class=\"stalled\">{}</p>", escape(stalled));
    }
    let Shards { done, active, pending } = status.shards;
    body.push_str("<table>");
    for (name, value) in [
        ("images", format!("{} of {}", status.samples_done, status.samples)),
        ("quarantined", status.samples_quarantined.to_string()),
        ("shards", format!("{done} done, {active} active, {pending} pending")),
        (
            "evaluations",
            format!("{} of {}", status.evaluations, progress.evaluations_total.map_or("?".into(), |n| n.to_string())),
        ),
        ("rate", format!("{:.1} evaluations/s", status.evaluations_per_second)),
        ("coordinator", format!("epoch {epoch}, elbo {}", env!("CARGO_PKG_VERSION"))),
    ] {
        let _ = write!(body, "<tr><th>{name}<td>{}", escape(&value));
    }
    body.push_str("</table><h1>workers</h1><table><tr><th>worker<th>host<th>device<th>activity");
    body.push_str("<th class=\"number\">leases<th class=\"number\">evaluations<th class=\"number\">per second");
    for worker in &status.workers {
        let _ = write!(
            body,
            "<tr><td>{}<td>{}<td>{}<td>{}<td class=\"number\">{}<td class=\"number\">{}<td class=\"number\">{:.1}",
            escape(&worker.worker),
            escape(&worker.host),
            escape(&worker.device),
            worker.activity.unwrap_or("-"),
            worker.leases,
            worker.evaluations,
            worker.evaluations_per_second
        );
    }
    body.push_str("</table>");
    document(&format!("{share:.0}% elbo {job}"), &body)
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
    fn only_the_last_of_the_jobs_that_follow_each_other_is_done() {
        let state = |done, phase| reply(&Progress { done, ..Progress::default() }, phase).state;
        assert_eq!(state(false, Phase::Working), "waiting for workers");
        assert_eq!(state(false, Phase::Stopping), "stopping");
        assert_eq!(state(true, Phase::Stopping), "done");
        assert_eq!(state(true, Phase::Followed), "starting");
    }

    #[test]
    fn the_page_shows_what_workers_call_themselves_as_text() {
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
        assert!(page.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;") && page.contains("a &amp; b"));
        assert!(page.contains("25.0%") && page.contains("epoch 3"));
    }
}
