//! Shows a job's progress on stderr: a bar on a terminal, lines or JSON elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use clap::ValueEnum;
use elbo_coordinator::Progress;
use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};
use serde::Deserialize;
use tokio::sync::watch;

use crate::print;

/// Progress format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ProgressMode {
    /// A bar on a terminal, plain lines elsewhere
    #[default]
    Auto,
    /// A line every 5 seconds
    Plain,
    /// One JSON object per second
    Json,
    /// Nothing
    None,
}

/// Shows progress until the job ends.
pub(crate) async fn show(mode: ProgressMode, progress: watch::Receiver<Progress>) {
    match mode {
        ProgressMode::None => {}
        ProgressMode::Auto if std::io::stderr().is_terminal() => bar(progress).await,
        ProgressMode::Auto | ProgressMode::Plain => lines(progress, Duration::from_secs(5), plain).await,
        ProgressMode::Json => lines(progress, Duration::from_secs(1), json).await,
    }
}

async fn bar(mut progress: watch::Receiver<Progress>) {
    const STEPS: u64 = 10_000;
    let bar = ProgressBar::new(STEPS);
    // The template is a constant; if it were wrong, the default style would be fine.
    if let Ok(style) = ProgressStyle::with_template("{bar:30.cyan/dim} {percent:>3}%  {msg}") {
        bar.set_style(style.progress_chars("━╸─"));
    }
    let _cleared = Cleared(bar.clone());
    loop {
        let now = progress.borrow_and_update().clone();
        bar.set_position((now.share() * STEPS as f64) as u64);
        bar.set_message(message(&now));
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// Removes the bar when the task that draws it ends, for whatever reason.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn lines(progress: watch::Receiver<Progress>, every: Duration, line: impl Fn(&Progress) -> String) {
    let mut tick = tokio::time::interval(every);
    // The first tick is immediate, when there is nothing to show yet.
    tick.tick().await;
    loop {
        tick.tick().await;
        if progress.has_changed().is_err() {
            return;
        }
        print::note(line(&progress.borrow()));
    }
}

fn message(now: &Progress) -> String {
    let mut parts = vec![format!("{}/{} images", HumanCount(now.samples_done), HumanCount(now.samples))];
    if now.workers.is_empty() {
        parts.push("waiting for workers".into());
    } else if let Some(rate) = now.rate {
        parts.push(format!("{} evaluations/s", HumanCount(rate as u64)));
        if let Some(eta) = now.eta() {
            parts.push(format!("{} left", HumanDuration(eta)));
        }
    }
    if now.samples_quarantined > 0 {
        parts.push(format!("{} quarantined", HumanCount(now.samples_quarantined)));
    }
    if let Some(stalled) = &now.stalled {
        parts.push(format!("stalled: {stalled}"));
    }
    parts.join(", ")
}

fn plain(now: &Progress) -> String {
    format!("{:.1}%: {}", 100.0 * now.share(), message(now))
}

fn json(now: &Progress) -> String {
    serde_json::json!({
        "samples": now.samples,
        "samples_done": now.samples_done,
        "samples_quarantined": now.samples_quarantined,
        "evaluations": now.evaluations + now.unreported,
        "evaluations_total": now.evaluations_total,
        "evaluations_per_second": now.rate,
        "eta_seconds": now.eta().map(|eta| eta.as_secs_f64()),
        "workers": now.workers.len(),
        "stalled": now.stalled,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_without_workers_shows_that_it_waits() {
        let waiting = Progress { samples: 1200, ..Progress::default() };
        assert_eq!(message(&waiting), "0/1,200 images, waiting for workers");
    }
}
