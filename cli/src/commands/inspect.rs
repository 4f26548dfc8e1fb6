//! `elbo inspect`: what a model is and what would make it fail.

use elbo_common::model_source::{ModelSource, Wanted};
use elbo_common::text::printable;
use elbo_worker::models::Inspection;
use indicatif::{BinaryBytes, HumanCount};

use crate::args::InspectArgs;
use crate::failure::usage;
use crate::session;

/// Looks at a model; fails if a job could not use it.
pub(crate) async fn run(args: InspectArgs) -> anyhow::Result<()> {
    let source = ModelSource::parse(&args.model).map_err(usage)?;
    let directory = session::resolve(&source, Wanted::Everything).await?;
    let inspection = tokio::task::spawn_blocking(move || Inspection::of(&directory)).await?;
    if args.json {
        println!("{}", serde_json::to_string(&inspection)?);
    } else {
        print(&inspection);
    }
    if inspection.ok { Ok(()) } else { anyhow::bail!("{} can't be used as it is", args.model) }
}

fn print(inspection: &Inspection) {
    let line = |name: &str, value: &dyn std::fmt::Display| {
        println!("{name:<14} {}", printable(&value.to_string()));
    };
    let optional = |name: &str, value: Option<&dyn std::fmt::Display>| {
        if let Some(value) = value {
            line(name, value);
        }
    };
    optional("family", inspection.family.as_ref().map(|v| v as _));
    for component in &inspection.components {
        let stored = component.stored.join(", ");
        let parameters = HumanCount(component.parameters).to_string();
        println!("{:<14} {parameters:>15} parameters, stored as {stored}", printable(&component.name));
    }
    if !inspection.components.is_empty() {
        println!("{:<14} {:>15} parameters", "in all", HumanCount(inspection.parameters).to_string());
        let memory = inspection.memory;
        let [f32, f16, bf16] = [memory.f32, memory.f16, memory.bf16].map(BinaryBytes);
        line("memory", &format!("{f32} as f32, {f16} as f16, {bf16} as bf16 (the CPU computes in f32)"));
    }
    optional(
        "native size",
        inspection.native_size.map(|size| format!("{size} x {size} pixels")).as_ref().map(|v| v as _),
    );
    let latent = inspection.latent.map(|[c, h, w]| format!("{c} x {h} x {w}"));
    optional("latent", latent.as_ref().map(|v| v as _));
    optional("prediction", inspection.prediction.as_ref().map(|v| v as _));
    optional("schedule", inspection.schedule.as_ref().map(|v| v as _));
    optional("classes", inspection.classes.as_ref().map(|v| v as _));
    match inspection.problems.as_slice() {
        [] => line("problems", &"none"),
        problems => problems.iter().for_each(|problem| line("problem", problem)),
    }
}
