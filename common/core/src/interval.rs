//! Confidence intervals of counted shares.

/// Wilson's 95 % interval (1927) of the share `hits / of`.
pub fn wilson(hits: u64, of: u64) -> (f64, f64) {
    const Z: f64 = 1.959_964;
    let n = of.max(1) as f64;
    let (share, square) = (hits as f64 / n, Z * Z / n);
    let centre = (share + square / 2.0) / (1.0 + square);
    let half = Z / (1.0 + square) * (share * (1.0 - share) / n + square / (4.0 * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_matches_wilsons() {
        // R: prop.test(98, 100, correct = FALSE) gives 0.9299882 and 0.9944980; so does scipy.stats.binomtest.
        let (low, high) = wilson(98, 100);
        assert!((low - 0.929_988).abs() < 1e-5 && (high - 0.994_498).abs() < 1e-5, "{low} {high}");
        assert!(wilson(5, 5).1 <= 1.0 && wilson(0, 5).0 < 1e-12);
    }
}
