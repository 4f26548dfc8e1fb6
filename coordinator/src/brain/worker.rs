//! The workers the coordinator knows, and the leases each of them holds.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use elbo_common::ids::LeaseId;

use super::{Brain, Shard};

/// A worker the coordinator knows.
#[derive(Clone, Debug, Default)]
struct Worker {
    host: String,
    device: String,
    last_seen: Duration,
    rate: f64,
    evaluations: u64,
    unreported: u64,
    leases: BTreeSet<LeaseId>,
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

    /// Notes the rate a worker says it has.
    pub(super) fn set_rate(&mut self, worker: &str, rate: f64) {
        if let Some(known) = self.known.get_mut(worker) {
            let rate = if rate.is_finite() { rate.clamp(0.0, HIGHEST_RATE) } else { 0.0 };
            self.rate += rate - std::mem::replace(&mut known.rate, rate);
        }
    }

    /// Notes what a worker has reported.
    pub(super) fn credit(&mut self, worker: &str, evaluations: u64) {
        if let Some(known) = self.known.get_mut(worker) {
            known.evaluations += evaluations;
        }
    }

    pub(super) fn add_lease(&mut self, worker: &str, lease: LeaseId) {
        if let Some(known) = self.known.get_mut(worker) {
            known.leases.insert(lease);
        }
    }

    pub(super) fn remove_lease(&mut self, worker: &str, lease: LeaseId) {
        if let Some(known) = self.known.get_mut(worker) {
            known.leases.remove(&lease);
        }
    }

    /// The leases a worker holds.
    pub(super) fn leases(&self, worker: &str) -> impl Iterator<Item = LeaseId> + '_ {
        self.known.get(worker).into_iter().flat_map(|known| known.leases.iter().copied())
    }
}

impl Brain {
    /// A worker introduces itself, or does so again.
    pub fn join(&mut self, worker: &str, host: &str, device: &str, now: Duration) {
        let known = self.workers.known.entry(worker.to_owned()).or_default();
        known.host = host.to_owned();
        known.device = device.to_owned();
        known.last_seen = now;
    }

    /// Notes that a worker is alive; `false` when it must join (again).
    pub fn heartbeat(&mut self, worker: &str, unreported: u64, now: Duration) -> bool {
        if let Some(known) = self.workers.known.get_mut(worker) {
            known.unreported = unreported;
        }
        self.workers.seen(worker, now)
    }

    /// Whether a worker has joined and not been given up.
    pub fn knows(&self, worker: &str) -> bool {
        self.workers.known.contains_key(worker)
    }

    /// Whether a lease is out to that worker.
    pub fn holds(&self, worker: &str, lease: LeaseId) -> bool {
        self.workers.known.get(worker).is_some_and(|known| known.leases.contains(&lease))
    }

    /// Whether no worker is there.
    pub fn is_alone(&self) -> bool {
        self.workers.known.is_empty()
    }

    /// Forgets workers that gave no sign of life for the lease time, and takes their leases back.
    pub fn expire(&mut self, now: Duration) -> Vec<String> {
        let time_to_live = self.policy.time_to_live;
        let is_silent = |known: &Worker| now.saturating_sub(known.last_seen) > time_to_live;
        let known = self.workers.known.iter();
        let silent: Vec<String> = known.filter(|(_, w)| is_silent(w)).map(|(name, _)| name.clone()).collect();
        silent.iter().for_each(|worker| self.leave(worker));
        silent
    }

    /// A worker is gone: its leases go to others.
    pub fn leave(&mut self, worker: &str) {
        self.workers.set_rate(worker, 0.0);
        let Some(gone) = self.workers.known.remove(worker) else { return };
        if self.workers.known.is_empty() {
            // What rounding has left.
            self.workers.rate = 0.0;
        }
        self.release(&gone.leases.into_iter().collect::<Vec<_>>());
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
}
