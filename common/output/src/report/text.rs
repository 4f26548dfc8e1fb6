//! Text that fits a terminal, whatever names, keys and messages contain.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use elbo_core::text::printable;

/// The terminal width that reports are made for.
pub(super) const WIDTH: usize = 80;

/// The number of columns of a text.
pub(super) fn width(text: &str) -> usize {
    printable(text).width()
}

/// The beginning of a text, padded to exactly `columns`, with an ellipsis if it is cut.
pub(super) fn head(text: &str, columns: usize) -> String {
    let text = printable(text);
    if text.width() <= columns {
        return pad(text, columns);
    }
    let mut taken = prefix(text.chars(), columns.saturating_sub(1));
    taken.push('…');
    pad(taken, columns)
}

/// The end of a text, padded to exactly `columns`. For paths, the end says more.
pub(super) fn tail(text: &str, columns: usize) -> String {
    let text = printable(text);
    if text.width() <= columns {
        return pad(text, columns);
    }
    let end: String = prefix(text.chars().rev(), columns.saturating_sub(1)).chars().rev().collect();
    pad(format!("…{end}"), columns)
}

fn prefix(chars: impl Iterator<Item = char>, columns: usize) -> String {
    let mut used = 0;
    let fits = |c: &char| {
        used += c.width().unwrap_or(0);
        used <= columns
    };
    chars.take_while(fits).collect()
}

fn pad(mut text: String, columns: usize) -> String {
    let missing = columns.saturating_sub(text.width());
    text.extend(std::iter::repeat_n(' ', missing));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_to_a_number_of_columns() {
        assert_eq!(head("abc", 5), "abc  ");
        assert_eq!(head("abcdef", 5), "abcd…");
        assert_eq!(tail("photos/0028.png", 9), "…0028.png");
        // Each of these takes two columns.
        assert_eq!(head("東京都庁", 6), "東京… ");
        assert_eq!(width("東京"), 4);
        assert_eq!(head("a\u{1b}[2J", 6), "a\u{fffd}[2J ");
    }
}
