//! Backup leases: when nothing is ready, who has nothing to do computes what would be finished last a second time. The
//! first result counts (MapReduce, Dean & Ghemawat 2004, section 3.6; there whole tasks, here the units at a block's end, since
//! the block's worker comes from its beginning).

use std::time::Duration;

use elbo_core::ids::LeaseKey;
use elbo_core::unit::UnitId;

use super::Scheduler;
use super::failure::Blame;

/// A backup must be expected to bring the end forward by more than this, else it is waste.
const WORTHWHILE: f64 = 1.0;

/// How long a worker may be quiet whatever it does, to read images and to report, as a share of the time after which it is
/// given up.
const SLACK: f64 = 1.0 / 6.0;

/// A lease that is still worked on, and what is expected of it.
#[derive(Clone, Copy, Debug)]
struct Running {
    key: LeaseKey,
    /// Evaluations until it is finished, those of the worker's earlier leases included.
    ahead: f64,
    /// Evaluations per second of its worker: infinite where nothing is known of it, 0 where nothing has come of it for twice as
    /// long as all it holds should take.
    rate: f64,
}

impl Running {
    /// Seconds until it is finished.
    fn seconds(&self) -> f64 {
        self.ahead / self.rate
    }

    /// Seconds until it is finished if its last `taken` evaluations are done by somebody else at a rate of `own`.
    fn seconds_with(&self, taken: f64, own: f64) -> f64 {
        let rest = self.ahead - taken;
        let theirs = if rest > 0.0 { rest / self.rate } else { 0.0 };
        theirs.max(taken / own)
    }
}

impl Scheduler {
    /// Units of the lease that will be finished last, as many as `worker` finishes by the time the other has done the rest;
    /// with what they have to answer for; `None` where that would bring nothing forward.
    pub(super) fn take_backup(&mut self, worker: &str, rate: f64, now: Duration) -> Option<(Vec<UnitId>, Blame)> {
        if self.wants_shard().is_some() {
            // There is work that nobody has begun.
            return None;
        }
        let mut running = self.running(worker, rate, now);
        running.sort_by(|a, b| b.seconds().total_cmp(&a.seconds()).then(a.key.cmp(&b.key)));
        let busy = self.workers.leases(worker).next().is_some();
        running.into_iter().find_map(|lease| self.backup_of(lease, rate, busy))
    }

    /// The leases of all workers but one.
    fn running(&self, but: &str, rate: f64, now: Duration) -> Vec<Running> {
        let mut running = Vec::new();
        for (_, worker) in self.workers.iter().filter(|(name, _)| *name != but) {
            // Of a worker that has not said, it is assumed that it is as fast as the one that asks.
            let known = [worker.rate, rate].into_iter().find(|rate| *rate > 0.0).unwrap_or(f64::INFINITY);
            let evaluations = |key: &LeaseKey| self.leases.get(key).map_or(0.0, |lease| lease.evaluations as f64);
            let quiet = now.saturating_sub(worker.progress);
            let all: f64 = worker.leases.iter().map(evaluations).sum();
            // A dead worker is not waited for until its leases run out, when there is nothing else to do.
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
        // What is under suspicion is left to one worker, so that it is clear what it fails of, unless that one is stuck; and
        // what may be deadly goes to nobody who has something else in hand.
        let suspicious = held.blame != Blame::default() && lease.rate > 0.0;
        if lease.rate.is_infinite() || suspicious || (held.blame.deadly && busy) {
            return None;
        }
        let own = if rate > 0.0 { rate } else { lease.rate.max(1.0) };
        // Both come to the end at the same time if each does a share that goes with its rate.
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
