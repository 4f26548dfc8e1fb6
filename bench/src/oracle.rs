//! The simulated error of every evaluation: a pure function of sample, prompt and slots, so that the coordinator's results
//! can be checked.

use elbo_core::ids::SampleId;
use elbo_proto::v1;

use crate::random::mix;

/// The mean error of a prompt on a sample, in [0.5, 1).
pub fn mean(sample: u64, prompt: u32) -> f64 {
    let mut state = sample << 20 | u64::from(prompt);
    0.5 + (mix(&mut state) >> 12) as f64 / (1u64 << 53) as f64
}

/// The result that a worker reports for a unit.
pub fn evaluate(unit: &v1::Unit) -> v1::UnitResult {
    let sample = unit.id.map_or(0, |id| id.sample);
    let slots = unit.slot_end.saturating_sub(unit.slot_begin);
    let means = || unit.prompts.iter().map(|&prompt| mean(sample, prompt));
    v1::UnitResult {
        id: unit.id,
        prompts: unit.prompts.clone(),
        slots,
        sum: means().map(|mean| mean * f64::from(slots)).collect(),
        // Some spread around the mean, as with real errors.
        sum_sq: means().map(|mean| 1.1 * mean * mean * f64::from(slots)).collect(),
        errors: Vec::new(),
    }
}

/// The prompt that must win: the one with the lowest mean, which is never eliminated.
pub fn winner(sample: SampleId, prompts: u32) -> Option<u32> {
    (0..prompts).min_by(|a, b| mean(sample.0, *a).total_cmp(&mean(sample.0, *b)))
}

/// The number of evaluations in a unit.
pub fn evaluations(unit: &v1::Unit) -> u64 {
    u64::from(unit.slot_end.saturating_sub(unit.slot_begin)) * unit.prompts.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_match_the_slots_and_the_lowest_mean_wins() {
        let id = v1::UnitId { sample: 7, round: 0, slots: 0, prompts: 0 };
        let unit = v1::Unit { id: Some(id), slot_begin: 10, slot_end: 30, prompts: vec![3, 5] };
        let result = evaluate(&unit);
        assert_eq!((result.slots, evaluations(&unit)), (20, 40));
        for (i, prompt) in [3, 5].into_iter().enumerate() {
            assert!((result.sum[i] / 20.0 - mean(7, prompt)).abs() < 1e-12);
            // The coordinator checks this too.
            assert!(result.sum[i] * result.sum[i] <= 20.0 * result.sum_sq[i]);
        }
        let best = winner(SampleId(7), 100).unwrap();
        assert!((0..100).all(|prompt| mean(7, best) <= mean(7, prompt)));
    }
}
