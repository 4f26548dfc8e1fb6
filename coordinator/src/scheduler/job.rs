//! What the scheduler must know of a job.

use std::collections::BTreeMap;
use std::sync::Arc;

use elbo_core::audit::Audit;
use elbo_core::ensemble::Contenders;
use elbo_core::policy::Course;

use super::ShardTotals;
use super::active::PROMPT_BYTES;
use super::outcome::SlotError;

/// What the scheduler must know of a job.
#[derive(Clone, Debug)]
pub struct JobShape {
    course: Course,
    /// What competes for a sample without captions of its own.
    contenders: Arc<Contenders>,
    samples: u64,
    shard_size: u32,
    keep_errors: bool,
    planned: u64,
    /// Evaluations of a sample without captions of its own.
    planned_each: u64,
    /// Prompts that such a sample is asked about first.
    first_prompts: usize,
    /// Which samples go through the course's audit too, by the job's seed.
    audit: Option<(Audit, u64)>,
    /// Bytes that a sample with the most prompts takes between its first evaluation and its commit: at most, or in the first
    /// round of a race, after which most of its prompts are out.
    sample_bytes: u64,
}

impl JobShape {
    /// The shape of a job with shards of `shard_size`, in which `contenders` compete for every sample without captions of
    /// its own; `samples` counts the samples by their number of captions, and `keep_errors` says whether single errors are
    /// written.
    pub fn new(
        course: Course,
        contenders: Contenders,
        samples: &BTreeMap<usize, u64>,
        shard_size: u32,
        keep_errors: bool,
    ) -> Self {
        let contenders = Arc::new(contenders);
        let (planned_each, sample_bytes) = (evaluations(&course, &contenders), 0);
        let first_prompts = contenders.first().len();
        let mut job = Self {
            course,
            contenders,
            samples: 0,
            shard_size,
            keep_errors,
            planned: 0,
            planned_each,
            first_prompts,
            audit: None,
            sample_bytes,
        };
        for (captions, count) in samples {
            job.samples += count;
            let (planned, prompts) = (job.planned_of(*captions), job.prompts_of(*captions));
            job.planned += count * planned;
            let errors = if keep_errors { planned * size_of::<SlotError>() as u64 } else { 0 };
            let pairs = match job.course.needs_pairs() {
                true => prompts * size_of::<Vec<f32>>() + job.course.first_slots(prompts) * prompts * size_of::<f32>(),
                false => 0,
            };
            let bytes = (prompts * PROMPT_BYTES + pairs) as u64 + errors;
            job.sample_bytes = job.sample_bytes.max(bytes);
        }
        job
    }

    /// The shape with an audit in a job with this seed.
    pub fn with_audit(self, audit: Option<Audit>, seed: u64) -> Self {
        Self { audit: audit.map(|audit| (audit, seed)), ..self }
    }

    /// Whether the sample with this key is audited.
    pub(super) fn audits(&self, key: &str) -> bool {
        self.audit.as_ref().is_some_and(|(audit, seed)| audit.covers(*seed, key))
    }

    /// The course of every sample.
    pub fn course(&self) -> &Course {
        &self.course
    }

    /// Samples in the manifest.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Samples in a shard.
    pub fn shard_size(&self) -> u32 {
        self.shard_size
    }

    /// Whether every single error is written with the predictions.
    pub(super) fn keeps_errors(&self) -> bool {
        self.keep_errors
    }

    /// Whether results bring every single error, from which sums follow, and not sums alone.
    pub(super) fn takes_errors(&self) -> bool {
        self.course.reports_errors(self.keep_errors)
    }

    /// What competes for a sample with so many captions of its own.
    pub(super) fn contenders_of(&self, captions: usize) -> Arc<Contenders> {
        if captions == 0 { Arc::clone(&self.contenders) } else { Arc::new(Contenders::prompts(captions)) }
    }

    /// How many prompts a sample with so many captions of its own has.
    pub(super) fn prompts_of(&self, captions: usize) -> usize {
        if captions == 0 { self.contenders.prompt_count() } else { captions }
    }

    /// How many of them it is asked about first.
    pub(super) fn first_prompts(&self, captions: usize) -> usize {
        if captions == 0 { self.first_prompts } else { captions }
    }

    /// The evaluations of a sample with so many captions that is not given up, or the most there can be.
    pub(crate) fn planned_of(&self, captions: usize) -> u64 {
        if captions == 0 { self.planned_each } else { evaluations(&self.course, &Contenders::prompts(captions)) }
    }

    /// Bytes that a shard takes with every sample begun and none written.
    pub(super) fn shard_bytes(&self) -> u64 {
        self.sample_bytes * u64::from(self.shard_size)
    }

    /// How many shards the job has.
    pub fn shards(&self) -> u32 {
        self.samples.div_ceil(u64::from(self.shard_size.max(1))) as u32
    }

    /// The evaluations of all samples if none is given up; the most there can be where classes have unequally many prompts
    /// and in races.
    pub fn planned_evaluations(&self) -> u64 {
        self.planned
    }

    /// The evaluations of all samples, as far as can be told from `totals` when `open` samples are on their way.
    ///
    /// What a race takes only samples that have ended can tell, the easy ones first: those on their way are taken to be
    /// half through, and those that were not begun for as hard as those that have ended.
    pub fn expected_evaluations(&self, totals: ShardTotals, open: u64) -> Option<u64> {
        if !self.course.needs_pairs() {
            return Some(self.planned.saturating_sub(totals.spared));
        }
        if totals.samples == 0 {
            return None;
        }
        let planned_each = self.planned as f64 / self.samples.max(1) as f64;
        let each = planned_each - totals.spared as f64 / totals.samples as f64;
        let untouched = self.samples.saturating_sub(totals.samples + open);
        Some(totals.evaluations + (each * (untouched as f64 + open as f64 / 2.0)) as u64)
    }
}

/// The evaluations of a sample through the course and its audit, at most.
fn evaluations(course: &Course, contenders: &Contenders) -> u64 {
    let audit = course.audit().map_or_else(Vec::new, |audit| audit.costs(contenders));
    course.costs(contenders).iter().chain(&audit).map(|c| c.evaluations).sum()
}
