//! The results of the coordinator benchmark.

use std::fmt;

use serde::Serialize;

use crate::process::Memory;

/// All results, as `--json` prints them. Times in seconds, sizes in bytes, `cpu` in seconds of one core.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Images in the dataset.
    pub samples: u64,
    /// Classes, with one prompt each.
    pub classes: u32,
    /// The schedule.
    pub preset: String,
    /// Simulated workers.
    pub workers: usize,
    /// From the start to the first lease.
    pub start: Start,
    /// Results with workers at a realistic rate.
    pub steady: Vec<Steady>,
    /// Results with workers that answer immediately.
    pub flat_out: FlatOut,
    /// After `kill -9`.
    pub restart: Start,
    /// The predictions of committed shards, compared with the expected ones.
    pub predictions: Predictions,
}

/// How long a coordinator takes until it is ready.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Start {
    /// Until `job.json` is written: the images are listed and the manifest is stored. `None` after a restart.
    pub manifest_seconds: Option<f64>,
    /// Until a worker gets its first block.
    pub first_lease_seconds: f64,
    /// CPU time until then.
    pub cpu_seconds: f64,
    /// Memory at that time.
    pub memory: Memory,
}

/// Results with workers at a realistic rate.
#[derive(Clone, Debug, Serialize)]
pub struct Steady {
    /// Evaluations per second of the average worker.
    pub rate: f64,
    /// Duration of the measurement.
    pub seconds: f64,
    /// Workers that died without notice during the phase and were replaced.
    pub died: usize,
    /// The coordinator's CPU time per second and 100 workers.
    pub cpu_per_100_workers: f64,
    /// Blocks leased per second.
    pub leases_per_second: f64,
    /// Reports per second.
    pub reports_per_second: f64,
    /// Evaluations reduced per second.
    pub evaluations_per_second: f64,
    /// Evaluations per second of a worker, divided by its capacity.
    pub busy: f64,
    /// Reported units that the coordinator already had.
    pub duplicates: u64,
    /// Calls that were refused.
    pub refused: u64,
    /// How long a worker waits for a block.
    pub lease: Quantiles,
    /// How long a report takes to be durable and acknowledged.
    pub report: Quantiles,
    /// Memory.
    pub memory: Memory,
    /// Size of the ledger at the end.
    pub ledger_bytes: u64,
}

/// Results with workers that answer immediately.
#[derive(Clone, Debug, Serialize)]
pub struct FlatOut {
    /// Duration of the measurement.
    pub seconds: f64,
    /// The coordinator's CPU time per second.
    pub cores: f64,
    /// Units per second, with one call per unit.
    pub units_per_second: f64,
    /// Units per second of the coordinator's CPU time: the capacity of one core.
    pub units_per_cpu_second: f64,
    /// Evaluations per second of the coordinator's CPU time.
    pub evaluations_per_cpu_second: f64,
    /// For the rates of [`Report::steady`], how many workers one core could feed.
    pub feeds: Vec<Feeds>,
    /// Reported units that the coordinator already had.
    pub duplicates: u64,
    /// Calls that were refused.
    pub refused: u64,
    /// How long a report takes.
    pub report: Quantiles,
    /// Shards committed.
    pub shards_done: u64,
    /// Shards open.
    pub shards_active: u64,
    /// Evaluations of open shards, whose sums the ledger must hold.
    pub evaluations_open: u64,
    /// Memory.
    pub memory: Memory,
    /// The largest size of the ledger.
    pub ledger_peak_bytes: u64,
    /// Its size after a pause for cleanup.
    pub ledger_settled_bytes: u64,
    /// Duration of the pause.
    pub settle_seconds: f64,
}

/// How many workers of a rate one core could feed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Feeds {
    /// Evaluations per second of a worker.
    pub rate: f64,
    /// Workers.
    pub workers: f64,
}

/// Times in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// Half of the times are shorter.
    pub median: f32,
    /// 99 % of the times are shorter.
    pub p99: f32,
    /// The longest time.
    pub longest: f32,
}

impl Quantiles {
    /// The quantiles of some times; all zero without times.
    pub fn of(mut seconds: Vec<f32>) -> Self {
        seconds.sort_by(f32::total_cmp);
        let at = |share: f64| {
            let last = seconds.len().saturating_sub(1);
            seconds.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
        };
        Self { median: at(0.5), p99: at(0.99), longest: at(1.0) }
    }
}

/// The predictions of committed shards.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Predictions {
    /// How many were checked.
    pub checked: u64,
    /// How many of them have a class other than the one with the lowest errors, or too many or too few evaluations.
    pub wrong: u64,
}

struct Mebibytes(u64);

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 as f64 / f64::from(1 << 20))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} resident, {} at most", Mebibytes(self.resident), Mebibytes(self.peak))
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} s median, {:.3} s p99, {:.3} s longest", self.median, self.p99, self.longest)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, classes, preset, workers, start, steady, flat_out, restart, predictions } = self;
        writeln!(f, "{samples} images, {classes} classes, schedule {preset}, {workers} simulated workers")?;
        writeln!(f, "\nstart")?;
        if let Some(seconds) = start.manifest_seconds {
            writeln!(f, "  listed, manifest stored   {seconds:.1} s")?;
        }
        writeln!(
            f,
            "  first lease               {:.1} s, {:.1} s of CPU",
            start.first_lease_seconds, start.cpu_seconds
        )?;
        writeln!(f, "  memory                    {}", start.memory)?;
        for s in steady {
            writeln!(f, "\n{} evaluations/s a worker, for {:.0} s; {} died", s.rate, s.seconds, s.died)?;
            writeln!(f, "  CPU per 100 workers       {:.2} % of a core", s.cpu_per_100_workers * 100.0)?;
            writeln!(f, "  leases/s, reports/s       {:.1}, {:.1}", s.leases_per_second, s.reports_per_second)?;
            writeln!(f, "  evaluations/s             {:.0}", s.evaluations_per_second)?;
            writeln!(f, "  workers busy              {:.1} %", s.busy * 100.0)?;
            writeln!(f, "  waiting for a block       {}", s.lease)?;
            writeln!(f, "  waiting for a report      {}", s.report)?;
            writeln!(f, "  duplicates, refused       {}, {}", s.duplicates, s.refused)?;
            writeln!(f, "  memory                    {}", s.memory)?;
            writeln!(f, "  ledger                    {}", Mebibytes(s.ledger_bytes))?;
        }
        let o = flat_out;
        writeln!(f, "\nflat out, for {:.0} s", o.seconds)?;
        writeln!(f, "  CPU                       {:.2} cores", o.cores)?;
        writeln!(f, "  units/s                   {:.0}", o.units_per_second)?;
        writeln!(f, "  units/s of one core       {:.0}", o.units_per_cpu_second)?;
        for Feeds { rate, workers } in &o.feeds {
            writeln!(f, "  one core could feed       {workers:.0} workers of {rate} evaluations/s")?;
        }
        writeln!(f, "  waiting for a report      {}", o.report)?;
        writeln!(f, "  duplicates, refused       {}, {}", o.duplicates, o.refused)?;
        writeln!(f, "  shards                    {} done, {} open", o.shards_done, o.shards_active)?;
        writeln!(f, "  evaluations in open ones  {}", o.evaluations_open)?;
        writeln!(f, "  memory                    {}", o.memory)?;
        writeln!(
            f,
            "  ledger                    {} at most, {} after {:.0} s of rest",
            Mebibytes(o.ledger_peak_bytes),
            Mebibytes(o.ledger_settled_bytes),
            o.settle_seconds
        )?;
        writeln!(f, "\nkilled and started again")?;
        writeln!(
            f,
            "  first lease               {:.1} s, {:.1} s of CPU",
            restart.first_lease_seconds, restart.cpu_seconds
        )?;
        writeln!(f, "  memory                    {}", restart.memory)?;
        write!(f, "\npredictions                 {} checked, {} wrong", predictions.checked, predictions.wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let quantiles = Quantiles::of((0..=100).rev().map(|n| n as f32).collect());
        assert_eq!((quantiles.median, quantiles.p99, quantiles.longest), (50.0, 99.0, 100.0));
        assert_eq!(Quantiles::of(Vec::new()).longest, 0.0);
    }
}
