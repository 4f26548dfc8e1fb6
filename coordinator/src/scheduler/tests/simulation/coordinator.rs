//! A simulated coordinator around its scheduler, like service and steward: checks, persists, applies; opens and commits
//! shards.

use super::*;

/// How a coordinator opens a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Resume,
    /// `--fresh`; the coordinator may be killed before it has removed all files of the old job.
    Fresh,
    /// `--retry-quarantined`
    Retry,
}

#[derive(Debug)]
pub(super) struct Coordinator {
    pub(super) scheduler: Scheduler,
    pub(super) alive: bool,
    /// It stands still until this time.
    pub(super) stopped_until: u64,
    /// The output it works on.
    pub(super) place: usize,
    /// Its job.
    pub(super) job: u64,
    born: u64,
    /// The speed of its clock, in eighths.
    pace: u64,
    opening: Option<ShardId>,
    /// Whether all shards are committed and it writes confidence.
    finishing: bool,
}

/// The worker that waits for a report to be durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sender {
    worker: usize,
    request: u64,
    key: LeaseKey,
}

/// Files to write, and the next step.
#[derive(Clone, Debug)]
pub(super) struct Writing {
    files: VecDeque<Put>,
    then: Then,
}

/// The step after files are written.
#[derive(Clone, Debug)]
enum Then {
    /// The shard's mark.
    Mark(ShardId, ShardTotals),
    /// The next shard's confidence.
    Calibrate(u32),
    /// The job is done.
    Done,
}

/// An answer from storage.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    /// A report is on its way into the ledger; its sender waits.
    Record(Record, Option<Sender>),
    /// A shard was read.
    Opened(ShardId, Vec<Record>, Vec<(SampleId, u64)>),
    /// The versions of files are being read.
    Look(Writing),
    /// The ledger is asked whether this is still the coordinator.
    Hold(Writing),
    /// The first of some files is on its way.
    Put(Writing),
    /// A repeated put, whose answer is ignored.
    Again(Put),
    /// A shard's mark is on its way.
    Mark(ShardId, ShardTotals),
}

impl Coordinator {
    /// Opens the ledger, and retries quarantined samples if `retry`.
    fn start(durable: &mut Durable, place: usize, samples: u64, retry: bool, born: u64, pace: u64) -> Self {
        let policy = LeasePolicy {
            time_to_live: Duration::from_secs(3),
            block_seconds: 2.0,
            first_block: 300,
            window: 2,
            ..LeasePolicy::default()
        };
        let epoch = durable.open();
        durable.clear_late();
        if retry {
            durable.retry();
        }
        let scheduler = Scheduler::new(durable.kind.shape(samples), epoch, policy, durable.done.clone(), durable.waste);
        let scheduler = scheduler.with_retried(durable.retried.clone());
        let job = durable.job;
        Self { scheduler, alive: true, stopped_until: 0, place, job, born, pace, opening: None, finishing: false }
    }

    pub(super) fn clock(&self, now: u64) -> Duration {
        Duration::from_millis((now - self.born) * self.pace / 8)
    }
}

impl Simulation {
    /// Runs the job's command.
    pub(super) fn start(&mut self, mode: Mode) {
        let pace = if self.faults { 5 + self.dice.roll(7) as u64 } else { 8 };
        let mut mode = mode;
        if self.half_discarded {
            // Nothing else is accepted.
            mode = Mode::Fresh;
        }
        if mode == Mode::Fresh {
            self.generation += 1;
            self.half_discarded = self.faults && self.dice.roll(4) == 0;
            self.outputs[MAIN].open();
            self.outputs[MAIN].discard(2 * self.generation + MAIN as u64, self.half_discarded);
            if self.half_discarded {
                return self.later(100, Event::Start(Mode::Fresh));
            }
        }
        let has_learned = matches!(
            self.outputs[MAIN].content(Name::Learned),
            Some(Content::Learned { job, .. }) if *job == 2 * self.generation + PILOT as u64
        );
        let place = if self.has_pilot && !has_learned { PILOT } else { MAIN };
        if place == PILOT && self.outputs[PILOT].job != 2 * self.generation {
            self.outputs[PILOT].open();
            self.outputs[PILOT].discard(2 * self.generation, false);
        }
        self.start_at(place, mode, pace);
    }

    fn start_at(&mut self, place: usize, mode: Mode, pace: u64) {
        let (samples, retry) = (self.samples_of(place), mode == Mode::Retry && place == MAIN);
        let started = Coordinator::start(&mut self.outputs[place], place, samples, retry, self.now, pace);
        self.coordinators.push(started);
        self.later(1, Event::Steward(self.coordinators.len() - 1));
    }

    /// The steward's periodic step.
    pub(super) fn steward(&mut self, at: usize) {
        let now = self.now;
        let coordinator = &mut self.coordinators[at];
        let (clock, place) = (coordinator.clock(now), coordinator.place);
        if self.outputs[place].is_fenced(coordinator.scheduler.epoch()) && self.dice.roll(4) == 0 {
            // It notices sooner or later.
            coordinator.alive = false;
            return;
        }
        let (_, given_up) = coordinator.scheduler.expire(clock);
        let shard = coordinator.opening.is_none().then(|| coordinator.scheduler.wants_shard()).flatten();
        coordinator.opening = coordinator.opening.or(shard);
        let finished: Vec<_> = coordinator.scheduler.finished_shards();
        let finished: Vec<_> =
            finished.into_iter().map(|id| (id, coordinator.scheduler.finished(id).unwrap())).collect();
        if !given_up.is_empty() {
            self.persist(at, Record { results: vec![], failures: given_up }, None);
        }
        if let Some(shard) = shard {
            let output = &self.outputs[place];
            let kept =
                output.kept(shard).into_iter().map(|(sample, outcome)| (sample, evaluations(&outcome))).collect();
            let records = output.records(shard);
            self.store(at, Stored::Opened(shard, records, kept));
        }
        for (shard, (_, outcomes, totals)) in finished {
            self.commit(at, shard, outcomes, totals);
        }
        let coordinator = &mut self.coordinators[at];
        if coordinator.scheduler.is_done() && !std::mem::replace(&mut coordinator.finishing, true) {
            self.calibrate(at, 0);
        }
        self.later(200, Event::Steward(at));
    }

    /// Writes a finished shard: its quarantine, if there is or was one, then its rows.
    fn commit(&mut self, at: usize, shard: ShardId, mut outcomes: Vec<Finished>, totals: ShardTotals) {
        let (place, job) = (self.coordinators[at].place, self.coordinators[at].job);
        let output = &self.outputs[place];
        let kept = output.kept(shard);
        for finished in outcomes.iter_mut().filter(|finished| finished.outcome == SampleOutcome::Kept) {
            // A replaced coordinator may find rows of others, and writes nothing.
            finished.outcome = kept.get(&finished.sample).cloned().unwrap_or(SampleOutcome::Kept);
        }
        let given_up = |finished: &&Finished| matches!(finished.outcome, SampleOutcome::Quarantined(_));
        let samples: Vec<_> = outcomes.iter().filter(given_up).map(|finished| finished.sample).collect();
        let name = Name::Quarantine(shard);
        let had_quarantine = output.retried.contains_key(&shard) || output.look(name).is_some();
        let mut files = VecDeque::new();
        if had_quarantine || !samples.is_empty() {
            files.push_back(Put { name, content: Content::Quarantine { job, samples }, seen: None });
        }
        let content = Content::Rows { job, outcomes, confidence: None };
        files.push_back(Put { name: Name::Predictions(shard), content, seen: None });
        self.store(at, Stored::Look(Writing { files, then: Then::Mark(shard, totals) }));
    }

    /// Writes the confidence of a shard's rows, or `job.json` after the last shard. Confidence depends on the rows of all
    /// shards.
    fn calibrate(&mut self, at: usize, shard: u32) {
        let (place, job) = (self.coordinators[at].place, self.coordinators[at].job);
        let (name, content, then) = match self.outputs[place].rows(ShardId(shard)) {
            _ if shard == self.coordinators[at].scheduler.job().shards() => {
                (Name::Job, Content::Job { job, done: true }, Then::Done)
            }
            // Another coordinator has discarded it.
            None => return,
            Some((rows, _)) => {
                let content = Content::Rows { job, outcomes: rows.clone(), confidence: None };
                (Name::Predictions(ShardId(shard)), content, Then::Calibrate(shard + 1))
            }
        };
        let files = VecDeque::from([Put { name, content, seen: None }]);
        self.store(at, Stored::Look(Writing { files, then }));
    }

    /// Looks at files, whose new content may depend on the old. `None` if there is nothing to write.
    fn look(&mut self, at: usize, mut writing: Writing) -> Option<Writing> {
        let (place, job) = (self.coordinators[at].place, self.coordinators[at].job);
        let learned = self.learned(place);
        let output = &self.outputs[place];
        for put in &mut writing.files {
            put.seen = output.look(put.name);
        }
        if let (Then::Calibrate(_), Some(put)) = (&writing.then, writing.files.front_mut()) {
            let found = output.content(put.name)?;
            let Content::Rows { job: of, outcomes, .. } = found else { return None };
            // Rows of another job are not rewritten.
            if *of != job {
                return None;
            }
            let confidence = Some(scored(output, self.coordinators[at].scheduler.job().shards()) + learned);
            let content = Content::Rows { job, outcomes: outcomes.clone(), confidence };
            if content == *found {
                writing.files.clear();
            }
            put_content(&mut writing, content);
        }
        Some(writing)
    }

    /// The pilot's result, for the job that follows it.
    pub(super) fn learned(&self, place: usize) -> u64 {
        match self.outputs[MAIN].content(Name::Learned) {
            Some(Content::Learned { from, .. }) if place == MAIN => *from,
            _ => 0,
        }
    }

    fn persist(&mut self, at: usize, mut record: Record, sender: Option<Sender>) {
        // As in the ledger, a record of several shards is split.
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
        let mut delay = 5 + self.dice.roll(if self.storage_stalls { 6_000 } else { 60 }) as u64;
        if let Stored::Put(writing) = &stored
            && self.faults
            && self.dice.roll(6) == 0
        {
            // The put is delayed; or it is repeated, and the first one arrives late.
            let late = delay + self.dice.roll(40_000) as u64;
            match self.dice.roll(2) {
                0 => delay = late,
                _ => self.later(late, Event::Stored(at, Stored::Again(writing.files[0].clone()))),
            }
        }
        self.later(delay, Event::Stored(at, stored));
    }

    /// Storage answers. If the coordinator has died meanwhile, the operation may or may not have happened.
    pub(super) fn stored(&mut self, at: usize, stored: Stored) {
        let alive = self.coordinators[at].alive;
        if !alive && self.dice.roll(2) == 0 {
            return;
        }
        let (epoch, waste) = (self.coordinators[at].scheduler.epoch(), self.coordinators[at].scheduler.waste());
        let place = self.coordinators[at].place;
        let output = &mut self.outputs[place];
        let mut is_placed = true;
        let written = match &stored {
            Stored::Record(record, _) => output.write(epoch, Write::Record(record.clone()), waste),
            Stored::Mark(shard, totals) => output.write(epoch, Write::Done(*shard, *totals), waste),
            Stored::Hold(_) => output.write(epoch, Write::Hold, waste),
            Stored::Put(writing) => {
                is_placed = output.put(epoch, writing.files[0].clone());
                true
            }
            Stored::Again(put) => {
                output.put(epoch, put.clone());
                return;
            }
            Stored::Opened(..) | Stored::Look(_) => true,
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
                coordinator.scheduler.apply(record.clone(), of);
                if let Some(Sender { worker, request, .. }) = sender {
                    self.outputs[place].acknowledge(&record);
                    self.reply(at, worker, request, Reply::Acknowledged);
                }
            }
            Stored::Opened(shard, records, kept) => {
                coordinator.opening = None;
                let samples = manifest(shard, self.samples_of(place));
                let coordinator = &mut self.coordinators[at];
                let restored = Shard::restore(coordinator.scheduler.job(), samples, &kept, records);
                coordinator.scheduler.open_shard(shard, restored, clock);
            }
            Stored::Look(writing) => match self.look(at, writing) {
                Some(writing) if writing.files.is_empty() => self.written(at, writing.then),
                Some(writing) => self.store(at, Stored::Hold(writing)),
                None => {}
            },
            Stored::Hold(writing) => self.store(at, Stored::Put(writing)),
            Stored::Put(mut writing) if is_placed => {
                writing.files.pop_front();
                if writing.files.is_empty() {
                    self.written(at, writing.then);
                } else {
                    self.store(at, Stored::Put(writing));
                }
            }
            // Another put has changed the file meanwhile.
            Stored::Put(writing) => self.store(at, Stored::Look(writing)),
            Stored::Mark(shard, _) => coordinator.scheduler.close_shard(shard),
            Stored::Again(_) => {}
        }
    }

    fn written(&mut self, at: usize, then: Then) {
        match then {
            Then::Mark(shard, totals) => self.store(at, Stored::Mark(shard, totals)),
            Then::Calibrate(shard) => self.calibrate(at, shard),
            Then::Done => self.finished(at),
        }
    }

    /// A coordinator has finished its job. After a pilot, the next job starts. Otherwise the job may be started over or
    /// retried.
    fn finished(&mut self, at: usize) {
        let Coordinator { place, job, pace, .. } = self.coordinators[at];
        self.coordinators[at].alive = false;
        if place == PILOT {
            let shards = self.coordinators[at].scheduler.job().shards();
            let content = Content::Learned { job, from: 100 * scored(&self.outputs[PILOT], shards) };
            // It is written as a whole: two writers write the same.
            let seen = self.outputs[MAIN].look(Name::Learned);
            if job == 2 * self.generation {
                let epoch = Epoch(u64::MAX);
                self.outputs[MAIN].put(epoch, Put { name: Name::Learned, content, seen });
                self.start_at(MAIN, Mode::Resume, pace);
            }
            return;
        }
        let output = &self.outputs[MAIN];
        let has_quarantined = output.done.values().any(|totals| totals.quarantined > 0);
        let unfinished = output.is_fenced(self.coordinators[at].scheduler.epoch());
        match self.dice.roll(4) {
            _ if unfinished => {}
            0 if self.faults => self.later(50, Event::Start(Mode::Fresh)),
            1 | 2 if self.faults && has_quarantined => self.later(50, Event::Start(Mode::Retry)),
            _ if self.nature.mended && has_quarantined && !self.retried_at_last => {
                // Run once more after all faults, so that all runs end alike.
                self.retried_at_last = !self.faults;
                self.later(50, Event::Start(Mode::Retry));
            }
            _ => self.done = true,
        }
    }

    /// A worker's request arrives.
    pub(super) fn serve(&mut self, at: usize, worker: usize, request: u64, message: Request) {
        let name = self.workers[worker].name.clone();
        let rate = self.workers[worker].told_rate();
        let coordinator = &mut self.coordinators[at];
        let (clock, place, job) = (coordinator.clock(self.now), coordinator.place, coordinator.job);
        let scheduler = &mut coordinator.scheduler;
        let reply = match message {
            // Its blocks are of another job.
            Request::Join(Some(of), _) if of != job => Reply::OtherJob(job),
            Request::Join(_, held) => {
                scheduler.join(&name, "host", "cpu", clock);
                held.iter().for_each(|(key, units)| scheduler.adopt(&name, *key, units, clock));
                Reply::Joined(job)
            }
            Request::Lease(of, _) | Request::Heartbeat(of, _) if of != Some(job) => Reply::Rejoin,
            Request::Lease(_, held) => {
                scheduler.keep_only(&name, &held);
                match scheduler.grant(&name, rate, clock) {
                    Some(grant) => {
                        if !self.outputs[place].is_fenced(scheduler.epoch()) {
                            let known = grant.units.iter().find(|u| self.outputs[place].acknowledged.contains(&u.id));
                            assert!(known.is_none(), "{known:?} was acknowledged but is granted again");
                        }
                        Reply::Granted(LeaseKey { epoch: scheduler.epoch(), lease: grant.lease }, grant.units)
                    }
                    None if scheduler.knows(&name) => Reply::Idle,
                    None => Reply::Rejoin,
                }
            }
            Request::Heartbeat(_, held) => {
                let beat = Heartbeat { held, ..Heartbeat::default() };
                scheduler.heartbeat(&name, beat, clock).map_or(Reply::Rejoin, Reply::Unwanted)
            }
            // An unknown worker must join first, perhaps another job.
            Request::Report(of, ..) if of != Some(job) || !scheduler.knows(&name) => Reply::Rejoin,
            Request::Report(_, key, record, again) => match scheduler.check(&name, key, record.clone(), again, clock) {
                Ok(checked) if checked.record == Record::default() => {
                    if !self.outputs[place].is_fenced(scheduler.epoch()) {
                        let is_of_use = |result: &UnitResult| !checked.void.contains(&result.id);
                        let results = record.results.into_iter().filter(is_of_use).collect();
                        self.outputs[place].acknowledge(&Record { results, failures: record.failures });
                    }
                    Reply::Acknowledged
                }
                Ok(checked) => return self.persist(at, checked.record, Some(Sender { worker, request, key })),
                Err(ReportError::NotOpen(_) | ReportError::Replaced(_)) => Reply::Unavailable,
                Err(ReportError::Unclaimed(_)) => Reply::Rejoin,
                Err(error) => panic!("an honest report was refused: {error}"),
            },
            Request::Fail(key) => {
                let given_up = scheduler.fail(&name, key, "the model broke down");
                if !given_up.is_empty() {
                    self.persist(at, Record { results: vec![], failures: given_up }, None);
                }
                Reply::Acknowledged
            }
            Request::Leave => {
                scheduler.leave(&name);
                Reply::Acknowledged
            }
        };
        self.reply(at, worker, request, reply);
    }
}

/// Replaces the content of the first file to write, if there is one.
fn put_content(writing: &mut Writing, content: Content) {
    if let Some(put) = writing.files.front_mut() {
        put.content = content;
    }
}

/// The evaluations of a sample.
fn evaluations(outcome: &SampleOutcome) -> u64 {
    match outcome {
        SampleOutcome::Scored { prompts, .. } => prompts.iter().map(|prompt| u64::from(prompt.sums.n)).sum(),
        _ => 0,
    }
}

/// How many samples were scored, which stands for the inputs of confidence.
fn scored(output: &Durable, shards: u32) -> u64 {
    let rows = (0..shards).filter_map(|shard| output.rows(ShardId(shard))).flat_map(|(rows, _)| rows);
    rows.filter(|finished| !matches!(finished.outcome, SampleOutcome::Quarantined(_))).count() as u64
}
