//! Reads settings as libraries write them: an unset key may be absent or `null`, and a square may be given by two
//! sides.

use std::path::Path;

use elbo_core::python_json;
use elbo_store::files;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::error::ModelError;

/// Reads a file; a missing file and an unreadable one are different errors.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    files::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ModelError::MissingFile(path.to_owned()),
        _ => ModelError::Read { path: path.to_owned(), source },
    })
}

/// Reads a JSON configuration.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    python_json::parse(&read(path)?).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// The error for an unsupported setting.
pub(crate) fn unsupported(path: &Path, key: &str, value: impl std::fmt::Debug) -> ModelError {
    ModelError::Unsupported { path: path.to_owned(), key: key.to_owned(), value: format!("{value:?}") }
}

/// Reads a configuration in which `null` means the default, like an absent key.
pub(crate) fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    with_defaults(path, read_json(path)?)
}

/// Deserializes the settings in `values`, leaving out those that are `null`.
pub(crate) fn with_defaults<T: DeserializeOwned>(path: &Path, mut values: Value) -> Result<T, ModelError> {
    if let Value::Object(settings) = &mut values {
        settings.retain(|_, value| !value.is_null());
    }
    python_json::from_value(values).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// The error for an unsupported setting, with its value from the file.
pub(crate) fn refused(path: &Path, key: &str, value: Option<&Value>) -> ModelError {
    let value = value.map_or_else(|| Value::Null.to_string(), Value::to_string);
    ModelError::Unsupported { path: path.to_owned(), key: key.to_owned(), value }
}

/// A side, as a number or as the height and width of a square.
#[derive(Deserialize)]
#[serde(untagged)]
enum Side {
    One(usize),
    Two([usize; 2]),
}

/// Reads the side of a square.
pub(crate) fn square<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    match Side::deserialize(deserializer) {
        Ok(Side::One(side)) => Ok(side),
        Ok(Side::Two([height, width])) if height == width => Ok(height),
        Ok(Side::Two([height, width])) => Err(D::Error::custom(format!("{height} x {width} is not a square"))),
        Err(_) => Err(D::Error::custom("it should be a whole number, or two that are equal")),
    }
}

/// Reads the optional side of a square.
pub(crate) fn optional_square<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    square(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(default)]
    struct Settings {
        #[serde(deserialize_with = "square")]
        side: usize,
        #[serde(deserialize_with = "optional_square")]
        other: Option<usize>,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self { side: 64, other: None }
        }
    }

    #[test]
    fn squares_and_nulls_are_read_and_errors_name_file_and_key() {
        let read =
            |json: &str| with_defaults::<Settings>(Path::new("unet/config.json"), serde_json::from_str(json).unwrap());
        assert_eq!(read(r#"{"side": [8, 8], "other": 7}"#).unwrap(), Settings { side: 8, other: Some(7) });
        assert_eq!(read(r#"{"side": null, "other": null}"#).unwrap(), Settings::default());
        for (json, part) in [(r#"{"side": [8, 16]}"#, "side: 8 x 16"), (r#"{"other": "x"}"#, "other: it should be")] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains("unet/config.json") && error.contains(part), "{error}");
        }
    }
}
