//! Text from outside on its way to a terminal.

/// Marks for what is not shown.
const MARK: char = '\u{fffd}';

/// A text with a mark for every character that could move the cursor, change colours, or reorder what stands around it.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_hostile(c) { MARK } else { c }).collect()
}

/// The same of a text that has several lines.
pub fn printable_lines(text: &str) -> String {
    text.chars().map(|c| if c != '\n' && is_hostile(c) { MARK } else { c }).collect()
}

/// Control characters, and those that turn the direction of writing.
fn is_hostile(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_marked() {
        assert_eq!(printable("a\u{1b}[2Jb\r\n\u{9b}c\u{202e}d é"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}\u{fffd}c\u{fffd}d é");
        assert_eq!(printable_lines("a\n\tb\u{7}"), "a\n\u{fffd}b\u{fffd}");
    }
}
