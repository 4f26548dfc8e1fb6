//! The rows of a table with a header that names its columns.

use std::iter;

use super::{HandError, HandText};
use crate::text::excerpt;

/// The names of a table's columns.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// As written, but trimmed.
    pub(super) names: Vec<String>,
}

impl Header {
    /// Whether there is a column with this name, ignoring case.
    pub fn has(&self, name: &str) -> bool {
        !self.positions(name).is_empty()
    }

    /// The columns with exactly this name, or else those that match when case is ignored.
    fn positions(&self, name: &str) -> Vec<usize> {
        let those = |same: &dyn Fn(&str) -> bool| -> Vec<usize> {
            (0..).zip(&self.names).filter(|(_, column)| same(column)).map(|(at, _)| at).collect()
        };
        let exact = those(&|column| column == name);
        if exact.is_empty() { those(&|column| column.to_lowercase() == name.to_lowercase()) } else { exact }
    }
}

/// A table with a header.
#[derive(Debug)]
pub struct HandTable<'a> {
    text: &'a HandText,
    header: Header,
    separator: u8,
    /// The table without the line that names the separator, and without blanks before quotes.
    body: String,
    /// Lines of the file before the body.
    before: u64,
}

/// A row of a table.
#[derive(Debug)]
pub struct HandRow {
    /// The line it begins on, counted from 1.
    pub line: u64,
    /// Its trimmed fields.
    cells: csv::StringRecord,
}

impl HandRow {
    /// The field in a column; empty if the row is too short.
    pub fn cell(&self, column: usize) -> &str {
        self.cells.get(column).unwrap_or_default()
    }

    /// The field in an optional column; `None` if it is empty.
    pub fn filled(&self, column: Option<usize>) -> Option<&str> {
        column.map(|column| self.cell(column)).filter(|cell| !cell.is_empty())
    }
}

impl<'a> HandTable<'a> {
    pub(super) fn find(text: &'a HandText, is_header: impl Fn(&Header) -> bool) -> Result<Option<Self>, HandError> {
        let (given, body) = separator_line(text.text());
        let before = u64::from(given.is_some());
        for separator in separators(text, given) {
            let header = header_of(body, separator);
            if !is_header(&header) {
                continue;
            }
            let body = tidied(body, separator).map_err(|line| {
                text.wrong_in(line + before, "the quote that opens here is never closed: close it, or write it twice")
            })?;
            return Ok(Some(Self { text, header, separator, body, before }));
        }
        Ok(None)
    }

    /// The header with the separator that gives the most columns.
    pub(super) fn likely_header(text: &HandText) -> Header {
        let (given, body) = separator_line(text.text());
        let headers = separators(text, given).into_iter().map(|separator| header_of(body, separator));
        // `max_by_key` returns the last maximum, so the reversed order gives the first.
        headers.rev().max_by_key(|header| header.names.len()).unwrap_or_default()
    }

    /// The position of a column, by its name in any case; `None` if there is no such column.
    pub fn column(&self, name: &str) -> Result<Option<usize>, HandError> {
        match self.header.positions(name)[..] {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(self.text.wrong(format!("it has two columns '{}': rename or remove one", excerpt(name)))),
        }
    }

    /// The position of a required column.
    pub fn required(&self, name: &str, needed: &str) -> Result<usize, HandError> {
        self.column(name)?.ok_or_else(|| {
            let shown = self.text.shown_header();
            self.text.wrong(format!("it has no column '{name}': its first line must name {needed}, and names {shown}"))
        })
    }

    /// The rows that are not blank. A row with more fields than the header is an error.
    pub fn rows(&self) -> impl Iterator<Item = Result<HandRow, HandError>> {
        records(&self.body, self.separator).skip(1).map(|(line, cells)| {
            let line = line + self.before;
            let (found, expected) = (fields(&cells), self.header.names.len());
            if found <= expected {
                return Ok(HandRow { line, cells });
            }
            let separator = char::from(self.separator).escape_default();
            let problem = format!(
                "it has {found} fields, and the header names {expected} columns: put fields with a '{separator}' in \
                 them into quotes, and give every column a name"
            );
            Err(self.text.wrong_in(line, problem))
        })
    }

    /// The rows, which must have a field for every column, even if empty. A file that was cut off does not.
    pub fn whole_rows(&self) -> impl Iterator<Item = Result<HandRow, HandError>> {
        let expected = self.header.names.len();
        self.rows().map(move |row| {
            let row = row?;
            let found = row.cells.len();
            if found >= expected {
                return Ok(row);
            }
            let fields = if found == 1 { "field" } else { "fields" };
            let problem = format!(
                "it has {found} {fields}, and the header names {expected} columns: write the separators of empty fields \
                 too, and see whether the file is whole"
            );
            Err(self.text.wrong_in(row.line, problem))
        })
    }
}

/// The number of fields, without empty ones at the end.
fn fields(cells: &csv::StringRecord) -> usize {
    (1..).zip(cells).filter(|(_, cell)| !cell.is_empty()).map(|(count, _)| count).last().unwrap_or(0)
}

/// The separator that the first line names, as Excel writes it (`sep=;`), and the text after that line.
fn separator_line(text: &str) -> (Option<u8>, &str) {
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    let line = first.trim_matches([' ', '"']);
    let is_marked = line.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("sep="));
    match line.as_bytes() {
        [_, _, _, _, separator] if is_marked && separator.is_ascii() => (Some(*separator), rest),
        _ => (None, text),
    }
}

/// The separators to try, in this order.
fn separators(text: &HandText, given: Option<u8>) -> Vec<u8> {
    match given {
        Some(separator) => vec![separator],
        None if text.is_called(".tsv") => vec![b'\t', b',', b';'],
        None => vec![b',', b';', b'\t'],
    }
}

fn header_of(body: &str, separator: u8) -> Header {
    // Only one line is read: an unclosed quote is reported later, and must not make this read the whole text.
    let line = body.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let line = tidied(line, separator).unwrap_or_else(|_| line.to_owned());
    let names = records(&line, separator).next().map(|(_, cells)| cells.iter().map(str::to_owned).collect());
    Header { names: names.unwrap_or_default() }
}

/// The records that are not blank, with the lines they begin on.
fn records(body: &str, separator: u8) -> impl Iterator<Item = (u64, csv::StringRecord)> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(separator)
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(body.as_bytes());
    let (mut counted, mut line) = (0, 1);
    iter::from_fn(move || {
        let mut cells = csv::StringRecord::new();
        // Text in memory with rows of any length always parses.
        while reader.read_record(&mut cells).ok()? {
            if fields(&cells) == 0 {
                continue;
            }
            let start = cells.position().map_or(0, csv::Position::byte) as usize;
            // The reader skips blank lines before a record but reports the position before them.
            let blank = body.as_bytes()[start..].iter().take_while(|byte| **byte == b'\n').count();
            let start = start + blank;
            line += body.as_bytes()[counted..start].iter().filter(|byte| **byte == b'\n').count() as u64;
            counted = start;
            return Some((line, cells));
        }
        None
    })
}

/// Removes blanks between a separator and a quote, which would make the quote part of the field. The error is the line of a
/// quote that is never closed.
fn tidied(body: &str, separator: u8) -> Result<String, u64> {
    let separator = char::from(separator);
    let mut tidy = String::with_capacity(body.len());
    let mut rest = body;
    let mut line = 1;
    loop {
        let field = rest.trim_start_matches(|c: char| matches!(c, ' ' | '\t') && c != separator);
        if let Some(inside) = field.strip_prefix('"') {
            let end = closing_quote(inside).ok_or(line)?;
            let (quoted, after) = field.split_at(end + 2);
            line += quoted.matches('\n').count() as u64;
            tidy.push_str(quoted);
            rest = after;
        }
        let Some(end) = rest.find([separator, '\n']) else {
            tidy.push_str(rest);
            return Ok(tidy);
        };
        line += u64::from(rest[end..].starts_with('\n'));
        let (field, after) = rest.split_at(end + 1);
        tidy.push_str(field);
        rest = after;
    }
}

/// The position of the quote that ends a quoted field. Doubled quotes don't end it.
fn closing_quote(inside: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let quote = from + inside[from..].find('"')?;
        if !inside[quote + 1..].starts_with('"') {
            return Some(quote);
        }
        from = quote + 2;
    }
}
