//! Printing for whoever reads it, which may be nobody: the only place that writes to stdout and stderr.
//!
//! `println!` and `eprintln!` panic where the reader has gone or the disk is full, as in `elbo report OUT | head`.

use std::fmt::Display;
use std::io::{self, Write};

use elbo_core::text::printable_lines;
use serde::Serialize;

/// Prints on stdout what a command is for, without control characters that names from outside may have.
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

/// Tells something on stderr, on a line of its own, likewise. Where that can't be written, nobody is left to be told.
pub(crate) fn note(note: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{}", printable_lines(&note.to_string()));
}

/// Shows clap's help on stdout, or what it has against a command line on stderr.
pub(crate) fn help(told: &clap::Error) -> anyhow::Result<()> {
    let shown = told.print().and_then(|()| io::stdout().flush());
    if told.use_stderr() { Ok(()) } else { tolerated(shown) }
}

/// A reader that has gone has seen enough: the command goes on, and its exit code is its own. Anything else is an error.
fn tolerated(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            anyhow::bail!(
                "writing to stdout: {error}; run the command again and send what it prints where there is room"
            )
        }
        _ => Ok(()),
    }
}
