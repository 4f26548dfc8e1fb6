//! What this process has done as a worker, in counters that Prometheus reads.
//!
//! There is one set for the process, as there is one process for an operator to look at; embedded workers add up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use elbo_proto::v1;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::client::CallError;

type Labelled<M> = Family<[(&'static str, &'static str); 1], M>;

/// The counters of a worker process.
#[derive(Debug)]
pub struct Metrics {
    pub(crate) registry: Registry,
    /// Evaluations computed.
    pub(crate) evaluations: Counter,
    pub(crate) acknowledged: Counter,
    batches: Counter,
    pub(crate) unreported: Gauge,
    /// Images read.
    pub(crate) images_read: Counter,
    /// Samples given up, by stage.
    bad: Labelled<Counter>,
    reports: Labelled<Counter>,
    /// Calls that were not answered and tried again.
    pub(crate) retries: Counter,
    pub(crate) leases: Gauge,
    activity: Labelled<Gauge>,
    quiet: Gauge,
    joined: AtomicBool,
    /// It has asked for work, and so has loaded its model.
    loaded: AtomicBool,
    /// The worker's name and its job's.
    names: Mutex<(String, String)>,
}

/// Those of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

/// What a worker can be at, as it is called.
pub(crate) fn name(activity: v1::Activity) -> &'static str {
    match activity {
        v1::Activity::Unspecified => "unknown",
        v1::Activity::Loading => "loading",
        v1::Activity::Waiting => "waiting",
        v1::Activity::Preparing => "preparing",
        v1::Activity::Computing => "computing",
    }
}

/// The stages samples are given up at, of which a label may be made.
const STAGES: [&str; 4] = ["read", "decode", "preprocess", "encode"];

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("elbo_worker");
        let this = Self {
            registry: Registry::default(),
            evaluations: Counter::default(),
            acknowledged: Counter::default(),
            batches: Counter::default(),
            unreported: Gauge::default(),
            images_read: Counter::default(),
            bad: Labelled::default(),
            reports: Labelled::default(),
            retries: Counter::default(),
            leases: Gauge::default(),
            activity: Labelled::default(),
            quiet: Gauge::default(),
            joined: AtomicBool::new(false),
            loaded: AtomicBool::new(false),
            names: Mutex::default(),
        };
        registry.register("evaluations", "Evaluations computed", this.evaluations.clone());
        registry.register("evaluations_acknowledged", "Evaluations reported and durable", this.acknowledged.clone());
        registry.register("batches", "Batches computed", this.batches.clone());
        registry.register("unreported", "Evaluations computed and not reported yet", this.unreported.clone());
        registry.register("images_read", "Images read", this.images_read.clone());
        registry.register("samples_failed", "Samples given up: read, decode, preprocess, encode", this.bad.clone());
        registry.register("reports", "Reports: acknowledged or refused", this.reports.clone());
        registry.register("retries", "Calls that were not answered and tried again", this.retries.clone());
        registry.register("leases", "Leases it works on, as of the last heartbeat", this.leases.clone());
        registry.register("activity", "1 for what it was at by the last heartbeat", this.activity.clone());
        registry.register("quiet_milliseconds", "How long nothing has come of that", this.quiet.clone());
        Self { registry, ..this }
    }

    /// A batch is computed.
    pub(crate) fn computed(&self, evaluations: u64) {
        self.batches.inc();
        self.evaluations.inc_by(evaluations);
    }

    pub(crate) fn joined(&self, worker: &str, job: &str) {
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = (worker.to_owned(), job.to_owned());
        self.joined.store(true, Ordering::Relaxed);
    }

    pub(crate) fn asks_for_work(&self) {
        self.loaded.store(true, Ordering::Relaxed);
    }

    /// It has taken leave, or is not known any more.
    pub(crate) fn left(&self) {
        self.joined.store(false, Ordering::Relaxed);
    }

    /// A report was answered; one that is sent again, after joining, is not yet.
    pub(crate) fn reported(&self, report: &v1::ReportRequest, answer: &Result<v1::ReportReply, CallError>) {
        let outcome = match answer {
            Ok(_) => "acknowledged",
            Err(CallError::Rejected(_)) => "refused",
            Err(_) => return,
        };
        self.reports.get_or_create(&[("outcome", outcome)]).inc();
        if answer.is_err() {
            return;
        }
        let evaluations = report.results.iter().map(|r| u64::from(r.slots) * r.prompts.len() as u64).sum();
        self.acknowledged.inc_by(evaluations);
        for failure in &report.failures {
            if let Some(stage) = STAGES.into_iter().find(|stage| *stage == failure.stage) {
                self.bad.get_or_create(&[("stage", stage)]).inc();
            }
        }
    }

    /// The coordinator is told how it is.
    pub(crate) fn beats(&self, beat: &v1::HeartbeatRequest) {
        let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.unreported.set(count(beat.unreported_evaluations));
        self.leases.set(count(beat.held.len() as u64));
        self.quiet.set(count(beat.quiet_ms));
        self.activity.clear();
        self.activity.get_or_create(&[("activity", name(beat.activity()))]).set(1);
    }

    /// What it was at by the last heartbeat.
    pub(crate) fn activity(&self) -> Option<&'static str> {
        use v1::Activity::{Computing, Loading, Preparing, Waiting};
        let now = |a: &v1::Activity| self.activity.get(&[("activity", name(*a))]).is_some_and(|gauge| gauge.get() == 1);
        [Loading, Waiting, Preparing, Computing].into_iter().find(now).map(name)
    }

    pub(crate) fn has_joined(&self) -> bool {
        self.joined.load(Ordering::Relaxed)
    }

    pub(crate) fn has_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// The worker's name and its job's; empty before it has joined.
    pub(crate) fn names(&self) -> (String, String) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
