//! The workers the coordinator knows, and their leases.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use elbo_core::activity::Activity;
use elbo_core::failure::SampleFailure;
use elbo_core::ids::LeaseKey;

use super::{Scheduler, Shard};

/// A worker's heartbeat.
#[derive(Clone, Debug, Default)]
pub struct Heartbeat {
    /// Evaluations it has finished but not reported.
    pub unreported: u64,
    /// The leases it is working on.
    pub held: Vec<LeaseKey>,
    /// What it is doing, if it has said so.
    pub activity: Option<Activity>,
    /// How long it has made no progress at that.
    pub quiet: Duration,
}

/// A worker the coordinator knows.
#[derive(Clone, Debug, Default)]
pub(super) struct Worker {
    host: String,
    device: String,
    /// The name of its process, shared by all its engines; empty if the worker is a process of its own.
    process: String,
    /// What computes; empty if it did not say.
    hardware: String,
    last_seen: Duration,
    /// When it last asked for work, or joined if it never did.
    pub(super) asked: Duration,
    /// When it last reported something, or got new work.
    pub(super) progress: Duration,
    pub(super) rate: f64,
    evaluations: u64,
    unreported: u64,
    activity: Option<Activity>,
    quiet: Duration,
    pub(super) leases: BTreeSet<LeaseKey>,
}

/// All workers, with the sum of their rates.
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

    /// Notes that a worker is alive; `false` if it is unknown.
    pub(super) fn seen(&mut self, worker: &str, now: Duration) -> bool {
        self.known.get_mut(worker).map(|known| known.last_seen = now).is_some()
    }

    /// Notes that a worker asks for work; `false` if it is unknown.
    pub(super) fn asks(&mut self, worker: &str, now: Duration) -> bool {
        self.known.get_mut(worker).map(|known| known.asked = now).is_some() && self.seen(worker, now)
    }

    /// The process that a worker belongs to.
    pub(super) fn process<'a>(&'a self, worker: &'a str) -> &'a str {
        self.known.get(worker).map(|known| known.process.as_str()).filter(|p| !p.is_empty()).unwrap_or(worker)
    }

    /// Notes the rate that a worker claims, and returns the rate in use: 0, which means unknown, if the claim is not a
    /// valid rate.
    pub(super) fn set_rate(&mut self, worker: &str, told: f64) -> f64 {
        let rate = if told.is_finite() { told.clamp(0.0, HIGHEST_RATE) } else { 0.0 };
        if let Some(known) = self.known.get_mut(worker) {
            self.rate += rate - std::mem::replace(&mut known.rate, rate);
        }
        rate
    }

    /// Adds to the evaluations that a worker has reported.
    pub(super) fn credit(&mut self, worker: &str, evaluations: u64) {
        if let Some(known) = self.known.get_mut(worker) {
            known.evaluations += evaluations;
            // The report has just updated `last_seen`.
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
    /// Adds a worker that joins, or updates one that joins again.
    pub fn join(&mut self, worker: &str, host: &str, device: &str, now: Duration) {
        let new = || Worker { asked: now, ..Worker::default() };
        let known = self.workers.known.entry(worker.to_owned()).or_insert_with(new);
        known.host = host.to_owned();
        known.device = device.to_owned();
        known.last_seen = now;
    }

    /// Sets what a worker computes with.
    pub fn computes_with(&mut self, worker: &str, hardware: &str) {
        if let Some(known) = self.workers.known.get_mut(worker) {
            hardware.clone_into(&mut known.hardware);
        }
    }

    /// What a worker computes with, if it said so.
    pub fn hardware(&self, worker: &str) -> Option<&str> {
        self.workers.known.get(worker).map(|known| known.hardware.as_str()).filter(|hardware| !hardware.is_empty())
    }

    /// Sets the process of a worker. All engines of a process see the same storage.
    pub fn is_of(&mut self, worker: &str, process: &str) {
        if let Some(known) = self.workers.known.get_mut(worker) {
            process.clone_into(&mut known.process);
        }
    }

    /// Notes that a worker is alive. Returns those of its leases that are no longer needed; `None` if it must join (again).
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

    /// Whether the worker holds this lease.
    pub fn holds(&self, worker: &str, key: LeaseKey) -> bool {
        self.workers.known.get(worker).is_some_and(|known| known.leases.contains(&key))
    }

    /// Whether there are no workers.
    pub fn is_alone(&self) -> bool {
        self.workers.known.is_empty()
    }

    /// Gives up workers that were silent for the lease time, and takes their leases back. Returns these workers, and the
    /// samples to give up because too many workers died on them. Call this several times per lease time: after a longer
    /// gap, the coordinator itself stood still and could not hear its workers.
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

    /// Removes a worker that leaves; its leases go to others.
    pub fn leave(&mut self, worker: &str) {
        let leases: Vec<_> = self.workers.leases(worker).collect();
        self.release(worker, &leases);
        self.forget(worker);
    }

    fn forget(&mut self, worker: &str) {
        self.workers.set_rate(worker, 0.0);
        self.workers.known.remove(worker);
        if self.workers.known.is_empty() {
            // Clears rounding errors.
            self.workers.rate = 0.0;
        }
        self.open.values_mut().for_each(|shard: &mut Shard| shard.forget(worker));
    }

    /// A view of each worker for people, sorted by name.
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

/// A view of a worker for people.
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
    /// Evaluations it has finished but not reported yet.
    pub unreported: u64,
    /// Its measured rate in evaluations per second.
    pub rate: f64,
    /// What it is doing, if it has said so.
    pub activity: Option<Activity>,
    /// How long it has made no progress at that.
    pub quiet: Duration,
}
