//! The distribution of a race's slots over the timesteps.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Slot;

/// A range of timesteps with equally many slots each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The first timestep.
    pub from: u32,
    /// The end of the range, exclusive.
    pub to: u32,
    /// The share of slots in this span, relative to the other spans.
    pub share: f64,
}

/// The density of slots over the timesteps: each span gets slots in proportion to its share. Without spans the density is
/// uniform.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Span>")]
pub struct Timesteps(Vec<Span>);

impl TryFrom<Vec<Span>> for Timesteps {
    type Error = TimestepsError;

    fn try_from(spans: Vec<Span>) -> Result<Self, TimestepsError> {
        Self::new(spans)
    }
}

/// An invalid density.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TimestepsError {
    /// A span is empty, or begins before the previous one ends.
    #[error("the span of timesteps from {} to {} is empty, or begins before the one before it ends", .0.from, .0.to)]
    Order(Span),
    /// A share that is not a positive number.
    #[error("the span of timesteps from {} to {} has share {}: it must be a positive number", .0.from, .0.to, .0.share)]
    Share(Span),
    /// The spans exceed the model's timesteps.
    #[error("timesteps up to {to} were requested, but the model has {timesteps}")]
    Beyond {
        /// Where the last span ends.
        to: u32,
        /// Timesteps of the model.
        timesteps: u32,
    },
}

impl Timesteps {
    /// The density with these spans, in ascending order.
    pub fn new(spans: Vec<Span>) -> Result<Self, TimestepsError> {
        let mut end = 0;
        for span in &spans {
            if span.from >= span.to || span.from < end {
                return Err(TimestepsError::Order(*span));
            }
            if !(span.share > 0.0 && span.share.is_finite()) {
                return Err(TimestepsError::Share(*span));
            }
            end = span.to;
        }
        Ok(Self(spans))
    }

    /// A uniform density over a range of timesteps, with no slots elsewhere.
    pub fn within(range: Range<u32>) -> Result<Self, TimestepsError> {
        Self::new(vec![Span { from: range.start, to: range.end, share: 1.0 }])
    }

    /// Whether the density is uniform over all timesteps.
    pub fn is_even(&self) -> bool {
        self.0.is_empty()
    }

    /// The spans.
    pub fn spans(&self) -> &[Span] {
        &self.0
    }

    /// Checks that a model with this many timesteps has all the spans.
    pub fn check(&self, timesteps: u32) -> Result<(), TimestepsError> {
        match self.0.last() {
            Some(span) if span.to > timesteps => Err(TimestepsError::Beyond { to: span.to, timesteps }),
            _ => Ok(()),
        }
    }

    /// The first `count` slots for a model with this many timesteps. Every prefix is spread as evenly as possible over the
    /// density: the slots follow van der Corput's sequence (1935). Each slot has its own noise.
    pub fn slots(&self, timesteps: u32, count: u32) -> Vec<Slot> {
        (0..count).map(|i| Slot { timestep: self.quantile(radical_inverse(i + 1), timesteps), noise: i }).collect()
    }

    /// The timestep below which the share `at`, in [0, 1), of the density lies.
    fn quantile(&self, at: f64, timesteps: u32) -> u32 {
        let everything = [Span { from: 0, to: timesteps, share: 1.0 }];
        let spans = if self.0.is_empty() { &everything[..] } else { &self.0 };
        let mut rest = at * spans.iter().map(|span| span.share).sum::<f64>();
        for span in spans {
            if rest < span.share {
                let within = rest / span.share * f64::from(span.to - span.from);
                return (span.from + within as u32).min(span.to - 1);
            }
            rest -= span.share;
        }
        spans.last().map_or(0, |span| span.to - 1)
    }
}

/// The digits of `i` in base two, mirrored at the point: 1/2, 1/4, 3/4, 1/8, ...
fn radical_inverse(i: u32) -> f64 {
    f64::from(i.reverse_bits()) / 2f64.powi(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timesteps(density: &Timesteps, count: u32) -> Vec<u32> {
        density.slots(1000, count).iter().map(|slot| slot.timestep).collect()
    }

    #[test]
    fn every_prefix_is_spread_evenly_and_each_slot_has_a_noise_of_its_own() {
        assert_eq!(timesteps(&Timesteps::default(), 7), [500, 250, 750, 125, 625, 375, 875]);
        assert_eq!(timesteps(&Timesteps::within(400..800).unwrap(), 3), [600, 500, 700]);
        let noises: Vec<_> = Timesteps::default().slots(1000, 5).iter().map(|slot| slot.noise).collect();
        assert_eq!(noises, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn spans_get_their_shares() {
        let span = |from, to, share| Span { from, to, share };
        let density = Timesteps::new(vec![span(100, 200, 1.0), span(600, 700, 3.0)]).unwrap();
        let found = timesteps(&density, 255);
        assert_eq!(found.iter().filter(|t| (100..200).contains(*t)).count(), 63);
        assert!(found.iter().all(|t| (100..200).contains(t) || (600..700).contains(t)));
    }

    #[test]
    fn invalid_densities_are_refused() {
        let span = |from, to, share| Span { from, to, share };
        assert!(matches!(Timesteps::new(vec![span(5, 5, 1.0)]), Err(TimestepsError::Order(_))));
        assert!(matches!(Timesteps::new(vec![span(5, 9, 1.0), span(8, 10, 1.0)]), Err(TimestepsError::Order(_))));
        assert!(matches!(Timesteps::new(vec![span(5, 9, f64::NAN)]), Err(TimestepsError::Share(_))));
        let read = |json| serde_json::from_str::<Timesteps>(json);
        assert!(read(r#"[{"from": 800, "to": 300, "share": 1}]"#).unwrap_err().to_string().contains("from 800 to 300"));
        let fine = Timesteps::within(300..800).unwrap();
        assert_eq!(read(&serde_json::to_string(&fine).unwrap()).unwrap(), fine);
        assert!(Timesteps::within(0..1001).unwrap().check(1000).is_err());
    }
}
