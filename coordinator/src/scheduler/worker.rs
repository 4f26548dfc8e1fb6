//! The workers the coordinator knows, and the leases each of them holds.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use elbo_core::activity::Activity;
use elbo_core::ids::LeaseKey;

use super::{SampleFailure, Scheduler, Shard};

/// A worker's sign of life.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat {
    /// Evaluations it has finished and not reported.
    pub unreported: u64,
    /// The leases it is at.
    pub held: Vec<LeaseKey>,
    /// What it is at, where it has said.
    pub activity: Option<Activity>,
    /// For how long nothing has come of that.
    pub quiet: Duration,
}

/// A worker the coordinator knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Worker {
    host: String,
    device: String,
    /// What the engines of its process have in common; empty where it is one of its own.
    process: String,
    last_seen: Duration,
    /// When it last asked for work, or else joined.
    pub(super) asked: Duration,
    /// When it last reported something, or got something to do.
    pub(super) progress: Duration,
    pub(super) rate: f64,
    evaluations: u64,
    unreported: u64,
    activity: Option<Activity>,
    quiet: Duration,
    pub(super) leases: BTreeSet<LeaseKey>,
}

/// All of them, with the sum of their rates.
#[derive(Debug, Default)]
pub(super) struct Workers {
    known: HashMap<String, Worker>,
    rate: f64,
}

/// More than any worker evaluates in a second, so that the sum of rates stays finite.
const HIGHEST_RATE: f64 = 1e12;

impl Workers {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Evaluations per second of all workers together.
    pub(super) fn rate(&self) -> f64 {
        self.rate.max(0.0)
    }

    /// Notes that a worker is alive; `false` where it is not known.
    pub(super) fn seen(&mut self, worker: &str, now: Duration) -> bool {
        self.known.get_mut(worker).map(|known| known.last_seen = now).is_some()
    }

    /// Notes that a worker asks for work; `false` where it is not known.
    pub(super) fn asks(&mut self, worker: &str, now: Duration) -> bool {
        self.known.get_mut(worker).map(|known| known.asked = now).is_some() && self.seen(worker, now)
    }

    /// The process a worker is an engine of.
    pub(super) fn process<'a>(&'a self, worker: &'a str) -> &'a str {
        self.known.get(worker).map(|known| known.process.as_str()).filter(|p| !p.is_empty()).unwrap_or(worker)
    }

    /// Notes the rate a worker says it has, and gives it as it is taken: 0, which is unknown, where it can't be one.
    pub(super) fn set_rate(&mut self, worker: &str, told: f64) -> f64 {
        let rate = if told.is_finite() { told.clamp(0.0, HIGHEST_RATE) } else { 0.0 };
        if let Some(known) = self.known.get_mut(worker) {
            self.rate += rate - std::mem::replace(&mut known.rate, rate);
        }
        rate
    }

    /// Notes what a worker has reported.
    pub(super) fn credit(&mut self, worker: &str, evaluations: u64) {
        if let Some(known) = self.known.get_mut(worker) {
            known.evaluations += evaluations;
            // A report is a sign of life: this is now.
            known.progress = known.last_seen;
        }
    }

    pub(super) fn add_lease(&mut self, worker: &str, lease: LeaseKey, now: Duration) {
        if let Some(known) = self.known.get_mut(worker) {
            if known.leases.is_empty() {
                known.progress = now;
            }
            known.leases.insert(lease);
        }
    }

    pub(super) fn remove_lease(&mut self, worker: &str, lease: LeaseKey) {
        if let Some(known) = self.known.get_mut(worker) {
            known.leases.remove(&lease);
        }
    }

    /// The leases a worker holds.
    pub(super) fn leases(&self, worker: &str) -> impl Iterator<Item = LeaseKey> + '_ {
        self.known.get(worker).into_iter().flat_map(|known| known.leases.iter().copied())
    }

    /// All workers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Worker)> {
        self.known.iter()
    }
}

impl Scheduler {
    /// A worker introduces itself, or does so again.
    pub fn join(&mut self, worker: &str, host: &str, device: &str, now: Duration) {
        let new = || Worker { asked: now, ..Worker::default() };
        let known = self.workers.known.entry(worker.to_owned()).or_insert_with(new);
        known.host = host.to_owned();
        known.device = device.to_owned();
        known.last_seen = now;
    }

    /// A worker is an engine of a process, whose engines see the same storage.
    pub fn is_of(&mut self, worker: &str, process: &str) {
        if let Some(known) = self.workers.known.get_mut(worker) {
            process.clone_into(&mut known.process);
        }
    }

    /// Notes that a worker is alive. Of the leases it is at, those nobody needs any more; `None` when it must join (again).
    pub fn heartbeat(&mut self, worker: &str, beat: Heartbeat, now: Duration) -> Option<Vec<LeaseKey>> {
        let known = self.workers.known.get_mut(worker)?;
        known.last_seen = now;
        (known.unreported, known.activity, known.quiet) = (beat.unreported, beat.activity, beat.quiet);
        Some(self.unwanted(&beat.held))
    }

    /// Whether a worker has joined and not been given up.
    pub fn knows(&self, worker: &str) -> bool {
        self.workers.known.contains_key(worker)
    }

    /// Whether a lease is out to that worker.
    pub fn holds(&self, worker: &str, key: LeaseKey) -> bool {
        self.workers.known.get(worker).is_some_and(|known| known.leases.contains(&key))
    }

    /// Whether no worker is there.
    pub fn is_alone(&self) -> bool {
        self.workers.known.is_empty()
    }

    /// Gives up workers that gave no sign of life for the lease time, and takes their leases back: the workers, and the samples
    /// that too many died of. To be called several times in the lease time: after a longer gap it was the coordinator that stood
    /// still, and could not hear them.
    pub fn expire(&mut self, now: Duration) -> (Vec<String>, Vec<SampleFailure>) {
        let time_to_live = self.policy.time_to_live;
        self.now = self.now.max(now);
        if now.saturating_sub(std::mem::replace(&mut self.listened, now)) > time_to_live / 2 {
            self.workers.known.values_mut().for_each(|worker| worker.last_seen = now);
        }
        let is_silent = |known: &Worker| now.saturating_sub(known.last_seen) > time_to_live;
        let known = self.workers.known.iter();
        let mut silent: Vec<String> = known.filter(|(_, w)| is_silent(w)).map(|(name, _)| name.clone()).collect();
        silent.sort_unstable();
        let mut given_up = Vec::new();
        for worker in &silent {
            let leases: Vec<_> = self.workers.leases(worker).collect();
            leases.into_iter().for_each(|key| given_up.extend(self.lose(key)));
            self.forget(worker);
        }
        (silent, given_up)
    }

    /// A worker takes its leave: its leases go to others.
    pub fn leave(&mut self, worker: &str) {
        let leases: Vec<_> = self.workers.leases(worker).collect();
        self.release(worker, &leases);
        self.forget(worker);
    }

    fn forget(&mut self, worker: &str) {
        self.workers.set_rate(worker, 0.0);
        self.workers.known.remove(worker);
        if self.workers.known.is_empty() {
            // What rounding has left.
            self.workers.rate = 0.0;
        }
        self.open.values_mut().for_each(|shard: &mut Shard| shard.forget(worker));
    }

    /// What is known of each worker, for people; sorted by name.
    pub fn workers(&self) -> Vec<WorkerView> {
        let view = |(name, w): (&String, &Worker)| WorkerView {
            worker: name.clone(),
            host: w.host.clone(),
            device: w.device.clone(),
            leases: w.leases.len() as u32,
            evaluations: w.evaluations,
            unreported: w.unreported,
            rate: w.rate,
            activity: w.activity,
            quiet: w.quiet,
        };
        let mut views: Vec<_> = self.workers.known.iter().map(view).collect();
        views.sort_by(|a, b| a.worker.cmp(&b.worker));
        views
    }
}

/// A worker as people see it.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Its name.
    pub worker: String,
    /// Its host.
    pub host: String,
    /// Its device.
    pub device: String,
    /// Leases it holds.
    pub leases: u32,
    /// Evaluations it reported.
    pub evaluations: u64,
    /// Evaluations it has finished and not reported yet.
    pub unreported: u64,
    /// Its measured rate in evaluations per second.
    pub rate: f64,
    /// What it is at, where it has said.
    pub activity: Option<Activity>,
    /// For how long nothing has come of that.
    pub quiet: Duration,
}
