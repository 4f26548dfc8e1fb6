//! A simulated worker: asks, computes, keeps unacknowledged results, and follows whichever coordinator answers.

use elbo_core::failure::{FailureStage, SampleFailure};

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Request {
    /// With the job that it has been working on.
    Join(Option<u64>, Vec<(LeaseKey, Vec<UnitId>)>),
    Lease(Option<u64>, Vec<LeaseKey>),
    Heartbeat(Option<u64>, Vec<LeaseKey>),
    /// Its job, and whether it was sent before.
    Report(Option<u64>, LeaseKey, Record, bool),
    Fail(LeaseKey),
    Leave,
}

#[derive(Clone, Debug)]
pub(super) enum Reply {
    /// To work on this job.
    Joined(u64),
    /// The coordinator has this job, not the worker's.
    OtherJob(u64),
    Rejoin,
    Granted(LeaseKey, Vec<Unit>),
    Idle,
    Unwanted(Vec<LeaseKey>),
    Acknowledged,
    Unavailable,
}

/// A request that waits for its answer. There is one at a time of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Join,
    Lease,
    Heartbeat,
    Report,
    Other,
}

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) name: String,
    pub(super) alive: bool,
    /// It is disconnected until this time.
    pub(super) cut_until: u64,
    /// It stands still until this time.
    pub(super) stopped_until: u64,
    /// The job it works on.
    job: Option<u64>,
    /// Its mount is missing: it can't read any image, gives no sample up, and leaves.
    pub(super) blind: bool,
    /// Evaluations per second.
    rate: u64,
    finished: u64,
    /// Units that are not acknowledged, by lease.
    held: BTreeMap<LeaseKey, BTreeSet<UnitId>>,
    queue: VecDeque<(LeaseKey, Unit)>,
    findings: Vec<(LeaseKey, UnitResult)>,
    failures: Vec<(LeaseKey, SampleFailure)>,
    /// The report under way.
    report: Option<(LeaseKey, Record)>,
    waiting: Vec<(u64, Kind)>,
    computing: bool,
}

impl Worker {
    pub(super) fn new(name: String, rate: u64) -> Self {
        Self {
            name,
            alive: true,
            cut_until: 0,
            stopped_until: 0,
            job: None,
            blind: false,
            rate,
            finished: 0,
            held: BTreeMap::new(),
            queue: VecDeque::new(),
            findings: Vec::new(),
            failures: Vec::new(),
            report: None,
            waiting: Vec::new(),
            computing: false,
        }
    }

    /// The rate it reports, once it has one.
    pub(super) fn told_rate(&self) -> f64 {
        if self.finished > 2 { self.rate as f64 } else { 0.0 }
    }

    fn waits(&self, kind: Kind) -> bool {
        self.waiting.iter().any(|(_, waiting)| *waiting == kind)
    }

    fn leases(&self) -> Vec<LeaseKey> {
        self.held.keys().copied().collect()
    }

    fn blocks(&self) -> Vec<(LeaseKey, Vec<UnitId>)> {
        self.held.iter().map(|(key, units)| (*key, units.iter().copied().collect())).collect()
    }

    fn drop_block(&mut self, key: LeaseKey) {
        // Its failures must still be reported.
        let found: Vec<_> = self.findings.iter().filter(|(of, _)| *of == key).map(|(_, result)| result.id).collect();
        let bad: Vec<_> = self.failures.iter().filter(|(of, _)| *of == key).map(|(_, bad)| bad.sample).collect();
        let reported = self.report.as_ref().filter(|(of, _)| *of == key).map(|(_, record)| record);
        let is_reported = |unit: &UnitId| {
            reported.is_some_and(|record| {
                record.results.iter().any(|result| result.id == *unit)
                    || record.failures.iter().any(|failure| failure.sample == unit.sample)
            })
        };
        if let Some(units) = self.held.get_mut(&key) {
            units.retain(|unit| found.contains(unit) || bad.contains(&unit.sample) || is_reported(unit));
        }
        self.held.retain(|_, units| !units.is_empty());
        self.queue.retain(|(of, _)| *of != key);
    }
}

impl Simulation {
    /// A worker's periodic step: a heartbeat, and all due requests.
    pub(super) fn beat(&mut self, at: usize) {
        self.later(700, Event::Beat(at));
        if self.workers[at].job.is_none() {
            // First it must know the job.
            return self.ask(at, Kind::Join, Request::Join(None, Vec::new()));
        }
        let (job, held) = (self.workers[at].job, self.workers[at].leases());
        self.ask(at, Kind::Heartbeat, Request::Heartbeat(job, held));
        self.act(at);
    }

    fn act(&mut self, at: usize) {
        let worker = &mut self.workers[at];
        if worker.report.is_none() {
            let next = worker.findings.first().map(|(key, _)| *key).or(worker.failures.first().map(|(key, _)| *key));
            if let Some(key) = next {
                let of_lease = |item: &(LeaseKey, UnitResult)| item.0 == key;
                let results = worker.findings.iter().filter(|f| of_lease(f)).map(|(_, r)| r.clone()).collect();
                let failures = worker.failures.iter().filter(|f| f.0 == key).map(|(_, f)| f.clone()).collect();
                worker.findings.retain(|(of, _)| *of != key);
                worker.failures.retain(|(of, _)| *of != key);
                worker.report = Some((key, Record { results, failures }));
                self.send_report(at, false);
            }
        } else {
            self.send_report(at, true);
        }
        let worker = &mut self.workers[at];
        let blocks: BTreeSet<_> = worker.queue.iter().map(|(key, _)| *key).collect();
        if blocks.len() < 2 {
            let (job, held) = (worker.job, worker.leases());
            self.ask(at, Kind::Lease, Request::Lease(job, held));
        }
        self.compute(at);
    }

    fn send_report(&mut self, at: usize, again: bool) {
        let job = self.workers[at].job;
        if let Some((key, record)) = self.workers[at].report.clone() {
            self.ask(at, Kind::Report, Request::Report(job, key, record, again));
        }
    }

    fn ask(&mut self, at: usize, kind: Kind, request: Request) {
        if kind != Kind::Other && self.workers[at].waits(kind) {
            return;
        }
        let number = self.next_request();
        self.workers[at].waiting.push((number, kind));
        self.later(4_000, Event::GiveUp(at, number));
        self.send(at, number, request);
    }

    /// No answer came.
    pub(super) fn give_up(&mut self, at: usize, number: u64) {
        self.workers[at].waiting.retain(|(waiting, _)| *waiting != number);
    }

    fn compute(&mut self, at: usize) {
        let worker = &mut self.workers[at];
        let Some((_, unit)) = worker.queue.front() else { return };
        if !std::mem::replace(&mut worker.computing, true) {
            let time = unit.evaluations() * 1_000 / worker.rate;
            self.later(time.max(1), Event::Computed(at));
        }
    }

    /// A unit is finished, or fails according to its sample's nature.
    pub(super) fn computed(&mut self, at: usize) {
        let worker = &mut self.workers[at];
        worker.computing = false;
        let Some((key, unit)) = worker.queue.pop_front() else { return };
        if worker.blind {
            self.drain(at);
            let delay = self.dice.roll(5_000) as u64;
            return self.later(delay, Event::Spawn);
        }
        match self.nature.of(unit.id.sample) {
            Nature::Sound => {
                worker.finished += 1;
                let place = worker.job.map_or(MAIN, |job| job as usize % 2);
                let result = self.nature.evaluate(place, &unit);
                worker.findings.push((key, result));
            }
            nature @ (Nature::Unreadable | Nature::Missing) => {
                let sample = unit.id.sample;
                // This is found out again for each block.
                worker.queue.retain(|(of, other)| *of != key || other.id.sample != sample);
                let stage = if nature == Nature::Missing { FailureStage::Unread } else { FailureStage::Decode };
                let failure = SampleFailure { sample, stage, error: "cut off".into() };
                worker.failures.push((key, failure));
            }
            Nature::Poison => {
                worker.drop_block(key);
                self.ask(at, Kind::Other, Request::Fail(key));
            }
            Nature::Deadly => return self.kill_worker(at),
        }
        self.act(at);
    }

    /// Asks a worker to leave: it hands back blocks that it has not begun, and leaves once the rest is acknowledged.
    pub(super) fn drain(&mut self, at: usize) {
        self.ask(at, Kind::Other, Request::Leave);
        self.workers[at].alive = false;
    }

    /// An answer arrives.
    pub(super) fn answered(&mut self, at: usize, number: u64, reply: Reply) {
        let worker = &mut self.workers[at];
        let Some(position) = worker.waiting.iter().position(|(waiting, _)| *waiting == number) else { return };
        let (_, kind) = worker.waiting.swap_remove(position);
        match reply {
            Reply::Rejoin => {
                let held = worker.blocks();
                let job = worker.job;
                self.ask(at, Kind::Join, Request::Join(job, held));
            }
            Reply::Joined(job) => worker.job = Some(job),
            Reply::OtherJob(job) => {
                // Its blocks are of no use any more.
                worker.held.clear();
                worker.queue.clear();
                worker.findings.clear();
                worker.failures.clear();
                worker.waiting.clear();
                worker.report = None;
                worker.job = Some(job);
            }
            Reply::Granted(key, units) => {
                worker.held.insert(key, units.iter().map(|unit| unit.id).collect());
                worker.queue.extend(units.into_iter().map(|unit| (key, unit)));
            }
            Reply::Unwanted(keys) => keys.into_iter().for_each(|key| worker.drop_block(key)),
            Reply::Acknowledged if kind == Kind::Report => {
                if let Some((key, record)) = worker.report.take()
                    && let Some(units) = worker.held.get_mut(&key)
                {
                    let bad: BTreeSet<_> = record.failures.iter().map(|f| f.sample).collect();
                    let known: BTreeSet<_> = record.results.iter().map(|r| r.id).collect();
                    units.retain(|unit| !known.contains(unit) && !bad.contains(&unit.sample));
                    if units.is_empty() {
                        worker.held.remove(&key);
                    }
                }
            }
            Reply::Idle | Reply::Acknowledged | Reply::Unavailable => {}
        }
        if matches!(kind, Kind::Report | Kind::Join) {
            self.act(at);
        } else {
            self.compute(at);
        }
    }
}
