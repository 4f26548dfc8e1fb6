//! `elbo inspect`: describes a model and finds problems with it.

use std::fmt::Write;

use elbo_hub::model_source::{ModelSource, Wanted};
use elbo_models::Inspection;
use indicatif::{BinaryBytes, HumanCount};

use crate::args::InspectArgs;
use crate::failure::usage;
use crate::{print, session};

/// Inspects a model; fails if a job could not use it.
pub(crate) async fn run(args: InspectArgs) -> anyhow::Result<()> {
    let source = ModelSource::parse(&args.model).map_err(usage)?;
    let directory = session::resolve(&source, Wanted::Everything).await?;
    let called = args.model.clone();
    let inspection = tokio::task::spawn_blocking(move || Inspection::of(&directory, &called)).await?;
    let printed = if args.json { print::json(&inspection) } else { print::text(text(&inspection)) };
    printed?;
    if inspection.ok { Ok(()) } else { anyhow::bail!("{} can't be used as it is", args.model) }
}

fn text(inspection: &Inspection) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{name:<14} {value}");
    };
    if let Some(family) = &inspection.family {
        line("family", family);
    }
    for component in &inspection.components {
        let stored = component.stored.join(", ");
        let parameters = HumanCount(component.parameters).to_string();
        line(&component.name, &format_args!("{parameters:>15} parameters, stored as {stored}"));
    }
    if !inspection.components.is_empty() {
        line("in all", &format_args!("{:>15} parameters", HumanCount(inspection.parameters).to_string()));
        let memory = inspection.memory;
        let [f32, f16, bf16] = [memory.f32, memory.f16, memory.bf16].map(BinaryBytes);
        line("memory", &format_args!("{f32} as f32, {f16} as f16, {bf16} as bf16 (the CPU computes in f32)"));
    }
    if let Some(size) = inspection.native_size {
        line("native size", &format_args!("{size} x {size} pixels"));
    }
    if let Some([c, h, w]) = inspection.latent {
        line("latent", &format_args!("{c} x {h} x {w}"));
    }
    if let Some(prediction) = &inspection.prediction {
        line("prediction", prediction);
    }
    if let Some(schedule) = &inspection.schedule {
        line("schedule", schedule);
    }
    if let Some(classes) = &inspection.classes {
        line("classes", classes);
    }
    inspection.notes.iter().for_each(|note| line("note", note));
    match inspection.problems.as_slice() {
        [] => line("problems", &"none"),
        problems => problems.iter().for_each(|problem| line("problem", problem)),
    }
    text
}
