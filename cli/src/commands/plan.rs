//! `elbo plan`: what a job would evaluate, without running it.

use elbo_common::class::ModelLabels;
use elbo_common::dataset::{self, LabelSource};
use elbo_common::model_source::{ModelSource, Wanted};
use elbo_common::policy::{RoundCost, costs};
use elbo_common::schedule::NoiseSchedule;
use indicatif::HumanCount;
use serde::Serialize;

use crate::args::PlanArgs;
use crate::failure::usage;
use crate::session;

/// Training timesteps of nearly every model, for plans without one.
const USUAL_TIMESTEPS: u32 = 1000;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Plan {
    samples: Option<u64>,
    classes: usize,
    prompts: usize,
    rounds: Vec<RoundCost>,
    evaluations_per_image: u64,
    evaluations_total: Option<u64>,
}

/// Counts samples, classes and evaluations.
pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<()> {
    let flags = args.job.resolve()?;
    let (timesteps, labels) = match &flags.model {
        None => (USUAL_TIMESTEPS, None),
        Some(model) => {
            let model = ModelSource::parse(model).map_err(usage)?;
            let directory = session::resolve(&model, Wanted::Configuration).await?;
            (NoiseSchedule::of_model(&directory)?.timesteps(), ModelLabels::of_model(&directory)?)
        }
    };
    let classes = flags.read_classes(labels.as_ref())?;
    let prompts = classes.prompts.len();
    let rounds = flags.to_policy(prompts)?.rounds(timesteps, prompts).map_err(usage)?;
    let samples = match &flags.images {
        None => None,
        Some(images) => {
            let labels = flags.label_from.as_deref().map(LabelSource::from);
            Some(dataset::list(images, labels.as_ref(), flags.limit).await?.len() as u64)
        }
    };
    let rounds = costs(&rounds, prompts);
    let evaluations_per_image = rounds.iter().map(|r| r.evaluations).sum();
    let plan = Plan {
        samples,
        classes: classes.names.len(),
        prompts,
        rounds,
        evaluations_per_image,
        evaluations_total: samples.map(|n| n * evaluations_per_image),
    };
    if args.json {
        println!("{}", serde_json::to_string(&plan)?);
        return Ok(());
    }
    print(&plan, args.rate)
}

fn print(plan: &Plan, rate: Option<f64>) -> anyhow::Result<()> {
    let count = |n: u64| HumanCount(n).to_string();
    match plan.samples {
        Some(samples) => println!("images               {:>14}", count(samples)),
        None => println!("images               {:>14}", "not given"),
    }
    println!("classes              {:>14}", count(plan.classes as u64));
    println!("prompts              {:>14}", count(plan.prompts as u64));
    for (i, round) in plan.rounds.iter().enumerate() {
        println!(
            "round {i}              {:>14} evaluations an image: {} prompts on {} new slots",
            count(round.evaluations),
            count(round.prompts),
            count(round.slots)
        );
    }
    println!("evaluations an image {:>14}", count(plan.evaluations_per_image));
    let Some(total) = plan.evaluations_total else { return Ok(()) };
    println!("evaluations in all   {:>14}", count(total));
    match rate {
        Some(rate) if rate > 0.0 && rate.is_finite() => {
            println!("time                 {:>14.1} hours at {rate} evaluations/s", total as f64 / rate / 3600.0);
        }
        Some(_) => return Err(usage("--rate must be a positive number of evaluations per second")),
        None => println!("time                 {:>14} give --rate EVALUATIONS_PER_SECOND", "?"),
    }
    Ok(())
}
