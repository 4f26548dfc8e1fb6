//! What a listing passed over, by reason, so that nothing is passed over silently.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use elbo_core::text::printable;

/// Extensions of files that may contain images, but that can't be read image by image.
const PACKED: [&str; 8] = ["gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar"];

/// Why something was passed over.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "reason", content = "detail", rename_all = "snake_case")]
pub enum Reason {
    /// Its name begins with a dot, or an operating system left it behind.
    Hidden,
    /// Its extension is not an image's; empty if it has none.
    Extension(String),
    /// It is a device, a socket or a pipe; the string says which.
    Irregular(String),
    /// A link in an archive that does not refer to an earlier member.
    Link,
    /// A sample has a better image: `a.seg.png` next to `a.png`, or the second of `a.jpg` and `a.png`.
    AnotherImage,
    /// Members with a label or captions, but no image.
    WithoutImage,
    /// A label that can't be read; its sample has no label.
    UnreadableLabel,
    /// A column that is named like a label column, but has an unusable type.
    LabelColumn(String),
    /// A row of the label file that matches no image.
    UnmatchedLabel,
    /// An object whose key can't be requested.
    UnusableKey,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hidden => f.write_str("hidden, or left by an operating system"),
            Self::Extension(none) if none.is_empty() => f.write_str("no extension"),
            Self::Extension(packed) if PACKED.contains(&packed.as_str()) => {
                write!(f, "extension .{packed}, which must be unpacked to be read")
            }
            Self::Extension(extension) => write!(f, "extension .{}", printable(extension)),
            Self::Irregular(what) => write!(f, "{what}, not a regular file"),
            Self::Link => f.write_str("link to no earlier member"),
            Self::AnotherImage => f.write_str("further image of a sample"),
            Self::WithoutImage => f.write_str("label or captions without an image"),
            Self::UnreadableLabel => f.write_str("label that can't be read"),
            Self::LabelColumn(column) => write!(f, "row with an unusable label type (column {})", printable(column)),
            Self::UnmatchedLabel => f.write_str("row of the label file that names no image"),
            Self::UnusableKey => f.write_str("key that can't be used"),
        }
    }
}

/// How many items were passed over for a reason, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    count: u64,
    examples: Vec<String>,
}

/// Everything that a listing passed over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<PassedOver>", into = "Vec<PassedOver>")]
pub struct Account(BTreeMap<Reason, Tally>);

/// What was passed over for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedOver {
    /// The reason.
    #[serde(flatten)]
    pub reason: Reason,
    /// How many.
    pub count: u64,
    /// The first examples.
    pub examples: Vec<String>,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.count > self.examples.len() as u64 { ", ..." } else { "" };
        let examples: Vec<_> = self.examples.iter().map(|example| printable(example)).collect();
        write!(f, "{}: {} ({}{more})", self.reason, self.count, examples.join(", "))
    }
}

impl Account {
    /// Examples kept per reason.
    const EXAMPLES: usize = 3;
    /// Maximum number of reasons, since a corpus may have as many extensions as files.
    const REASONS: usize = 40;

    /// Adds one item.
    pub fn note(&mut self, reason: Reason, example: &str) {
        self.add(reason, 1, [example.to_owned()]);
    }

    /// Adds several items, with examples.
    pub fn add(&mut self, reason: Reason, count: u64, examples: impl IntoIterator<Item = String>) {
        let is_known = self.0.contains_key(&reason);
        let reason = match reason {
            Reason::Extension(_) if !is_known && self.0.len() >= Self::REASONS => Reason::Extension("*".into()),
            reason => reason,
        };
        let tally = self.0.entry(reason).or_default();
        tally.count += count;
        let room = Self::EXAMPLES.saturating_sub(tally.examples.len());
        tally.examples.extend(examples.into_iter().take(room));
    }

    /// Adds the items of another account.
    pub fn merge(&mut self, other: Self) {
        for (reason, tally) in other.0 {
            self.add(reason, tally.count, tally.examples);
        }
    }

    /// Whether nothing was passed over.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The items by reason.
    pub fn passed_over(&self) -> impl Iterator<Item = PassedOver> + '_ {
        self.0.iter().map(|(reason, Tally { count, examples })| PassedOver {
            reason: reason.clone(),
            count: *count,
            examples: examples.clone(),
        })
    }

    /// Removes all items.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// One sentence for errors; empty if nothing was passed over.
impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.passed_over().map(|passed| passed.to_string()).collect();
        f.write_str(&all.join("; "))
    }
}

impl From<Vec<PassedOver>> for Account {
    fn from(all: Vec<PassedOver>) -> Self {
        let tally = |PassedOver { reason, count, examples }| (reason, Tally { count, examples });
        Self(all.into_iter().map(tally).collect())
    }
}

impl From<Account> for Vec<PassedOver> {
    fn from(account: Account) -> Self {
        account.passed_over().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_and_the_first_are_named() {
        let mut account = Account::default();
        for i in 0..5 {
            account.note(Reason::Extension("avif".into()), &format!("{i}.avif"));
        }
        account.note(Reason::Hidden, ".x\u{1b}[2J");
        assert_eq!(
            account.to_string(),
            "hidden, or left by an operating system: 1 (.x\u{fffd}[2J); extension .avif: 5 (0.avif, 1.avif, 2.avif, ...)"
        );
        let json = serde_json::to_string(&account).unwrap();
        assert!(json.contains(r#"{"reason":"extension","detail":"avif","count":5,"#), "{json}");
        assert!(json.contains(r#"{"reason":"hidden","count":1,"#), "{json}");
        assert_eq!(serde_json::from_str::<Account>(&json).unwrap(), account);
        for i in 0..100 {
            account.note(Reason::Extension(format!("e{i}")), "x");
        }
        let all: Vec<_> = account.passed_over().collect();
        assert!(all.len() <= 41 && all.iter().map(|passed| passed.count).sum::<u64>() == 106);
    }
}
