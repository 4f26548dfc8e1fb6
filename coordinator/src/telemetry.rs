//! Counters and timers of a running job, for metrics and the watchdog.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use elbo_net::listen::Door;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::progress::Progress;
use crate::watchdog::{Observation, Part, Stall, StallEvent, Watchdog};

/// A metric with one label that has a few values.
type Labelled<M> = Family<[(&'static str, &'static str); 1], M>;
type Float = Gauge<f64, AtomicU64>;
type Latencies = Family<[(&'static str, &'static str); 1], Histogram, fn() -> Histogram>;

/// All metrics of one coordinator.
#[derive(Debug)]
pub(crate) struct Telemetry {
    registry: Registry,
    gauges: Gauges,
    pub(crate) leases_granted: Counter,
    pub(crate) leases_returned: Labelled<Counter>,
    pub(crate) workers_joined: Counter,
    pub(crate) workers_left: Labelled<Counter>,
    pub(crate) reports: Labelled<Counter>,
    pub(crate) results: Labelled<Counter>,
    pub(crate) unauthorized: Counter,
    storage: Arc<Storage>,
    watchdog: Mutex<Watchdog>,
    /// Whether workers are served.
    pub(crate) serving: AtomicBool,
    /// The connection counters, once there is a listener.
    pub(crate) door: OnceLock<Door>,
}

/// Metrics that are set on each request.
#[derive(Debug, Default)]
struct Gauges {
    shards: Labelled<Gauge>,
    samples: Labelled<Gauge>,
    evaluations: Labelled<Gauge>,
    rate: Float,
    eta: Float,
    workers: Labelled<Gauge>,
    leases: Gauge,
    stalled: Labelled<Gauge>,
    connections: Labelled<Gauge>,
}

/// A job's name and the epoch of its coordinator.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Job {
    job: String,
    epoch: u64,
    version: &'static str,
}

/// A use of the output's storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Making results durable.
    Append,
    /// Reading a shard's samples and its ledger records.
    Open,
    /// Writing a finished shard.
    Commit,
}

impl Use {
    fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Open => "open",
            Self::Commit => "commit",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Append => "making results durable",
            Self::Open => "opening a shard",
            Self::Commit => "committing a shard",
        }
    }
}

/// Uses of the output's storage, timed.
#[derive(Debug)]
struct Storage {
    under_way: Mutex<BTreeMap<u64, (Use, Instant)>>,
    next: AtomicU64,
    seconds: Latencies,
}

/// Buckets from milliseconds on a local disk to minutes when an object store is unavailable.
fn latencies() -> Histogram {
    Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0])
}

impl Storage {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Use, Instant)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A use of the storage that is under way until this is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay {
    storage: Arc<Storage>,
    id: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let ended = self.storage.lock().remove(&self.id);
        if let Some((what, began)) = ended {
            self.storage.seconds.get_or_create(&[("use", what.name())]).observe(began.elapsed().as_secs_f64());
        }
    }
}

impl Telemetry {
    /// The telemetry of a job in an epoch.
    pub(crate) fn new(job: &str, epoch: u64) -> Self {
        let mut registry = Registry::with_prefix("elbo");
        let labels = Job { job: job.to_owned(), epoch, version: env!("CARGO_PKG_VERSION") };
        let info = prometheus_client::metrics::info::Info::new(labels);
        registry.register("job", "The job and its coordinator", info);
        let gauges = Gauges::default();
        let storage = Storage {
            under_way: Mutex::default(),
            next: AtomicU64::new(0),
            seconds: Latencies::new_with_constructor(latencies),
        };
        let this = Self {
            gauges,
            leases_granted: Counter::default(),
            leases_returned: Labelled::default(),
            workers_joined: Counter::default(),
            workers_left: Labelled::default(),
            reports: Labelled::default(),
            results: Labelled::default(),
            unauthorized: Counter::default(),
            storage: Arc::new(storage),
            watchdog: Mutex::default(),
            serving: AtomicBool::new(false),
            door: OnceLock::new(),
            registry: Registry::default(),
        };
        let g = &this.gauges;
        registry.register("shards", "Shards by state: done, active, pending", g.shards.clone());
        registry.register("samples", "Samples by state: total, done, quarantined", g.samples.clone());
        registry.register(
            "evaluations",
            "Evaluations by state: planned in all (0 while unknown), merged, unreported (finished by workers), ready (waiting for a worker)",
            g.evaluations.clone(),
        );
        registry.register("evaluations_per_second", "Evaluations per second over half a minute", g.rate.clone());
        registry.register("eta_seconds", "Time left at the current rate; NaN while unknown", g.eta.clone());
        registry.register("workers", "Workers by activity", g.workers.clone());
        registry.register("leases", "Leases held by workers", g.leases.clone());
        registry.register("stalled", "1 for the part that stalls the job", g.stalled.clone());
        registry.register(
            "connections",
            "Connections by state: open, refused (since the start)",
            g.connections.clone(),
        );
        registry.register("leases_granted", "Leases granted", this.leases_granted.clone());
        registry.register("leases_returned", "Leases handed back: released or failed", this.leases_returned.clone());
        registry.register(
            "workers_joined",
            "Workers that joined, including those that joined again",
            this.workers_joined.clone(),
        );
        registry.register("workers_left", "Workers that left by themselves or fell silent", this.workers_left.clone());
        registry.register(
            "reports",
            "Reports: accepted, early (its shard was not open yet) or refused",
            this.reports.clone(),
        );
        registry.register("results", "Results and failures in reports: accepted or duplicate", this.results.clone());
        registry.register("unauthorized", "Calls without the right token", this.unauthorized.clone());
        registry.register(
            "storage_seconds",
            "How long uses of the output's storage took: append, open, commit",
            this.storage.seconds.clone(),
        );
        Self { registry, ..this }
    }

    /// Notes that the output's storage is being used.
    pub(crate) fn storage(&self, what: Use) -> UnderWay {
        let id = self.storage.next.fetch_add(1, Ordering::Relaxed);
        self.storage.lock().insert(id, (what, Instant::now()));
        UnderWay { storage: Arc::clone(&self.storage), id }
    }

    /// The longest running use of the storage.
    pub(crate) fn slowest(&self) -> Option<(String, Duration)> {
        let under_way = self.storage.lock();
        let (what, began) = under_way.values().min_by_key(|(_, began)| *began)?;
        Some((what.describe().to_owned(), began.elapsed()))
    }

    fn dog(&self) -> MutexGuard<'_, Watchdog> {
        self.watchdog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes an observation of the job to the watchdog.
    pub(crate) fn look(&self, seen: &Observation) -> Option<StallEvent> {
        self.dog().look(seen)
    }

    /// The current stall.
    pub(crate) fn stall(&self) -> Option<Stall> {
        self.dog().stall().cloned()
    }

    /// All metrics as text. `ready` is the number of evaluations that wait for a worker.
    pub(crate) fn encode(&self, progress: &Progress, ready: u64) -> String {
        let g = &self.gauges;
        let set = |family: &Labelled<Gauge>, label, value, count: u64| {
            family.get_or_create(&[(label, value)]).set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        for (state, count) in
            [("done", progress.shards_done), ("active", progress.shards_active), ("pending", progress.shards_pending)]
        {
            set(&g.shards, "state", state, count);
        }
        for (state, count) in [
            ("total", progress.samples),
            ("done", progress.samples_done),
            ("quarantined", progress.samples_quarantined),
        ] {
            set(&g.samples, "state", state, count);
        }
        for (state, count) in [
            ("planned", progress.evaluations_total.unwrap_or(0)),
            ("merged", progress.evaluations),
            ("unreported", progress.unreported),
            ("ready", ready),
        ] {
            set(&g.evaluations, "state", state, count);
        }
        g.rate.set(progress.rate.unwrap_or(0.0));
        g.eta.set(progress.eta().map_or(f64::NAN, |eta| eta.as_secs_f64()));
        g.workers.clear();
        for worker in &progress.workers {
            let activity = worker.activity;
            g.workers.get_or_create(&[("activity", activity.map_or("unknown", |a| a.name()))]).inc();
        }
        let leases: u64 = progress.workers.iter().map(|w| u64::from(w.leases)).sum();
        g.leases.set(i64::try_from(leases).unwrap_or(i64::MAX));
        let stalled = self.stall().map(|stall| stall.part);
        for part in Part::ALL {
            set(&g.stalled, "part", part.name(), u64::from(stalled == Some(part)));
        }
        if let Some(door) = self.door.get() {
            set(&g.connections, "state", "open", door.open());
            set(&g.connections, "state", "refused", door.refused());
        }
        elbo_net::http::encode(&self.registry)
    }
}
