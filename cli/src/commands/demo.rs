//! `elbo demo`: a real job on a small model; the program contains the model and the images.

use std::path::Path;

use anyhow::Context;
use elbo_core::loss::Loss;
use elbo_net::Operator;
use include_dir::{Dir, include_dir};

use crate::args::DemoArgs;
use crate::commands::output;
use crate::job_args::JobArgs;
use crate::job_runner::{self, Workers};
use crate::{print, session};

/// The model (0.77M parameters), 360 held-out digits of scikit-learn's load_digits, and their class file.
static ASSETS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/demo");

/// Labels the digits.
pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    let source = args.out.join("source");
    unpack(&ASSETS, &source)
        .with_context(|| format!("unpacking the demo's model and images into {}", source.display()))?;
    let path = |name: &str| source.join(name).to_string_lossy().into_owned();
    let job = JobArgs {
        images: Some(path("images")),
        classes: Some(source.join("classes.csv")),
        model: Some(path("model")),
        loss: Some(Loss::L2),
        label_from: Some("parent".into()),
        ..JobArgs::default()
    };
    print::note(format_args!(
        "labelling 360 images of handwritten digits with a diffusion model, {} workers, results in {}",
        args.workers,
        args.out.display()
    ));
    let job = session::identify(&job).await?;
    let workers = Workers { count: Some(args.workers), device: args.device };
    let out = args.out.to_string_lossy();
    let done = job_runner::label(job, None, &out, &workers, &args.run, &Operator::default()).await?;
    output::summary(&out, done).await
}

/// Writes only files that are missing or differ: rewriting a file would make it look like a new image to a resumed job.
fn unpack(assets: &Dir<'_>, target: &Path) -> std::io::Result<()> {
    for file in assets.files() {
        let path = target.join(file.path());
        if std::fs::read(&path).is_ok_and(|there| there == file.contents()) {
            continue;
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, file.contents())?;
    }
    assets.dirs().try_for_each(|directory| unpack(directory, target))
}
