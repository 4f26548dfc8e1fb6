//! How long tests wait. No result depends on it: the limits only end tests that hang.
//!
//! `ELBO_TEST_SLOWNESS=5` makes all waits five times as long, for a slow or busy machine.

use std::fmt::Display;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

static SLOWNESS: LazyLock<f64> = LazyLock::new(|| {
    let Ok(set) = std::env::var("ELBO_TEST_SLOWNESS") else { return 1.0 };
    let slowness = set.parse().ok().filter(|slowness: &f64| slowness.is_finite() && *slowness > 0.0);
    slowness.unwrap_or_else(|| panic!("ELBO_TEST_SLOWNESS={set} is not a factor like 5"))
});

/// This many seconds, or more on a slow machine.
pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds).mul_f64(*SLOWNESS)
}

/// How long to wait for a process or a state before it counts as a hang: a job that takes seconds on one processor takes
/// minutes on another.
pub fn patience() -> Duration {
    seconds(600)
}

/// Waits until a condition holds; `what` says what is missing if it never does.
#[track_caller]
pub fn wait_until<W: Display>(what: impl Fn() -> W, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + patience();
    while !is_so() {
        assert!(Instant::now() < end, "{}", what());
        std::thread::sleep(Duration::from_millis(20));
    }
}
