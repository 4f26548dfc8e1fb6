//! Pseudorandom choices among samples that are always the same: they come from a hash of the sample's key.

/// A sample's place in a random order. Each purpose and seed has its own order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Draw([u8; 16]);

impl Draw {
    /// The place of the sample with this key.
    pub fn new(purpose: &str, seed: Option<u64>, key: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(purpose.as_bytes());
        if let Some(seed) = seed {
            hasher.update(&seed.to_le_bytes());
        }
        let mut place = [0; 16];
        hasher.update(key.as_bytes()).finalize_xof().fill(&mut place);
        Self(place)
    }

    /// The draw as a number, uniform over 64 bits.
    pub fn number(self) -> u64 {
        let [low @ .., _, _, _, _, _, _, _, _] = self.0;
        u64::from_le_bytes(low)
    }

    /// The draw as a number, uniform in [0, 1).
    pub fn fraction(self) -> f64 {
        (self.number() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_uniform_and_depend_on_purpose_seed_and_key() {
        let of = |purpose, seed| (0..1000).map(|i| Draw::new(purpose, seed, &i.to_string())).collect::<Vec<_>>();
        let fractions: Vec<f64> = of("audit", Some(1)).into_iter().map(Draw::fraction).collect();
        assert!(fractions.iter().all(|fraction| (0.0..1.0).contains(fraction)));
        let mean = fractions.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
        let all = [of("audit", Some(1)), of("audit", Some(2)), of("subset", Some(1)), of("audit", None)];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| one.iter().zip(other).all(|(a, b)| a != b)));
        }
    }
}
