//! `elbo plan`: counts the evaluations of a job without running it.

use std::collections::BTreeMap;
use std::fmt::Write;

use elbo_coordinator::JobError;
use elbo_coordinator::pilot::PilotError;
use elbo_core::ensemble::{Contenders, PromptEnsemble};
use elbo_core::policy::pilot::Pilot;
use elbo_core::policy::{Course, Policy, RoundCost};
use elbo_core::sample::Sample;
use elbo_data::{self, Account, DatasetError, LabelSource, ListOptions, SampleSink};
use elbo_hub::model_source::{ModelSource, Wanted};
use indicatif::HumanCount;
use serde::Serialize;

use crate::args::PlanArgs;
use crate::failure::{bad_policy, usage};
use crate::job_args::{JobArgs, Takes};
use crate::{print, session};

/// Training timesteps of nearly every model, for plans without one.
const USUAL_TIMESTEPS: u32 = 1000;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Plan {
    samples: Option<u64>,
    /// What the listing passed over.
    #[serde(skip_serializing_if = "Account::is_empty")]
    passed_over: Account,
    /// If images have their own captions, the number of captions of the image with the most; `prompts` and `rounds` are also
    /// for that image.
    classes: usize,
    prompts: usize,
    prompt_ensemble: PromptEnsemble,
    rounds: Vec<RoundCost>,
    evaluations_per_image: u64,
    evaluations_total: Option<u64>,
    /// Evaluations of the pilot.
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluations_pilot: Option<u64>,
    /// Whether images may need fewer evaluations than `rounds` says: in a race, with fewer captions, or when the classes with
    /// the most prompts are eliminated first.
    #[serde(skip)]
    at_most: bool,
    /// The minimum evaluations per image in a race.
    #[serde(skip)]
    least: Option<u64>,
}

/// Counts samples, classes and evaluations.
pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<()> {
    let flags = args.job.resolve()?;
    if flags.candidates.is_some() && flags.images.is_none() {
        return Err(usage("--images is missing: give the list with the column that --candidates names"));
    }
    let (timesteps, takes) = match &flags.model {
        None => (USUAL_TIMESTEPS, Takes::Prompts),
        Some(model) => {
            let model = ModelSource::parse(model).map_err(usage)?;
            let directory = session::resolve(&model, Wanted::Configuration).await?;
            (elbo_hub::model_config::timesteps(&directory)?, Takes::of_model(&directory)?)
        }
    };
    let classes = flags.read_classes(&takes)?;
    let of_job = flags.contenders(&classes, flags.read_hierarchy(&takes, &classes)?.as_ref());
    let course = flags.to_course(&takes, timesteps, of_job.as_ref())?;
    let (captions, passed_over) = match &flags.images {
        None => (None, Account::default()),
        Some(images) => {
            let label_from = flags.label_from.as_deref().map(LabelSource::from);
            let options = ListOptions {
                label_from: label_from.as_ref(),
                candidates: flags.candidates.as_deref(),
                image_column: flags.image_column.as_deref(),
                classes: of_job.is_some().then_some(&classes),
                limit: flags.limit,
                origins: &flags.list_origins,
            };
            let mut counts = CaptionCounts::default();
            let listed = elbo_data::list(images, &options, &mut counts).await?;
            if flags.strict && !listed.passed_over.is_empty() {
                return Err(JobError::PassedOver(listed.passed_over).into());
            }
            (Some(counts.0), listed.passed_over)
        }
    };
    let contenders = |captions| of_job.clone().unwrap_or_else(|| Contenders::prompts(captions));
    let cost = |captions| course.costs(&contenders(captions)).iter().map(|r| r.evaluations).sum::<u64>();
    let most = captions.as_ref().and_then(|counts| counts.last_key_value()).map_or(0, |(captions, _)| *captions);
    let largest = contenders(most);
    let plan = Plan {
        samples: captions.as_ref().map(|counts| counts.values().sum()),
        passed_over,
        classes: if of_job.is_some() { classes.names.len() } else { most },
        prompts: largest.of_all_classes().count(),
        prompt_ensemble: flags.ensemble(),
        rounds: course.costs(&largest),
        evaluations_per_image: cost(most),
        evaluations_pilot: match flags.pilot_images() {
            Some(images) => {
                let samples = captions.as_ref().map(|counts| counts.values().sum());
                let each = pilot_evaluations(&flags, &takes, timesteps, of_job.as_ref())?;
                Some(images.min(samples.unwrap_or(u64::MAX)) * each)
            }
            None => None,
        },
        evaluations_total: captions.as_ref().map(|counts| counts.iter().map(|(captions, n)| n * cost(*captions)).sum()),
        least: course.needs_pairs().then(|| (course.first_slots(largest.first().len()) * largest.first().len()) as u64),
        at_most: course.needs_pairs() || !largest.are_even() || captions.is_some_and(|counts| counts.len() > 1),
    };
    if args.json { print::json(&plan) } else { print::text(text(&plan, args.rate)?) }
}

/// Evaluations per image of a job's pilot.
fn pilot_evaluations(
    flags: &JobArgs,
    takes: &Takes,
    timesteps: u32,
    contenders: Option<&Contenders>,
) -> anyhow::Result<u64> {
    let is_race = matches!(flags.to_policy(takes, contenders)?, Policy::Race { .. });
    let Some(contenders) = contenders.filter(|_| is_race).map(Contenders::without_groups) else {
        return Err(usage(PilotError::NoRace));
    };
    let shortlist = flags.to_shortlist()?.map(|shortlist| shortlist.keep);
    let policy = Pilot::policy(shortlist.unwrap_or(contenders.len() as u32), timesteps).map_err(bad_policy)?;
    let course = Course::new(&policy, shortlist, timesteps, Some(&contenders)).map_err(bad_policy)?;
    Ok(course.costs(&contenders).iter().map(|round| round.evaluations).sum())
}

/// The number of samples for each number of captions.
#[derive(Debug, Default)]
struct CaptionCounts(BTreeMap<usize, u64>);

impl SampleSink for CaptionCounts {
    fn take(&mut self, sample: Sample) -> Result<(), DatasetError> {
        *self.0.entry(sample.candidates.len()).or_default() += 1;
        Ok(())
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

fn text(plan: &Plan, rate: Option<f64>) -> anyhow::Result<String> {
    let mut text = String::new();
    let count = |n: u64| HumanCount(n).to_string();
    match plan.samples {
        Some(samples) => writeln!(text, "images               {:>14}", count(samples))?,
        None => writeln!(text, "images               {:>14}", "not given")?,
    }
    for passed in plan.passed_over.passed_over() {
        writeln!(text, "passed over, {passed}")?;
    }
    writeln!(text, "classes              {:>14}", count(plan.classes as u64))?;
    writeln!(text, "prompts              {:>14}", count(plan.prompts as u64))?;
    if plan.prompts > plan.classes {
        writeln!(text, "prompts of a class   {:>14}", plan.prompt_ensemble.to_string())?;
    }
    for (i, round) in plan.rounds.iter().enumerate() {
        writeln!(
            text,
            "round {i}              {:>14} evaluations an image: {} prompts on {} new slots",
            count(round.evaluations),
            count(round.prompts),
            count(round.slots)
        )?;
    }
    let at_most = match (plan.least, plan.at_most) {
        (Some(least), _) => format!(" at most, {} at least: a race ends as soon as one class is left", count(least)),
        (None, true) => " at most".to_owned(),
        (None, false) => String::new(),
    };
    writeln!(text, "evaluations an image {:>14}{at_most}", count(plan.evaluations_per_image))?;
    if let Some(pilot) = plan.evaluations_pilot {
        writeln!(text, "evaluations of pilot {:>14} before", count(pilot))?;
    }
    let Some(total) = plan.evaluations_total else { return Ok(text) };
    writeln!(text, "evaluations in all   {:>14}", count(total))?;
    match rate {
        Some(rate) if rate > 0.0 && rate.is_finite() => {
            writeln!(
                text,
                "time                 {:>14.1} hours at {rate} evaluations/s",
                total as f64 / rate / 3600.0
            )?;
        }
        Some(_) => return Err(usage("--rate must be a positive number of evaluations per second")),
        None => writeln!(text, "time                 {:>14} give --rate EVALUATIONS_PER_SECOND", "?")?,
    }
    Ok(text)
}
