//! Counters of this worker process, for Prometheus.
//!
//! There is one set per process, since an operator looks at processes. It adds up the engines.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use elbo_core::activity::Activity;
use elbo_core::failure::FailureStage;
use elbo_proto::v1;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::call_error::CallError;

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
    /// Calls that were not answered and were repeated.
    pub(crate) retries: Counter,
    pub(crate) leases: Gauge,
    activity: Labelled<Gauge>,
    quiet: Gauge,
    /// The engines that have joined, with their last heartbeats.
    engines: Mutex<BTreeMap<String, Beat>>,
    /// Whether it has asked for work, and so has loaded its model.
    loaded: AtomicBool,
    job: Mutex<String>,
}

/// An engine's last heartbeat.
#[derive(Debug, Default)]
struct Beat {
    unreported: u64,
    leases: u64,
    quiet: u64,
    activity: v1::Activity,
}

/// The metrics of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

fn name(activity: v1::Activity) -> &'static str {
    Option::from(activity).map_or("unknown", Activity::name)
}

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
            engines: Mutex::default(),
            loaded: AtomicBool::new(false),
            job: Mutex::default(),
        };
        registry.register("evaluations", "Evaluations computed", this.evaluations.clone());
        registry.register("evaluations_acknowledged", "Evaluations reported and durable", this.acknowledged.clone());
        registry.register("batches", "Batches computed", this.batches.clone());
        registry.register("unreported", "Evaluations computed and not reported yet", this.unreported.clone());
        registry.register("images_read", "Images read", this.images_read.clone());
        registry.register(
            "samples_failed",
            "Samples that failed: read, unread (others may be able to read it), decode, preprocess, encode",
            this.bad.clone(),
        );
        registry.register("reports", "Reports: acknowledged or refused", this.reports.clone());
        registry.register("retries", "Calls that were not answered and were repeated", this.retries.clone());
        registry.register("leases", "Leases it works on, as of the last heartbeat", this.leases.clone());
        registry.register("activity", "Engines by activity, as of their last heartbeat", this.activity.clone());
        registry.register(
            "quiet_milliseconds",
            "How long the quietest engine has made no progress",
            this.quiet.clone(),
        );
        Self { registry, ..this }
    }

    /// Counts a computed batch.
    pub(crate) fn computed(&self, evaluations: u64) {
        self.batches.inc();
        self.evaluations.inc_by(evaluations);
    }

    pub(crate) fn joined(&self, worker: &str, job: &str) {
        self.engines().entry(worker.to_owned()).or_default();
        job.clone_into(&mut self.job.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn engines(&self) -> MutexGuard<'_, BTreeMap<String, Beat>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn asks_for_work(&self) {
        self.loaded.store(true, Ordering::Relaxed);
    }

    /// Removes an engine that has left or is no longer known.
    pub(crate) fn left(&self, worker: &str) {
        self.engines().remove(worker);
    }

    /// Counts an answered report. A report that is sent again after joining is not counted yet.
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
            if let Ok(stage) = failure.stage.parse::<FailureStage>() {
                self.bad.get_or_create(&[("stage", stage.name())]).inc();
            }
        }
    }

    /// Notes an engine's heartbeat.
    pub(crate) fn beats(&self, beat: &v1::HeartbeatRequest) {
        let mut engines = self.engines();
        let Some(engine) = engines.get_mut(&beat.worker) else { return };
        *engine = Beat {
            unreported: beat.unreported_evaluations,
            leases: beat.held.len() as u64,
            quiet: beat.quiet_ms,
            activity: beat.activity(),
        };
        let sum = |of: fn(&Beat) -> u64| {
            let all = engines.values().map(of).fold(0, u64::saturating_add);
            i64::try_from(all).unwrap_or(i64::MAX)
        };
        self.unreported.set(sum(|engine| engine.unreported));
        self.leases.set(sum(|engine| engine.leases));
        let quiet = engines.values().map(|engine| engine.quiet).max().unwrap_or(0);
        self.quiet.set(i64::try_from(quiet).unwrap_or(i64::MAX));
        self.activity.clear();
        for engine in engines.values() {
            self.activity.get_or_create(&[("activity", name(engine.activity))]).inc();
        }
    }

    /// The activity of its busiest engine, as of the last heartbeats.
    pub(crate) fn activity(&self) -> Option<&'static str> {
        self.engines().values().filter_map(|engine| engine.activity.into()).max().map(Activity::name)
    }

    pub(crate) fn has_joined(&self) -> bool {
        !self.engines().is_empty()
    }

    pub(crate) fn has_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// The names of the joined engines and of their job; empty before any has joined.
    pub(crate) fn names(&self) -> (String, String) {
        let engines = self.engines().keys().cloned().collect::<Vec<_>>().join(", ");
        (engines, self.job.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}
