//! A coordinator around its brain, as service and steward are: checks, persists, applies; opens and commits shards.

use super::*;

#[derive(Debug)]
pub(super) struct Coordinator {
    pub(super) brain: Brain,
    pub(super) alive: bool,
    /// It stands still until then.
    pub(super) stopped_until: u64,
    born: u64,
    /// How fast its clock goes, in eighths.
    pace: u64,
    opening: Option<ShardId>,
}

/// Who waits for a report to be durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sender {
    worker: usize,
    request: u64,
    key: LeaseKey,
}

/// Something that comes back from storage.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    /// A report is on its way into the ledger; whoever sent it waits.
    Record(Record, Option<Sender>),
    /// A shard was read.
    Opened(ShardId, Vec<Record>),
    /// A shard's files are written.
    Put(ShardId, ShardTotals, Vec<Finished>),
    /// A shard's mark is on its way.
    Mark(ShardId, ShardTotals),
}

impl Coordinator {
    pub(super) fn start(durable: &mut Durable, samples: u64, born: u64, pace: u64) -> Self {
        let policy = LeasePolicy {
            time_to_live: Duration::from_secs(3),
            block_seconds: 2.0,
            first_block: 300,
            window: 2,
            ..LeasePolicy::default()
        };
        let epoch = durable.open();
        let brain = Brain::new(durable.kind.shape(samples), epoch, policy, durable.done.clone(), durable.waste);
        Self { brain, alive: true, stopped_until: 0, born, pace, opening: None }
    }

    pub(super) fn clock(&self, now: u64) -> Duration {
        Duration::from_millis((now - self.born) * self.pace / 8)
    }
}

impl Simulation {
    /// What the steward does now and then.
    pub(super) fn steward(&mut self, at: usize) {
        let now = self.now;
        let coordinator = &mut self.coordinators[at];
        let clock = coordinator.clock(now);
        if self.durable.is_fenced(coordinator.brain.epoch()) && self.dice.roll(4) == 0 {
            // It notices sooner or later.
            coordinator.alive = false;
            return;
        }
        let (_, given_up) = coordinator.brain.expire(clock);
        let shard = coordinator.opening.is_none().then(|| coordinator.brain.wants_shard()).flatten();
        coordinator.opening = coordinator.opening.or(shard);
        let finished: Vec<_> = coordinator.brain.finished_shards();
        let finished: Vec<_> = finished.into_iter().map(|id| (id, coordinator.brain.finished(id).unwrap())).collect();
        if !given_up.is_empty() {
            self.persist(at, Record { results: vec![], failures: given_up }, None);
        }
        if let Some(shard) = shard {
            let records = self.durable.records(shard);
            self.store(at, Stored::Opened(shard, records));
        }
        for (shard, (_, outcomes, totals)) in finished {
            self.store(at, Stored::Put(shard, totals, outcomes));
        }
        if self.coordinators[at].brain.is_done() {
            self.done = true;
        }
        self.later(200, Event::Steward(at));
    }

    fn persist(&mut self, at: usize, mut record: Record, sender: Option<Sender>) {
        // As in the ledger, what speaks of several shards is split.
        let results = std::mem::take(&mut record.results);
        let failures = std::mem::take(&mut record.failures);
        let mut parts: BTreeMap<ShardId, Record> = BTreeMap::new();
        results.into_iter().for_each(|r| parts.entry(r.id.sample.shard(SHARD_SIZE)).or_default().results.push(r));
        failures.into_iter().for_each(|f| parts.entry(f.sample.shard(SHARD_SIZE)).or_default().failures.push(f));
        assert!(sender.is_none() || parts.len() < 2, "a lease is of one shard");
        for part in parts.into_values() {
            self.store(at, Stored::Record(part, sender));
        }
    }

    fn store(&mut self, at: usize, stored: Stored) {
        let delay = 5 + self.dice.roll(if self.storage_stalls { 6_000 } else { 60 }) as u64;
        self.later(delay, Event::Stored(at, stored));
    }

    /// Storage answers. A coordinator that has died meanwhile may or may not have got so far.
    pub(super) fn stored(&mut self, at: usize, stored: Stored) {
        let alive = self.coordinators[at].alive;
        if !alive && self.dice.roll(2) == 0 {
            return;
        }
        let (epoch, waste) = (self.coordinators[at].brain.epoch(), self.coordinators[at].brain.waste());
        let written = match stored.clone() {
            Stored::Record(record, _) => self.durable.write(epoch, Write::Record(record), waste),
            Stored::Mark(shard, totals) => self.durable.write(epoch, Write::Done(shard, totals), waste),
            Stored::Put(shard, _, outcomes) => {
                self.durable.put(shard, outcomes);
                true
            }
            Stored::Opened(..) => true,
        };
        let coordinator = &mut self.coordinators[at];
        coordinator.alive &= written;
        if !coordinator.alive {
            return;
        }
        let clock = coordinator.clock(self.now);
        match stored {
            Stored::Record(record, sender) => {
                let of = sender.map(|sender| (self.workers[sender.worker].name.as_str(), sender.key));
                coordinator.brain.apply(record.clone(), of);
                if let Some(Sender { worker, request, .. }) = sender {
                    self.durable.acknowledge(&record);
                    self.reply(at, worker, request, Reply::Acknowledged);
                }
            }
            Stored::Opened(shard, records) => {
                coordinator.opening = None;
                let restored = Shard::restore(coordinator.brain.job(), manifest(shard, self.samples), &[], records);
                coordinator.brain.open_shard(shard, restored, clock);
            }
            Stored::Put(shard, totals, _) => self.store(at, Stored::Mark(shard, totals)),
            Stored::Mark(shard, _) => coordinator.brain.close_shard(shard),
        }
    }

    /// A worker's request arrives.
    pub(super) fn serve(&mut self, at: usize, worker: usize, request: u64, message: Request) {
        let name = self.workers[worker].name.clone();
        let rate = self.workers[worker].told_rate();
        let coordinator = &mut self.coordinators[at];
        let clock = coordinator.clock(self.now);
        let brain = &mut coordinator.brain;
        let reply = match message {
            Request::Join(held) => {
                brain.join(&name, "host", "cpu", clock);
                held.iter().for_each(|(key, units)| brain.adopt(&name, *key, units, clock));
                Reply::Joined
            }
            Request::Lease(held) => {
                brain.keep_only(&name, &held);
                match brain.grant(&name, rate, clock) {
                    Some(grant) => {
                        if !self.durable.is_fenced(brain.epoch()) {
                            let known = grant.units.iter().find(|u| self.durable.acknowledged.contains(&u.id));
                            assert!(known.is_none(), "{known:?} was acknowledged and is granted again");
                        }
                        Reply::Granted(LeaseKey { epoch: brain.epoch(), lease: grant.lease }, grant.units)
                    }
                    None if brain.knows(&name) => Reply::Idle,
                    None => Reply::Rejoin,
                }
            }
            Request::Heartbeat(held) => {
                let beat = Heartbeat { held, ..Heartbeat::default() };
                brain.heartbeat(&name, beat, clock).map_or(Reply::Rejoin, Reply::Unwanted)
            }
            Request::Report(key, record, again) => match brain.check(&name, key, record.clone(), again, clock) {
                Ok(checked) if checked.record == Record::default() => {
                    if !self.durable.is_fenced(brain.epoch()) {
                        self.durable.acknowledge(&record);
                    }
                    Reply::Acknowledged
                }
                Ok(checked) => return self.persist(at, checked.record, Some(Sender { worker, request, key })),
                Err(ReportError::NotOpen(_) | ReportError::Replaced(_)) => Reply::Unavailable,
                Err(ReportError::Unclaimed(_)) => Reply::Rejoin,
                Err(error) => panic!("an honest report was refused: {error}"),
            },
            Request::Fail(key) => {
                let given_up = brain.fail(&name, key, "the model broke down");
                if !given_up.is_empty() {
                    self.persist(at, Record { results: vec![], failures: given_up }, None);
                }
                Reply::Acknowledged
            }
            Request::Leave => {
                brain.leave(&name);
                Reply::Acknowledged
            }
        };
        self.reply(at, worker, request, reply);
    }
}
