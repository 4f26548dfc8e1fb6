//! What the scheduler needs to know about a job.

use std::collections::BTreeMap;
use std::sync::Arc;

use elbo_core::audit::Audit;
use elbo_core::ensemble::Contenders;
use elbo_core::policy::Course;

use super::ShardTotals;
use super::active::PROMPT_BYTES;
use super::outcome::SlotError;

/// What the scheduler needs to know about a job.
#[derive(Clone, Debug)]
pub struct JobShape {
    course: Course,
    /// The contenders for a sample without captions of its own.
    contenders: Arc<Contenders>,
    samples: u64,
    shard_size: u32,
    keep_errors: bool,
    planned: u64,
    /// Evaluations of a sample without captions of its own.
    planned_each: u64,
    /// Prompts in the first round of such a sample.
    first_prompts: usize,
    /// Which samples are also audited, and the job's seed, which chooses them.
    audit: Option<(Audit, u64)>,
    /// Bytes that a sample with the most prompts takes between its first evaluation and its commit. This is the maximum;
    /// for a race, it is the size in the first round, after which most prompts are eliminated.
    sample_bytes: u64,
}

impl JobShape {
    /// The shape of a job with shards of `shard_size`, in which `contenders` compete for every sample without captions of
    /// its own. `samples` counts the samples by their number of captions. `keep_errors` says whether single errors are
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
            let pairs = if job.course.needs_pairs() {
                prompts * size_of::<Vec<f32>>() + job.course.first_slots(prompts) * prompts * size_of::<f32>()
            } else {
                0
            };
            let bytes = (prompts * PROMPT_BYTES + pairs) as u64 + errors;
            job.sample_bytes = job.sample_bytes.max(bytes);
        }
        job
    }

    /// Adds an audit, for a job with this seed.
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

    /// Whether results contain every single error, from which sums follow, instead of sums.
    pub(super) fn takes_errors(&self) -> bool {
        self.course.reports_errors(self.keep_errors)
    }

    /// The contenders for a sample with this many captions of its own.
    pub(super) fn contenders_of(&self, captions: usize) -> Arc<Contenders> {
        if captions == 0 { Arc::clone(&self.contenders) } else { Arc::new(Contenders::prompts(captions)) }
    }

    /// How many prompts a sample with this many captions of its own has.
    pub(super) fn prompts_of(&self, captions: usize) -> usize {
        if captions == 0 { self.contenders.prompt_count() } else { captions }
    }

    /// How many of these prompts its first round has.
    pub(super) fn first_prompts(&self, captions: usize) -> usize {
        if captions == 0 { self.first_prompts } else { captions }
    }

    /// The evaluations of a sample with this many captions that is not given up; the maximum where they vary.
    pub(crate) fn planned_of(&self, captions: usize) -> u64 {
        if captions == 0 { self.planned_each } else { evaluations(&self.course, &Contenders::prompts(captions)) }
    }

    /// Bytes that a shard takes when every sample is begun and none is written.
    pub(super) fn shard_bytes(&self) -> u64 {
        self.sample_bytes * u64::from(self.shard_size)
    }

    /// How many shards the job has.
    pub fn shards(&self) -> u32 {
        self.samples.div_ceil(u64::from(self.shard_size.max(1))) as u32
    }

    /// The evaluations of all samples if none is given up. This is the maximum in races, and if classes have different
    /// numbers of prompts.
    pub fn planned_evaluations(&self) -> u64 {
        self.planned
    }

    /// An estimate of the evaluations of all samples, from `totals` and the number of `open` samples.
    ///
    /// In a race only ended samples tell their cost, and easy ones end first. Active samples are assumed to be half done,
    /// and untouched ones to be as hard as those that have ended.
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

/// The most evaluations that a sample takes in the course and its audit.
fn evaluations(course: &Course, contenders: &Contenders) -> u64 {
    let audit = course.audit().map_or_else(Vec::new, |audit| audit.costs(contenders));
    course.costs(contenders).iter().chain(&audit).map(|c| c.evaluations).sum()
}
