//! Backup leases: if nothing is ready, an idle worker also computes the units that would finish last. The first result
//! counts (MapReduce, Dean & Ghemawat 2004, section 3.6; there whole tasks, here the units at the end of a block, since the
//! block's own worker starts at the beginning).

use std::time::Duration;

use elbo_core::ids::LeaseKey;
use elbo_core::unit::UnitId;

use super::Scheduler;
use super::failure::Blame;

/// A backup must be expected to save more than this many seconds, or it is waste.
const WORTHWHILE: f64 = 1.0;

/// How long any worker may be quiet while it reads images and reports, as a share of the time after which it is given up.
const SLACK: f64 = 1.0 / 6.0;

/// A lease in progress, and its expected speed.
#[derive(Clone, Copy, Debug)]
struct Running {
    key: LeaseKey,
    /// Evaluations until it is finished, including those of the worker's earlier leases.
    ahead: f64,
    /// Evaluations per second of its worker. Infinite if its rate is unknown; 0 if it has made no progress for twice as
    /// long as all its leases should take.
    rate: f64,
}

impl Running {
    /// Seconds until it is finished.
    fn seconds(&self) -> f64 {
        self.ahead / self.rate
    }

    /// Seconds until it is finished if another worker does its last `taken` evaluations at the rate `own`.
    fn seconds_with(&self, taken: f64, own: f64) -> f64 {
        let rest = self.ahead - taken;
        let theirs = if rest > 0.0 { rest / self.rate } else { 0.0 };
        theirs.max(taken / own)
    }
}

impl Scheduler {
    /// Units of the lease that will finish last, as many as `worker` can finish by the time the other worker has done the
    /// rest, and their blame. `None` if that would save no time.
    pub(super) fn take_backup(&mut self, worker: &str, rate: f64, now: Duration) -> Option<(Vec<UnitId>, Blame)> {
        if self.wants_shard().is_some() {
            // There is work that no worker has begun.
            return None;
        }
        let mut running = self.running(worker, rate, now);
        running.sort_by(|a, b| b.seconds().total_cmp(&a.seconds()).then(a.key.cmp(&b.key)));
        let busy = self.workers.leases(worker).next().is_some();
        running.into_iter().find_map(|lease| self.backup_of(lease, rate, busy))
    }

    /// The leases of all workers except `but`.
    fn running(&self, but: &str, rate: f64, now: Duration) -> Vec<Running> {
        let mut running = Vec::new();
        for (_, worker) in self.workers.iter().filter(|(name, _)| *name != but) {
            // Assume that a worker of unknown rate is as fast as the one that asks.
            let known = [worker.rate, rate].into_iter().find(|rate| *rate > 0.0).unwrap_or(f64::INFINITY);
            let evaluations = |key: &LeaseKey| self.leases.get(key).map_or(0.0, |lease| lease.evaluations as f64);
            let quiet = now.saturating_sub(worker.progress);
            let all: f64 = worker.leases.iter().map(evaluations).sum();
            // With nothing else to do, do not wait until the leases of a dead worker expire.
            let time_to_live = self.policy.time_to_live.as_secs_f64();
            let slack = if known.is_finite() { SLACK * time_to_live } else { time_to_live };
            let stuck = quiet.as_secs_f64() > slack + 2.0 * all / known;
            let mut ahead = 0.0;
            for key in &worker.leases {
                ahead += evaluations(key);
                running.push(Running { key: *key, ahead, rate: if stuck { 0.0 } else { known } });
            }
        }
        running
    }

    fn backup_of(&self, lease: Running, rate: f64, busy: bool) -> Option<(Vec<UnitId>, Blame)> {
        let held = self.leases.get(&lease.key)?;
        // Suspected units stay with one worker, so that the cause of a failure is clear, unless that worker is stuck. Units
        // that may be deadly do not go to a worker that has something else in hand.
        let suspicious = held.blame != Blame::default() && lease.rate > 0.0;
        if lease.rate.is_infinite() || suspicious || (held.blame.deadly && busy) {
            return None;
        }
        let own = if rate > 0.0 { rate } else { lease.rate.max(1.0) };
        // Both end at the same time if each does a share in proportion to its rate.
        let share = lease.ahead * own / (own + lease.rate);
        let (mut units, mut evaluations) = (Vec::new(), 0.0);
        let shard = self.open.get(&self.shard_of(held.units.first()?.sample))?;
        for unit in held.units.iter().rev().filter(|unit| shard.is_held_by(**unit, lease.key)) {
            let cost = shard.unit_evaluations(*unit) as f64;
            if !units.is_empty() && evaluations + cost > share {
                break;
            }
            evaluations += cost;
            units.push(*unit);
        }
        units.sort_unstable();
        let worthwhile = lease.seconds() - lease.seconds_with(evaluations, own) >= WORTHWHILE;
        (!units.is_empty() && worthwhile).then_some((units, held.blame))
    }
}
