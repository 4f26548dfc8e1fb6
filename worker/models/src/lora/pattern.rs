//! peft's `rank_pattern` and `alpha_pattern`: values for modules whose names match a regular expression.

use std::fmt;
use std::marker::PhantomData;

use fancy_regex::Regex;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// Patterns in the file's order. The first one that matches is used.
#[derive(Clone, Debug)]
pub(super) struct Patterns<T>(Vec<(Regex, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// The value for a module; fails if matching takes too long.
    pub(super) fn of(&self, module: &str) -> Result<Option<T>, fancy_regex::Error> {
        for (pattern, value) in &self.0 {
            if pattern.is_match(module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

/// Matches like peft (`get_pattern_key`): a pattern is a module's whole name or its last parts.
fn compile(pattern: &str) -> Result<Regex, fancy_regex::Error> {
    Regex::new(&format!("^(.*\\.)?({pattern})$"))
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("patterns of module names, each with a number")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut patterns = Vec::new();
                while let Some((pattern, value)) = map.next_entry::<String, T>()? {
                    let failed = |error| A::Error::custom(format!("{pattern:?} is not a pattern: {error}"));
                    patterns.push((compile(&pattern).map_err(failed)?, value));
                }
                Ok(Patterns(patterns))
            }

            fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
                Ok(Patterns::default())
            }
        }

        deserializer.deserialize_any(InOrder(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alpha(patterns: &str, module: &str) -> Option<f64> {
        serde_json::from_str::<Patterns<f64>>(patterns).unwrap().of(module).unwrap()
    }

    #[test]
    fn patterns_match_as_in_peft() {
        let cases = [
            ("to_v", "a.attn1.to_v", true),
            ("attn1.to_v", "a.attn1.to_v", true),
            ("attn.to_v", "a.attn1.to_v", false),
            ("1.to_v", "a.attn1.to_v", false),
            ("^a.attn1.to_v", "a.attn1.to_v", true),
            ("^attn1.to_v", "a.attn1.to_v", false),
            (r".*\\.(to_q|to_v)", "a.b.attn1.to_v", true),
            (r"layers\\.[0-3]\\.(?!mlp).*", "x.layers.2.attn", true),
            (r"layers\\.[0-3]\\.(?!mlp).*", "x.layers.2.mlp", false),
            ("to_v", "a.to_v.b", false),
        ];
        for (pattern, module, matches) in cases {
            let found = alpha(&format!("{{\"{pattern}\": 2}}"), module);
            assert_eq!(found.is_some(), matches, "{pattern} {module}");
        }
        assert_eq!(alpha(r#"{"z.*": 1, "a": 2, "to": 3}"#, "z.to"), Some(1.0));
        assert_eq!(alpha(r#"{"to": 3, "z.*": 1}"#, "z.to"), Some(3.0));
        assert_eq!(alpha("null", "z.to"), None);
        let error = serde_json::from_str::<Patterns<f64>>(r#"{"(": 1}"#).unwrap_err().to_string();
        assert!(error.contains("is not a pattern"), "{error}");
    }
}
