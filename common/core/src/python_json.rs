//! JSON as Python writes it: `json.dumps` also writes `NaN`, `Infinity` and `-Infinity`, which are not valid JSON.
//!
//! Configurations of diffusers contain them (`"lambda_min_clipped": -Infinity`). They are read as `null`, which is an error
//! that names the key if a number is needed there.

use serde::de::DeserializeOwned;

/// Text that is not the expected JSON, with the path of the key.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct JsonError(#[from] serde_path_to_error::Error<serde_json::Error>);

/// How Python writes numbers that are not finite, longest first.
const NOT_FINITE: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];

/// Parses JSON as Python writes it.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, JsonError> {
    let strict = without_not_finite(text);
    Ok(serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(&strict))?)
}

/// Deserialises a value that is already parsed.
pub fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, JsonError> {
    Ok(serde_path_to_error::deserialize(value)?)
}

/// Replaces numbers that are not finite by `null`, padded to the same length where possible, so that the columns in errors
/// match the file.
fn without_not_finite(text: &[u8]) -> Vec<u8> {
    let mut strict = Vec::with_capacity(text.len());
    let (mut rest, mut is_string) = (text, false);
    while let Some((&byte, after)) = rest.split_first() {
        let word = NOT_FINITE.into_iter().find(|word| !is_string && rest.starts_with(word));
        let taken = match (word, byte) {
            (Some(word), _) => {
                strict.extend_from_slice(b"null");
                strict.resize(strict.len() + word.len().saturating_sub(b"null".len()), b' ');
                word.len()
            }
            // The escaped character may be a quotation mark.
            (None, b'\\') if is_string => {
                strict.extend(rest.iter().take(2));
                2
            }
            (None, _) => {
                is_string ^= byte == b'"';
                strict.push(byte);
                rest.len() - after.len()
            }
        };
        rest = rest.get(taken..).unwrap_or_default();
    }
    strict
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn numbers_that_are_not_finite_are_null_and_strings_are_left_alone() {
        let text = br#"{"a": -Infinity, "b": [NaN, 1, Infinity], "NaN": "Infinity \" NaN", "c\\": NaN}"#;
        let expected = json!({"a": null, "b": [null, 1, null], "NaN": "Infinity \" NaN", "c\\": null});
        assert_eq!(parse::<Value>(text).unwrap(), expected);
        assert!(parse::<Value>(b"{\"a\": nan}").is_err() && parse::<Value>(b"\"\\").is_err());
    }

    #[test]
    fn an_error_names_the_key() {
        #[derive(Debug, serde::Deserialize)]
        struct Outer {
            inner: std::collections::BTreeMap<String, f32>,
        }
        assert_eq!(parse::<Outer>(br#"{"inner": {"beta": 0.5}}"#).unwrap().inner["beta"], 0.5);
        let error = parse::<Outer>(br#"{"inner": {"beta": NaN}}"#).unwrap_err().to_string();
        assert!(error.starts_with("inner.beta: invalid type: null"), "{error}");
        let error = from_value::<Outer>(json!({"inner": {"beta": "x"}})).unwrap_err().to_string();
        assert!(error.starts_with("inner.beta: invalid type: string"), "{error}");
    }
}
