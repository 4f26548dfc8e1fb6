//! Blocks that failed: tried once more, then bisected down to the sample at fault.

use elbo_common::ids::LeaseId;
use elbo_common::unit::UnitId;

use super::{Brain, SampleFailure};

/// Units whose evaluation failed as a block.
#[derive(Clone, Debug)]
pub(super) struct Suspects {
    pub(super) units: Vec<UnitId>,
    pub(super) attempts: u32,
    failed_on: String,
}

impl Brain {
    /// A lease whose evaluation failed. Returns the samples that are beyond help.
    ///
    /// The block is tried once more; then it is bisected, down to single samples, which are given up after their second
    /// failure.
    pub fn fail(&mut self, lease: LeaseId, error: &str) -> Vec<SampleFailure> {
        let Some(failed) = self.end_lease(lease) else { return Vec::new() };
        self.unlease(&failed.units);
        let attempts = failed.attempt + 1;
        if attempts < 2 {
            self.suspects.push_back(Suspects { units: failed.units, attempts, failed_on: failed.worker });
            return Vec::new();
        }
        let mut samples: Vec<_> = failed.units.iter().map(|u| u.sample).collect();
        samples.dedup();
        if let [sample] = samples[..] {
            return vec![SampleFailure { sample, stage: "evaluate".into(), error: error.to_owned() }];
        }
        let middle = samples[samples.len() / 2];
        let (low, high): (Vec<_>, Vec<_>) = failed.units.into_iter().partition(|u| u.sample < middle);
        for units in [low, high] {
            // One attempt each is behind them: the next failure of a half splits it again.
            self.suspects.push_back(Suspects { units, attempts: 1, failed_on: failed.worker.clone() });
        }
        Vec::new()
    }

    /// Suspects for a worker, as far as they are still wanted.
    pub(super) fn take_suspects(&mut self, worker: &str) -> Option<Suspects> {
        // Suspects go to somebody else than the one they failed on, as long as there is somebody else.
        let alone = self.workers.len() < 2;
        let position = self.suspects.iter().position(|s| alone || s.failed_on != worker)?;
        let mut suspects = self.suspects.remove(position)?;
        let (open, job) = (&self.open, &self.job);
        suspects.units.retain(|id| open.get(&id.sample.shard(job.shard_size())).is_some_and(|s| s.is_wanted(*id)));
        if suspects.units.is_empty() { self.take_suspects(worker) } else { Some(suspects) }
    }
}
