//! `elbo export`: writes the predictions in formats that other tools read.

use elbo_output::export::{self, ExportOptions, Exported, Format};
use elbo_store::Location;

use crate::args::{ExportArgs, ExportFormat};
use crate::{print, recorded};

/// Writes an output's predictions as CSV or JSON.
pub(crate) async fn run(args: ExportArgs) -> anyhow::Result<()> {
    let (store, record) = recorded::open(&args.out).await?;
    let format = match args.format {
        ExportFormat::Csv => Format::Csv,
        ExportFormat::Json => Format::Json,
    };
    let to = Location::parse(&args.to)?;
    let options = ExportOptions { format, scores: args.scores, force: args.force };
    let (spec, listed) = (&record.identity.spec, &record.manifest);
    let Exported { samples, files, skipped } = export::export(&store, spec, listed, &to, options).await?;
    let all = listed.samples;
    let open = all.saturating_sub(samples + skipped);
    if open > 0 {
        print::note(format_args!("the job is not done: {open} of its {all} images have no row yet"));
    }
    let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
    print::line(format_args!("exported {samples} images to {to} ({files})"))?;
    if skipped > 0 {
        anyhow::bail!(
            "{skipped} of {all} images were left out because their names can't be file names there (the warnings \
             list them): export them with --format csv, which has a line for every image"
        );
    }
    Ok(())
}
