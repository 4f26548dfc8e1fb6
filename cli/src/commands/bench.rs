//! `elbo bench`: measures parts of the system on this machine.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use elbo_bench::CoordinatorBenchOptions;
use elbo_bench::policy::synthetic::Model;
use elbo_bench::policy::{Reference, recorded};
use elbo_core::job::DEFAULT_SHARD_SIZE;
use elbo_core::preset::Preset;
use elbo_store::{Location, Store};

use crate::args::{BenchArgs, BenchCommand, BenchCoordinatorArgs, BenchEngineArgs, BenchPolicyArgs, BenchScalingArgs};
use crate::failure::usage;
use crate::{print, session};

/// Runs a benchmark.
pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Coordinator(args) => coordinator(args).await,
        BenchCommand::Engine(args) => engine(args),
        BenchCommand::Policy(args) => policy(args).await,
        BenchCommand::Scaling(args) => scaling(args).await,
    }
}

fn program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("finding this program, which also runs the coordinator")
}

fn engine(args: BenchEngineArgs) -> anyhow::Result<()> {
    if !args.seconds.is_finite() || args.seconds <= 0.0 {
        return Err(usage(format!("--seconds {} must be a positive number", args.seconds)));
    }
    let [device] = args.device.find().map_err(usage)?.engines(1)[..] else {
        return Err(usage("--device takes one device here"));
    };
    let options = elbo_bench::engine::EngineBenchOptions {
        subject: args.model,
        batches: args.batch.into_iter().map(NonZeroUsize::get).collect(),
        prompts: args.prompts.get(),
        dtype: args.dtype,
        device,
        threads: args.threads.unwrap_or_else(session::cores).get(),
        latent: args.latent.map(NonZeroUsize::get),
        seconds: args.seconds,
        rounds: args.rounds.get(),
        peak: !args.no_peak,
        trace: args.profile,
        peers: args.peer,
    };
    let tell = |note: &str| print::note(note);
    if args.capture {
        return Ok(elbo_bench::engine::capture(&options, tell)?);
    }
    let report = elbo_bench::engine::run(&options, tell)?;
    if args.json { print::json(&report) } else { print::line(&report) }
}

async fn policy(args: BenchPolicyArgs) -> anyhow::Result<()> {
    /// Slots of random errors: as many as the longest published schedule uses.
    const DRAWN: u32 = 1000;
    let errors = match (&args.out, args.synthetic) {
        (Some(out), _) => recorded::read(&Store::open(&Location::parse(out)?)?).await?,
        (None, classes) => {
            let classes = classes.map_or(1000, NonZeroUsize::get);
            Model { classes, samples: args.images.get(), slots: DRAWN, seed: args.seed }.draw()
        }
    };
    let preset = args.preset.or(args.out.is_none().then_some(Preset::Imagenet));
    let stages = || Reference::Stages { keep: args.keep.clone(), samples: args.samples.clone() };
    let options = elbo_bench::policy::PolicyBenchOptions {
        reference: preset.map_or_else(stages, Reference::Preset),
        risks: args.risk,
        max_slots: args.max_slots,
        // Random errors have the same distribution at all timesteps, so a pilot would learn nothing.
        pilot: (args.pilot > 0 && args.out.is_some()).then_some(args.pilot),
        seed: args.seed,
    };
    let (table, pilot) = elbo_bench::policy::run(&errors, &options)?;
    if let Some(path) = &args.csv {
        std::fs::write(path, table.csv()?).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.timesteps_to {
        let pilot = pilot.ok_or_else(|| usage("--timesteps-to needs a pilot: give --pilot a number of images"))?;
        let json = serde_json::to_string_pretty(&pilot.timesteps())?;
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    }
    if args.json { print::json(&table) } else { print::text(&table) }
}

async fn scaling(args: BenchScalingArgs) -> anyhow::Result<()> {
    for (name, value) in [("rate", args.rate), ("seconds", args.seconds)] {
        if !value.is_finite() || value <= 0.0 {
            return Err(usage(format!("--{name} {value} must be a positive number")));
        }
    }
    let most = args.workers.iter().copied().max().map_or(1, NonZeroUsize::get);
    if args.deaths > most {
        return Err(usage(format!("--deaths {} is more than the {most} workers there are", args.deaths)));
    }
    let dir = tempfile::tempdir().context("making a directory for the job")?;
    let options = elbo_bench::scaling::ScalingBenchOptions {
        program: program()?,
        dir: dir.path().to_owned(),
        workers: args.workers.into_iter().map(NonZeroUsize::get).collect(),
        rate: args.rate,
        seconds: args.seconds,
        deaths: args.deaths,
    };
    session::allow_connections();
    let found = elbo_bench::scaling::run(&options, |note| print::note(note)).await?;
    if args.json { print::json(&found) } else { print::line(&found) }
}

async fn coordinator(args: BenchCoordinatorArgs) -> anyhow::Result<()> {
    let seconds = |name: &str, seconds: f64| {
        let duration = Duration::try_from_secs_f64(seconds).ok();
        duration.ok_or_else(|| usage(format!("--{name} {seconds} is not a time in seconds")))
    };
    if let Some(rate) = args.rate.iter().find(|rate| !rate.is_finite() || **rate <= 0.0) {
        return Err(usage(format!("--rate {rate} must be a positive number of evaluations per second")));
    }
    let most = args.preset.keep().iter().copied().max().unwrap_or(1);
    if args.classes < most {
        return Err(usage(format!(
            "--classes {} is too few for the schedule {}, which keeps {most}: give more, or another --preset",
            args.classes, args.preset
        )));
    }
    let needed = args.shards.saturating_mul(u64::from(DEFAULT_SHARD_SIZE));
    if args.samples.get() <= needed {
        return Err(usage(format!(
            "--samples {} is too few: {} shards of {DEFAULT_SHARD_SIZE} images are finished, and some images must \
             remain; give more, or fewer --shards",
            args.samples, args.shards
        )));
    }
    let options = CoordinatorBenchOptions {
        program: program()?,
        dir: args.dir,
        samples: args.samples.get(),
        classes: args.classes,
        preset: args.preset,
        workers: args.workers.get(),
        rates: args.rate,
        seconds: seconds("seconds", args.seconds).and_then(|d| match d {
            Duration::ZERO => Err(usage("--seconds must be more than 0")),
            d => Ok(d),
        })?,
        shards: args.shards,
        settle: seconds("settle", args.settle)?,
    };
    // Each simulated worker also needs a connection in this process.
    let _ = session::allow_connections();
    let report = elbo_bench::run(&options, |note| print::note(note)).await?;
    if args.json { print::json(&report) } else { print::line(&report) }
}
