//! Writes text as a table cell that every program reads as text.

/// Characters that start a formula in spreadsheets, including full-width forms.
const FORMULA: [char; 9] = ['=', '+', '-', '@', '\t', '＝', '＋', '－', '＠'];

/// A text as a table cell. If a spreadsheet would read it as a formula, it gets an apostrophe in front, as one would type
/// there; numbers stay numbers. Control characters except tabs and line breaks are written like `\u{1b}`.
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

/// Whether it is digits with an optional sign, point and exponent. Words that parse as floats, like `inf`, don't count.
fn is_number(text: &str) -> bool {
    text.parse::<f64>().is_ok() && text.chars().all(|c| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_become_text_and_numbers_stay_numbers() {
        for formula in ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "＝1", "-inf", "-", "+1e"] {
            assert_eq!(cell(formula), format!("'{formula}"));
        }
        for text in ["", "cat", "-1", "+2.5e-3", "-.5", "a=b", "'=1", "dog, wet", "two\nlines"] {
            assert_eq!(cell(text), text);
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(cell("a\u{1b}[31m\0b\u{9b}"), "a\\u{1b}[31m\\u{0}b\\u{9b}");
        assert_eq!(cell("\r=1"), "\\u{d}=1");
    }
}
