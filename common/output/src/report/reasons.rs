//! Why samples were quarantined. Messages that differ only in the file or value they mention are counted together.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use super::text;

/// The most causes kept apart, to bound memory. Further causes are counted as one.
const CAUSES: usize = 1000;
/// The most causes listed.
const SHOWN: usize = 10;

/// The causes seen so far, by the pattern of their messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    causes: BTreeMap<String, Cause>,
    others: u64,
}

/// Messages with the same pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cause {
    count: u64,
    /// The first of the messages, and the sample it belongs to.
    message: String,
    key: String,
    /// Whether there were different messages.
    varies: bool,
}

impl Reasons {
    /// Counts the message of a sample.
    pub(super) fn add(&mut self, key: &str, message: &str) {
        let pattern = pattern(key, message);
        let is_full = self.causes.len() >= CAUSES;
        match self.causes.entry(pattern) {
            Entry::Occupied(mut cause) => {
                let cause = cause.get_mut();
                cause.count += 1;
                cause.varies |= cause.message != message;
            }
            Entry::Vacant(_) if is_full => self.others += 1,
            Entry::Vacant(place) => {
                let (message, key) = (message.to_owned(), key.to_owned());
                place.insert(Cause { count: 1, message, key, varies: false });
            }
        }
    }

    /// The causes and their counts, most frequent first. A cause is the message, or the pattern if several messages share it.
    pub fn counted(&self) -> Vec<(&str, u64)> {
        self.sorted().into_iter().map(|(pattern, cause)| (cause.text(pattern), cause.count)).collect()
    }

    /// Whether nothing was quarantined.
    pub fn is_empty(&self) -> bool {
        self.causes.is_empty()
    }

    fn sorted(&self) -> Vec<(&str, &Cause)> {
        let mut causes: Vec<_> = self.causes.iter().map(|(pattern, cause)| (pattern.as_str(), cause)).collect();
        causes.sort_by_key(|(_, cause)| std::cmp::Reverse(cause.count));
        causes
    }
}

impl Cause {
    fn text<'a>(&'a self, pattern: &'a str) -> &'a str {
        if self.varies { pattern } else { &self.message }
    }
}

/// The pattern of a message: without the sample's key, other paths and URLs, quoted text and numbers.
fn pattern(key: &str, message: &str) -> String {
    let message = if key.is_empty() { message.to_owned() } else { message.replace(key, "…") };
    let mut pattern = String::with_capacity(message.len());
    for word in message.split_inclusive(char::is_whitespace) {
        let bare = word.trim_matches(|c: char| c.is_whitespace() || ".,:;()[]".contains(c));
        let is_place = bare.contains("://") || bare.starts_with('/') || bare.contains("/…") || bare.contains(":\\");
        if is_place {
            pattern.push_str(&word.replacen(bare, "…", 1));
        } else {
            pattern.push_str(&word.replace(|c: char| c.is_ascii_digit(), "#"));
        }
    }
    for quote in ['\'', '"'] {
        pattern = without_quoted(&pattern, quote);
    }
    while pattern.contains("##") {
        pattern = pattern.replace("##", "#");
    }
    pattern
}

/// Replaces quoted text. An apostrophe within a word is not a quote.
fn without_quoted(text: &str, quote: char) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find(quote) {
        let (before, after) = (&rest[..open], &rest[open + quote.len_utf8()..]);
        let in_word = before.chars().next_back().is_some_and(char::is_alphanumeric);
        match after.find(quote).filter(|_| !in_word) {
            Some(close) => {
                out.push_str(before);
                out.push_str("'…'");
                rest = &after[close + quote.len_utf8()..];
            }
            None => {
                out.push_str(before);
                out.push(quote);
                rest = after;
            }
        }
    }
    out + rest
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let causes = self.sorted();
        writeln!(f, "quarantined because of (full messages: column error of quarantine/*.parquet)")?;
        for (pattern, cause) in causes.iter().take(SHOWN) {
            let line = text::head(cause.text(pattern), text::WIDTH - 11);
            writeln!(f, "  {:>7}  {}", cause.count, line.trim_end())?;
            writeln!(f, "           such as {}", text::tail(&cause.key, text::WIDTH - 19).trim_end())?;
        }
        let rest: u64 = causes.iter().skip(SHOWN).map(|(_, cause)| cause.count).sum::<u64>() + self.others;
        if rest > 0 {
            writeln!(f, "  {rest:>7}  of other causes")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_one_cause_are_counted_together() {
        let mut reasons = Reasons::default();
        for i in 0..1000 {
            let key = format!("cat/{i:04}.png");
            reasons.add(&key, &format!("read: Object at location /photos/{key} not found: No such file (os error 2)"));
            reasons.add(&key, &format!("decode: {} bytes end after {i} of 4096, can't go on", i * 7));
            reasons.add(&key, &format!("decode: unknown marker 'x{i}y' in s3://bucket/{i}?a=b"));
        }
        reasons.add("a.png", "decode: not an image of 3 kinds");
        let expected = [
            ("decode: # bytes end after # of #, can't go on", 1000),
            ("decode: unknown marker '…' in …", 1000),
            ("read: Object at location … not found: No such file (os error #)", 1000),
            ("decode: not an image of 3 kinds", 1),
        ];
        assert_eq!(reasons.counted(), expected);
        let text = reasons.to_string();
        assert_eq!(text.lines().count(), 9, "{text}");
        assert!(text.contains("     1000  decode: # bytes") && text.contains("such as cat/0000.png"), "{text}");
    }

    #[test]
    fn many_causes_take_bounded_memory_and_few_lines() {
        let mut reasons = Reasons::default();
        // Words differ, not numbers, so no pattern joins them.
        let word = |i: u32| (0..4).map(|k| char::from(b'a' + (i / 10u32.pow(k) % 10) as u8)).collect::<String>();
        (0..5000).for_each(|i| reasons.add("k.png", &word(i).repeat(100)));
        assert_eq!(reasons.counted().len(), CAUSES);
        let text = reasons.to_string();
        assert!(text.contains("     4990  of other causes"), "{text}");
        assert!(text.lines().all(|line| text::width(line) <= text::WIDTH), "{text}");
    }
}
