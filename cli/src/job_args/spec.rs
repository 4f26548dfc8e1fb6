//! Turns flags into a job's specification.

use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Context as _;
use elbo_core::audit::Audit;
use elbo_core::class::{ClassError, Classes, Hierarchy, ModelLabels};
use elbo_core::ensemble::{Contenders, PromptEnsemble};
use elbo_core::job::{DEFAULT_SHARD_SIZE, JobSpec, Lora, ModelDtype, Shortlist};
use elbo_core::loss::Loss;
use elbo_core::noise::NoiseScope;
use elbo_core::policy::{Course, DEFAULT_MAX_SLOTS, DEFAULT_RISK, Policy, Timesteps};
use elbo_core::preset::Preset;
use elbo_data::{self, LabelSource};
use elbo_hub::model_files::is_contrastive;
use elbo_hub::model_source::ModelSource;
use elbo_store::files;

use super::{JobArgs, NoiseScopeName, PolicyName};
use crate::failure::{bad_policy, usage};

/// What a model takes as input for a class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// Prompts, at many timesteps.
    Prompts,
    /// Prompts, once per image: a contrastive model.
    PromptsOnce,
    /// Labels it was trained on.
    Labels(ModelLabels),
}

impl Takes {
    /// What the model in a directory takes as input.
    pub(crate) fn of_model(directory: &Path) -> anyhow::Result<Self> {
        if is_contrastive(directory) {
            return Ok(Self::PromptsOnce);
        }
        Ok(elbo_hub::model_config::labels(directory)?.map_or(Self::Prompts, Self::Labels))
    }
}

impl JobArgs {
    /// The classes, from their file or from the labels of a class-conditional model; none if every image has its own
    /// captions.
    pub(crate) fn read_classes(&self, takes: &Takes) -> anyhow::Result<Classes> {
        let labels = match takes {
            Takes::Labels(labels) => Some(labels),
            Takes::Prompts | Takes::PromptsOnce => None,
        };
        if self.candidates.is_some() {
            self.check_candidates(labels)?;
            return Ok(Classes::default());
        }
        let template = |error| match error {
            ClassError::Template(_) => usage(error),
            other => other.into(),
        };
        match (labels, &self.classes, &self.class_map) {
            (None, Some(path), None) => elbo_data::given::classes(path, &self.template).map_err(template),
            (None, None, None) => Err(usage("--classes is missing: give a file with the classes")),
            (None, _, Some(_)) => {
                Err(usage("--class-map is for class-conditional models: give this one --classes with prompts"))
            }
            (Some(_), Some(_), Some(_)) => Err(usage("--classes and --class-map exclude each other: give one of them")),
            (Some(labels), None, Some(path)) => Ok(elbo_data::given::class_map(path, labels)?),
            (Some(labels), Some(path), None) => {
                elbo_data::given::classes_of_labels(path, &self.template, labels).map_err(template)
            }
            (Some(labels), None, None) => Ok(Classes::of_model(labels)),
        }
    }

    /// The hierarchy above the classes.
    pub(crate) fn read_hierarchy(&self, takes: &Takes, classes: &Classes) -> anyhow::Result<Option<Hierarchy>> {
        let Some(path) = &self.hierarchy else { return Ok(None) };
        if *takes != Takes::Prompts {
            return Err(usage(
                "--hierarchy needs a diffusion model with prompts: leave it out for class-conditional and \
                 contrastive models",
            ));
        }
        Ok(Some(elbo_data::given::hierarchy(path, classes, &self.template)?))
    }

    /// Refuses flags that have no meaning, or another one, when every image has its own captions.
    fn check_candidates(&self, labels: Option<&ModelLabels>) -> anyhow::Result<()> {
        let refused = [
            (labels.is_some(), "a class-conditional model", "it knows classes and reads no captions"),
            (self.class_map.is_some(), "--class-map", "captions are not classes of a model"),
            (self.classes.is_some(), "--classes", "every image is judged by its own captions"),
            (self.shortlist.is_some(), "--shortlist", "an image has few captions"),
            (!self.template.is_empty(), "--template", "captions are used unchanged"),
            (self.top_k.is_some(), "--top-k", "the scores of all captions are compared"),
            (self.prompt_ensemble == Some(PromptEnsemble::Mean), "--prompt-ensemble mean", "a caption is one prompt"),
        ];
        if let Some((_, flag, reason)) = refused.iter().find(|(given, ..)| *given) {
            return Err(usage(format!("{flag} and --candidates exclude each other, since {reason}: leave one out")));
        }
        Ok(())
    }

    /// How the scores of a class's prompts are combined.
    pub(crate) fn ensemble(&self) -> PromptEnsemble {
        self.prompt_ensemble.unwrap_or_default()
    }

    /// The shortlist's model and size.
    pub(crate) fn to_shortlist(&self) -> anyhow::Result<Option<Shortlist>> {
        self.shortlist.as_deref().map(|text| text.parse().map_err(usage)).transpose()
    }

    /// The source of the shortlist's model.
    pub(crate) fn shortlist_source(&self) -> anyhow::Result<Option<ModelSource>> {
        let shortlist = self.to_shortlist()?;
        shortlist.map(|shortlist| ModelSource::parse(&shortlist.model).map_err(usage)).transpose()
    }

    /// The policy for a contrastive model, which evaluates each image once.
    fn once(&self) -> anyhow::Result<Policy> {
        let meaningless = [
            (self.policy.is_some() || self.preset.is_some(), "--policy and --preset"),
            (
                !self.keep.is_empty() || !self.samples.is_empty() || self.trials.is_some(),
                "--keep, --samples and --trials",
            ),
            (self.loss.is_some(), "--loss"),
            (self.noise.is_some() || self.noise_scope.is_some(), "--noise and --noise-scope"),
            (self.timestep_shift.is_some(), "--timestep-shift"),
            (self.size.is_some(), "--size"),
            (!self.lora.is_empty(), "--lora"),
            (self.shortlist.is_some(), "--shortlist"),
            (
                self.risk.is_some() || self.max_slots.is_some() || self.timesteps_from.is_some(),
                "--risk, --max-slots and --timesteps-from",
            ),
            (self.audit.is_some(), "--audit"),
        ];
        match meaningless.iter().find(|(given, _)| *given) {
            Some((_, flags)) => Err(usage(format!(
                "{flags} have no meaning for a contrastive model, which sees an image once: leave them out"
            ))),
            None => Policy::exhaustive(&[1], 1).map_err(bad_policy),
        }
    }

    /// The course of a job with these contenders and a model with this many timesteps.
    pub(crate) fn to_course(
        &self,
        takes: &Takes,
        timesteps: u32,
        contenders: Option<&Contenders>,
    ) -> anyhow::Result<Course> {
        let policy = self.to_policy(takes, contenders)?;
        let shortlist = self.to_shortlist()?.map(|shortlist| shortlist.keep);
        let course = Course::new(&policy, shortlist, timesteps, contenders).map_err(bad_policy)?;
        match self.to_audit(takes, contenders)? {
            Some(audit) => course.with_audit(&audit.policy, timesteps, contenders).map_err(bad_policy),
            None => Ok(course),
        }
    }

    /// The policy for a job with these contenders, or `None` if every image has its own captions.
    pub(crate) fn to_policy(&self, takes: &Takes, contenders: Option<&Contenders>) -> anyhow::Result<Policy> {
        if *takes == Takes::PromptsOnce {
            return self.once();
        }
        if self.preset.is_some() && self.policy.is_some() {
            return Err(usage("--preset and --policy exclude each other: a preset names its policy"));
        }
        let name = self.policy_name(contenders.is_some());
        self.check_policy_flags(name)?;
        let trials = self.trials.unwrap_or(1);
        let policy = match name {
            PolicyName::Race => {
                let timesteps =
                    self.timesteps_from.as_deref().map_or_else(|| Ok(Timesteps::default()), read_timesteps)?;
                let max_slots = self.max_slots.unwrap_or(DEFAULT_MAX_SLOTS);
                Policy::race(self.risk.unwrap_or(DEFAULT_RISK), max_slots, timesteps)
            }
            PolicyName::Exhaustive => {
                Policy::exhaustive(if self.samples.is_empty() { &[100] } else { &self.samples }, trials)
            }
            PolicyName::Reference => return self.reference(contenders),
        };
        policy.map_err(bad_policy)
    }

    /// The reference policy from these flags.
    fn reference(&self, contenders: Option<&Contenders>) -> anyhow::Result<Policy> {
        // The default schedule is adapted to few classes; an explicit one is used as given.
        let few = contenders.map_or(5, |c| c.len() as u32).clamp(1, 5);
        let default_keep = self.preset.map_or(vec![few, 1], |p| p.keep().to_vec());
        let default_samples = self.preset.map_or(vec![25, 250], |p| p.samples().to_vec());
        let keep = if self.keep.is_empty() { default_keep } else { self.keep.clone() };
        let samples = if self.samples.is_empty() { default_samples } else { self.samples.clone() };
        Policy::reference(&keep, &samples, self.trials.unwrap_or(1)).map_err(bad_policy)
    }

    /// The job's audit, if any.
    fn to_audit(&self, takes: &Takes, contenders: Option<&Contenders>) -> anyhow::Result<Option<Audit>> {
        let Some(share) = self.audit else { return Ok(None) };
        if *takes == Takes::PromptsOnce || self.policy_name(contenders.is_some()) != PolicyName::Race {
            return Err(usage("--audit compares --policy race with the reference: leave it out"));
        }
        Ok(Some(Audit { share, policy: self.reference(contenders)? }))
    }

    /// The requested policy, or the one that the other flags imply. The default is a race, or exhaustive if every image has
    /// its own few captions.
    fn policy_name(&self, are_shared: bool) -> PolicyName {
        let of_reference = !self.keep.is_empty() || !self.samples.is_empty() || self.trials.is_some();
        match self.policy {
            Some(name) => name,
            None if self.preset.is_some() => PolicyName::Reference,
            None if !are_shared => PolicyName::Exhaustive,
            None if of_reference && self.audit.is_none() => PolicyName::Reference,
            None => PolicyName::Race,
        }
    }

    /// Refuses flags that the policy does not use.
    fn check_policy_flags(&self, name: PolicyName) -> anyhow::Result<()> {
        let of_race = self.risk.is_some() || self.max_slots.is_some() || self.timesteps_from.is_some();
        if name != PolicyName::Race && of_race {
            return Err(usage(
                "--risk, --max-slots and --timesteps-from are for --policy race: leave them out, or --keep, --samples, \
                 --trials and --preset",
            ));
        }
        if name == PolicyName::Race
            && self.audit.is_none()
            && (!self.keep.is_empty() || !self.samples.is_empty() || self.trials.is_some())
        {
            return Err(usage(
                "--keep, --samples and --trials have no meaning with --policy race, which decides by --risk: leave them out, \
                 or add --policy reference, or --audit",
            ));
        }
        if name == PolicyName::Exhaustive && !self.keep.is_empty() {
            return Err(usage(
                "--keep has no meaning with --policy exhaustive (the default with --candidates), which eliminates \
                 no prompt: leave it out, or add --policy reference",
            ));
        }
        Ok(())
    }

    /// The source of the model, which all other decisions need.
    pub(crate) fn model_source(&self) -> anyhow::Result<ModelSource> {
        if self.images.is_none() {
            return Err(usage("--images is missing: give a directory or a list of images"));
        }
        let model = self
            .model
            .as_deref()
            .ok_or_else(|| usage("--model is missing: give a model in diffusers layout, or hf://owner/name"))?;
        ModelSource::parse(model).map_err(usage)
    }

    /// The contenders of all images; `None` if every image has its own captions.
    pub(crate) fn contenders(&self, classes: &Classes, hierarchy: Option<&Hierarchy>) -> Option<Contenders> {
        let contenders = self.candidates.is_none().then(|| Contenders::of_classes(classes, self.ensemble()))?;
        Some(match hierarchy {
            Some(hierarchy) => contenders.below(hierarchy, classes),
            None => contenders,
        })
    }

    /// The specification from these flags, for this kind of model.
    pub(crate) fn to_spec(&self, takes: &Takes) -> anyhow::Result<JobSpec> {
        let model = self.model_source()?;
        let images = self.images.as_deref().unwrap_or_default();
        let classes = self.read_classes(takes)?;
        let hierarchy = self.read_hierarchy(takes, &classes)?;
        let contenders = self.contenders(&classes, hierarchy.as_ref());
        let policy = self.to_policy(takes, contenders.as_ref())?;
        // Refuse a course that doesn't fit the classes before anything is opened.
        self.to_course(takes, u32::MAX, contenders.as_ref())?;
        let audit = self.to_audit(takes, contenders.as_ref())?;
        let shortlist = match (self.to_shortlist()?, self.shortlist_source()?) {
            (Some(shortlist), Some(source)) => Some(Shortlist { model: source.to_string(), ..shortlist }),
            _ => None,
        };
        if self.limit == Some(0) {
            return Err(usage("--limit 0 leaves no image: give at least 1"));
        }
        let shard_size = self.shard_size.unwrap_or(DEFAULT_SHARD_SIZE);
        if shard_size == 0 {
            return Err(usage("--shard-size must be at least 1"));
        }
        if let Some(least) = self.abstain_below.filter(|least| !(*least > 0.0 && *least < 1.0)) {
            return Err(usage(format!(
                "--abstain-below {least} is not a confidence: give a number between 0 and 1, like 0.9"
            )));
        }
        Ok(JobSpec {
            hierarchy,
            images: elbo_data::canonical(images)?,
            model: model.to_string(),
            lora: self.lora.iter().map(|text| lora(text)).collect::<anyhow::Result<_>>()?,
            classes,
            prompt_ensemble: self.ensemble(),
            candidates: self.candidates.clone(),
            image_column: self.image_column.clone(),
            shortlist,
            policy,
            audit,
            // This comes from another job's output, which is read later, where there is IO.
            calibration: None,
            abstain_below: self.abstain_below,
            loss: self.loss.or(self.preset.map(Preset::loss)).unwrap_or(Loss::L2),
            dtype: self.dtype.unwrap_or(ModelDtype::F32),
            size: self.size,
            timestep_shift: self.timestep_shift,
            seed: self.seed.unwrap_or(0),
            noise_scope: match self.noise_scope {
                Some(NoiseScopeName::Shared) => NoiseScope::Shared,
                Some(NoiseScopeName::Sample) | None => NoiseScope::Sample,
            },
            noise: self.noise.as_deref().map(|path| absolute(Path::new(path))).transpose()?,
            top_k: self.top_k.map(NonZeroU32::get),
            write_errors: self.write_errors,
            label_from: match self.label_from.as_deref() {
                None => None,
                Some(text) => Some(match LabelSource::from(text) {
                    LabelSource::File(file) => absolute(&file)?,
                    other => other.to_string(),
                }),
            },
            limit: self.limit,
            // Only a pilot uses a subset of the images.
            subset: None,
            shard_size,
        })
    }
}

/// A saved density of timesteps.
fn read_timesteps(path: &Path) -> anyhow::Result<Timesteps> {
    let text =
        files::read_given_to_string(path).with_context(|| format!("reading the timesteps {}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| {
        usage(format!(
            "the timesteps {}: {e}; a list like [{{\"from\": 400, \"to\": 900, \"share\": 1}}] is needed",
            path.display()
        ))
    })
}

fn lora(text: &str) -> anyhow::Result<Lora> {
    let Lora { path, scale } = text.parse().map_err(usage)?;
    Ok(Lora { path: absolute(Path::new(&path))?, scale })
}

fn absolute(path: &Path) -> anyhow::Result<String> {
    Ok(elbo_store::absolute(path)?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_race_is_the_default_and_flags_of_the_reference_select_it() {
        let three = Contenders::prompts(3);
        let policy = |flags: JobArgs| flags.to_policy(&Takes::Prompts, Some(&three));
        assert_eq!(policy(JobArgs::default()).unwrap(), Policy::race(0.05, 250, Timesteps::default()).unwrap());
        let samples = JobArgs { keep: vec![2, 1], samples: vec![25, 250], ..JobArgs::default() };
        assert_eq!(policy(samples).unwrap(), Policy::reference(&[2, 1], &[25, 250], 1).unwrap());
        let both = JobArgs { risk: Some(0.1), samples: vec![25, 250], ..JobArgs::default() };
        assert!(policy(both).unwrap_err().to_string().contains("are for --policy race"));
        let keep = JobArgs { policy: Some(PolicyName::Race), keep: vec![1], ..JobArgs::default() };
        assert!(policy(keep).unwrap_err().to_string().contains("add --policy reference"));
    }

    #[test]
    fn the_default_reference_adapts_to_few_classes_but_an_explicit_schedule_does_not() {
        let three = Contenders::prompts(3);
        let reference = JobArgs { policy: Some(PolicyName::Reference), ..JobArgs::default() };
        let policy = reference.to_policy(&Takes::Prompts, Some(&three)).unwrap();
        assert_eq!(policy, Policy::reference(&[3, 1], &[25, 250], 1).unwrap());
        let explicit = JobArgs { keep: vec![5, 1], samples: vec![25, 250], ..JobArgs::default() };
        assert!(explicit.to_course(&Takes::Prompts, 1000, Some(&three)).is_err());
    }

    #[test]
    fn images_with_their_own_captions_use_the_exhaustive_policy_unless_another_is_requested() {
        let matching = JobArgs { candidates: Some("captions".into()), ..JobArgs::default() };
        assert_eq!(matching.to_policy(&Takes::Prompts, None).unwrap(), Policy::exhaustive(&[100], 1).unwrap());
        let asked = JobArgs { policy: Some(PolicyName::Reference), ..matching.clone() };
        assert_eq!(asked.to_policy(&Takes::Prompts, None).unwrap(), Policy::reference(&[5, 1], &[25, 250], 1).unwrap());
        let preset = JobArgs { preset: Some(Preset::Pets), ..matching.clone() };
        assert_eq!(preset.to_policy(&Takes::Prompts, None).unwrap(), Preset::Pets.policy());
        let keep = JobArgs { keep: vec![1], ..matching };
        assert!(keep.to_policy(&Takes::Prompts, None).unwrap_err().to_string().contains("add --policy reference"));
    }

    #[test]
    fn flags_that_make_prompts_of_classes_exclude_captions() {
        let refused = |flags: JobArgs| {
            let flags = JobArgs { candidates: Some("c".into()), ..flags };
            flags.read_classes(&Takes::Prompts).unwrap_err().to_string()
        };
        assert!(
            refused(JobArgs { classes: Some("c".into()), ..JobArgs::default() }).contains("--classes and --candidates")
        );
        assert!(refused(JobArgs { template: vec!["{}".into()], ..JobArgs::default() }).contains("--template"));
        let mean = JobArgs { prompt_ensemble: Some(PromptEnsemble::Mean), ..JobArgs::default() };
        assert!(refused(mean).contains("--prompt-ensemble mean"));
        let top_k = JobArgs { top_k: NonZeroU32::new(1), ..JobArgs::default() };
        assert!(refused(top_k).contains("--top-k and --candidates"));
        assert!(
            refused(JobArgs { shortlist: Some("clip:5".into()), ..JobArgs::default() }).contains("--shortlist and")
        );
    }
}
