//! `elbo label`: runs a coordinator and its workers in one process on one machine.

use crate::args::LabelArgs;
use crate::commands::output;
use crate::failure::usage;
use crate::job_runner::{self, Workers};
use crate::session;

/// Labels images on this machine.
pub(crate) async fn run(args: LabelArgs) -> anyhow::Result<()> {
    let flags = args.job.resolve()?;
    let out = args.out.or(flags.out.clone()).ok_or_else(|| usage("--out is missing: say where the results go"))?;
    let operator = session::operate(args.http).await?;
    let job = session::identify(&flags).await?;
    let count = args.workers.or(flags.workers);
    let workers = Workers { count, device: args.device.over(&flags) };
    let done = job_runner::label(job, flags.pilot_images(), &out, &workers, &args.run.over(&flags), &operator).await?;
    output::summary(&out, done).await
}
