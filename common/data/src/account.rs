//! What a listing saw and did not take, by reason: nothing is passed over in silence.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use elbo_core::text::printable;

/// Extensions of files that may hold images which nobody can get at one by one.
const PACKED: [&str; 8] = ["gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar"];

/// Why something was passed over.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "reason", content = "detail", rename_all = "snake_case")]
pub enum Reason {
    /// Its name begins with a dot, or it is what an operating system leaves behind.
    Hidden,
    /// Its extension is none of an image's; empty where it has none.
    Extension(String),
    /// It is a device, a socket or a pipe: which.
    Irregular(String),
    /// A link in an archive that leads to no member before it.
    Link,
    /// A sample has a better image: `a.seg.png` beside `a.png`, or the second of `a.jpg` and `a.png`.
    AnotherImage,
    /// Members with a label or captions, and no image.
    WithoutImage,
    /// A label that can't be read: its sample has none.
    UnreadableLabel,
    /// A column that is called like labels, of a type that can't be one.
    LabelColumn(String),
    /// A row of the label file that names no image.
    UnmatchedLabel,
    /// An object whose key can't be asked for.
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
            Self::LabelColumn(column) => write!(f, "row whose label can't be one (column {})", printable(column)),
            Self::UnmatchedLabel => f.write_str("row of the label file that names no image"),
            Self::UnusableKey => f.write_str("key that can't be used"),
        }
    }
}

/// How often something was passed over, and what the first were.
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
    /// Why.
    #[serde(flatten)]
    pub reason: Reason,
    /// How often.
    pub count: u64,
    /// The first of them.
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
    /// Examples that are kept for a reason.
    const EXAMPLES: usize = 3;
    /// Reasons that are told apart: who names files by extensions of their own has as many as files.
    const REASONS: usize = 40;

    /// Notes one more.
    pub fn note(&mut self, reason: Reason, example: &str) {
        self.add(reason, 1, [example.to_owned()]);
    }

    /// Notes several, of which some are named.
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

    /// Adds what another one has.
    pub fn merge(&mut self, other: Self) {
        for (reason, tally) in other.0 {
            self.add(reason, tally.count, tally.examples);
        }
    }

    /// Whether nothing was passed over.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// By reason.
    pub fn passed_over(&self) -> impl Iterator<Item = PassedOver> + '_ {
        self.0.iter().map(|(reason, Tally { count, examples })| PassedOver {
            reason: reason.clone(),
            count: *count,
            examples: examples.clone(),
        })
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// In one sentence, for errors; nothing where nothing was passed over.
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
