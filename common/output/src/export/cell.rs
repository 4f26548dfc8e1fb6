//! Text as a cell that every program takes for text.

/// What spreadsheets take for the beginning of a formula, full-width forms included.
const FORMULA: [char; 9] = ['=', '+', '-', '@', '\t', '＝', '＋', '－', '＠'];

/// A text as the cell of a table. What a spreadsheet would compute, or hand to other programs, gets an apostrophe in front, as one
/// types it there for text; numbers stay numbers. Control characters but tabs and line breaks are written like `\u{1b}`.
pub(super) fn cell(text: &str) -> String {
    let mut cell = String::with_capacity(text.len());
    if text.starts_with(FORMULA) && !is_number(text) {
        cell.push('\'');
    }
    for c in text.chars() {
        match c {
            '\t' | '\n' => cell.push(c),
            c if c.is_control() => cell.extend(c.escape_unicode()),
            c => cell.push(c),
        }
    }
    cell
}

/// Digits, with a sign, a point and an exponent at most: the words that floats are read from are none.
fn is_number(text: &str) -> bool {
    text.parse::<f64>().is_ok() && text.chars().all(|c| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_are_text_and_numbers_are_numbers() {
        for formula in ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "＝1", "-inf", "-", "+1e"] {
            assert_eq!(cell(formula), format!("'{formula}"));
        }
        for text in ["", "cat", "-1", "+2.5e-3", "-.5", "a=b", "'=1", "dog, wet", "two\nlines"] {
            assert_eq!(cell(text), text);
        }
    }

    #[test]
    fn control_characters_are_spelled_out() {
        assert_eq!(cell("a\u{1b}[31m\0b\u{9b}"), "a\\u{1b}[31m\\u{0}b\\u{9b}");
        assert_eq!(cell("\r=1"), "\\u{d}=1");
    }
}
