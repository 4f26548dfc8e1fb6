//! Text from outside: made safe for terminals, and normalised for comparison.

use std::borrow::Cow;

use unicode_normalization::{UnicodeNormalization, is_nfc};

/// Replaces characters that are not shown.
const MARK: char = '\u{fffd}';

/// Replaces every character that could move the cursor, change colours, or reorder the text around it.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_hostile(c) { MARK } else { c }).collect()
}

/// The most characters that a message quotes of such a text.
const QUOTED: usize = 300;

/// A text from data or a server as quoted in a message: on one line, with unsafe characters escaped like `\u{1b}`, and cut if
/// it is long.
pub fn shown(text: &str) -> String {
    let mut line = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == QUOTED {
            line.push('…');
            break;
        }
        if is_hostile(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Like [`printable`], but keeps line breaks.
pub fn printable_lines(text: &str) -> String {
    text.chars().map(|c| if c != '\n' && is_hostile(c) { MARK } else { c }).collect()
}

/// A text in Unicode's normal form C, which names and keys are compared in. macOS writes é as two characters in file names;
/// other systems write one.
pub fn normal(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || is_nfc(text) { Cow::Borrowed(text) } else { Cow::Owned(text.nfc().collect()) }
}

/// The start of a text, short enough for a message and safe for a terminal.
pub fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    printable(&shown)
}

/// Control characters and those that change the direction of writing.
fn is_hostile(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_control_characters_are_replaced() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\u{9b}c\u{202e}d é"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}\u{fffd}c\u{fffd}d é");
        assert_eq!(shown("a\u{1b}[2J\n\u{202e}é'\\"), "a\\u{1b}[2J\\n\\u{202e}é'\\");
        let long = shown(&"é\0".repeat(1_000));
        assert!(long.starts_with("é\\u{0}é") && long.ends_with('…') && long.chars().count() < 6 * QUOTED, "{long}");
        assert_eq!(printable_lines("a\n\tb\u{7}"), "a\n\u{fffd}b\u{fffd}");
    }

    #[test]
    fn names_compare_in_one_normal_form_and_excerpts_show_their_start() {
        assert_eq!(normal("U\u{308}bung_e\u{301}"), "Übung_é");
        assert!(matches!(normal("Übung"), Cow::Borrowed("Übung")));
        assert_eq!(excerpt("é\u{7}"), "é\u{fffd}");
        assert_eq!(excerpt(&"ab".repeat(50)), format!("{}…", "ab".repeat(30)));
    }
}
