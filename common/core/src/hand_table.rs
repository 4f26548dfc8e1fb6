//! Files written by hand: class files, label files, lists of images, class maps and hierarchies.
//!
//! Spreadsheets, R and editors save the same table in many ways: with commas, semicolons or tabs, with or without quotes and a
//! byte order mark, with any line ending. This module reads all of them. Errors name the file and the line.

mod table;

use std::fmt;

pub use self::table::{HandRow, HandTable, Header};

use crate::text::{excerpt, printable};

/// An error in a file written by hand.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}{}: {problem}", printable(.file), .at.map_or_else(String::new, |at| format!(", {at}")))]
pub struct HandError {
    what: &'static str,
    file: String,
    at: Option<At>,
    problem: String,
}

impl HandError {
    /// The error for a file that could not be read.
    pub fn unread(what: &'static str, file: impl Into<String>, error: &std::io::Error) -> Self {
        Self { what, file: file.into(), at: None, problem: format!("it can't be read: {error}") }
    }
}

/// A place in the file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// A line as editors count them.
    Line(u64),
    /// An item of a JSON list.
    Item(u64),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Item(item) => write!(f, "item {item}"),
        }
    }
}

/// The text of the file, without a byte order mark and with `\n` line endings.
#[derive(Debug)]
pub struct HandText {
    /// The kind of file, like "the class file".
    what: &'static str,
    /// The file's name for errors.
    file: String,
    text: String,
}

impl HandText {
    /// Decodes the content of `file`.
    pub fn new(what: &'static str, file: impl Into<String>, bytes: Vec<u8>) -> Result<Self, HandError> {
        let file = file.into();
        match decode(bytes) {
            Ok(text) => Ok(Self { what, file, text }),
            Err((at, problem)) => Err(HandError { what, file, at, problem }),
        }
    }

    /// An error about the whole file.
    pub fn wrong(&self, problem: impl Into<String>) -> HandError {
        HandError { what: self.what, file: self.file.clone(), at: None, problem: problem.into() }
    }

    /// An error about a place in the file.
    pub fn wrong_at(&self, at: At, problem: impl Into<String>) -> HandError {
        HandError { at: Some(at), ..self.wrong(problem) }
    }

    /// An error about a line of the file.
    pub fn wrong_in(&self, line: u64, problem: impl Into<String>) -> HandError {
        self.wrong_at(At::Line(line), problem)
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The lines that are not blank, with their line numbers.
    pub fn lines(&self) -> impl Iterator<Item = (u64, &str)> {
        (1..).zip(self.text.lines()).filter(|(_, line)| !line.trim().is_empty())
    }

    /// Whether the file's name has this extension, given in lowercase.
    pub fn is_called(&self, extension: &str) -> bool {
        self.file.to_ascii_lowercase().ends_with(extension)
    }

    /// Whether the file's name has the extension of a table.
    pub fn is_called_a_table(&self) -> bool {
        self.is_called(".csv") || self.is_called(".tsv")
    }

    /// The table whose header satisfies `is_header`, with the first separator that gives such a header; `None` if there is
    /// none.
    pub fn table(&self, is_header: impl Fn(&Header) -> bool) -> Result<Option<HandTable<'_>>, HandError> {
        HandTable::find(self, is_header)
    }

    /// The columns of the first line, for messages.
    pub fn shown_header(&self) -> String {
        const MOST: usize = 12;
        let names = HandTable::likely_header(self).names;
        let mut shown: Vec<_> = names.iter().take(MOST).map(|name| excerpt(name)).collect();
        if names.len() > MOST {
            shown.push("…".to_owned());
        }
        if shown.is_empty() { "nothing".to_owned() } else { shown.join(", ") }
    }
}

/// Decodes bytes as UTF-8, or says where and why that fails.
fn decode(mut bytes: Vec<u8>) -> Result<String, (Option<At>, String)> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err((None, "it is UTF-16: save it as UTF-8".to_owned()));
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    if bytes.contains(&0) {
        return Err((None, "it is UTF-16, or no text at all: save it as UTF-8".to_owned()));
    }
    match String::from_utf8(bytes) {
        Ok(text) if text.contains('\r') => Ok(text.replace("\r\n", "\n").replace('\r', "\n")),
        Ok(text) => Ok(text),
        Err(error) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let before = String::from_utf8_lossy(before).replace("\r\n", "\n").replace('\r', "\n");
            let line = 1 + before.matches('\n').count() as u64;
            Err((Some(At::Line(line)), "it is not UTF-8 but perhaps Latin-1: save it as UTF-8".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests;
