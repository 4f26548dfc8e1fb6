//! Printing, also when the reader has gone. This is the only module that writes to stdout and stderr.
//!
//! `println!` and `eprintln!` panic when the reader has gone or the disk is full, as in `elbo report OUT | head`.

use std::fmt::Display;
use std::io::{self, Write};

use elbo_core::text::printable_lines;
use serde::Serialize;

/// Prints a command's result on stdout, without the control characters that names from outside may contain.
pub(crate) fn text(text: impl Display) -> anyhow::Result<()> {
    raw(printable_lines(&text.to_string()))
}

fn raw(text: impl Display) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    tolerated(write!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// Prints a line on stdout.
pub(crate) fn line(line: impl Display) -> anyhow::Result<()> {
    text(format_args!("{line}\n"))
}

/// Prints a JSON object on stdout, and nothing else.
pub(crate) fn json(object: &impl Serialize) -> anyhow::Result<()> {
    raw(format_args!("{}\n", serde_json::to_string(object)?))
}

/// Prints a line on stderr, also without control characters. Write errors are ignored: there is nowhere to report them.
pub(crate) fn note(note: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{}", printable_lines(&note.to_string()));
}

/// Prints clap's help on stdout, or its errors about a command line on stderr.
pub(crate) fn help(told: &clap::Error) -> anyhow::Result<()> {
    let shown = told.print().and_then(|()| io::stdout().flush());
    if told.use_stderr() { Ok(()) } else { tolerated(shown) }
}

/// Ignores a closed pipe: the command continues and keeps its exit code. Anything else is an error.
fn tolerated(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            anyhow::bail!(
                "writing to stdout: {error}; run the command again and redirect its output to a disk with space"
            )
        }
        _ => Ok(()),
    }
}
