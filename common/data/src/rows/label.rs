//! The column of a Parquet file with the labels: names or numbers, which is decided once per file.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, Schema};
use parquet::arrow::arrow_reader::ArrowReaderMetadata;

use super::super::ListOptions;
use super::{brief, describe};

/// Names of the column with the labels; the first that can hold labels is used.
const LABEL_COLUMNS: [&str; 3] = ["label", "cls", "class"];

/// A column of labels.
#[derive(Debug)]
pub(super) struct LabelColumn {
    pub(super) name: String,
    /// The names of classes by number, from the Hugging Face metadata.
    class_names: Vec<String>,
    /// Whether numbers mean these names, since the job may number its classes differently. If the job knows at least one of
    /// the names, all numbers are read as names.
    by_name: bool,
}

impl LabelColumn {
    /// The column of labels, if there is one and labels are used; or the description of a column with such a name that can't
    /// hold labels.
    pub(super) fn of(
        metadata: &ArrowReaderMetadata,
        options: &ListOptions<'_>,
    ) -> Result<(Option<Self>, Option<String>), String> {
        let schema = metadata.schema();
        let named = match options.label_column() {
            Some(name) => {
                let field = schema.field_with_name(name);
                let kind = field.map_err(|_| format!("has no column '{name}' of labels: {}", describe(schema)))?;
                if !can_label(kind.data_type()) {
                    return Err(format!(
                        "has a column '{name}' of type {}, which can't be labels: give names or whole numbers; {}",
                        brief(kind.data_type()),
                        describe(schema)
                    ));
                }
                Some(name)
            }
            None if options.takes_labels() => LABEL_COLUMNS.into_iter().find(|name| holds_labels(schema, name)),
            None => None,
        };
        let called_so = || LABEL_COLUMNS.iter().find_map(|name| schema.field_with_name(name).ok());
        let unusable = (named.is_none() && options.takes_labels()).then(called_so).flatten();
        let unusable = unusable.map(|field| format!("{}: {}", field.name(), brief(field.data_type())));
        let column = named.map(|name| {
            let class_names = class_names(metadata, name);
            let is_known = |name: &String| options.classes.is_none_or(|classes| classes.with_label(name).is_some());
            let by_name = class_names.iter().any(is_known);
            Self { name: name.to_owned(), class_names, by_name }
        });
        Ok((column, unusable))
    }

    /// The label of a row, if it has one.
    pub(super) fn label(&self, column: &ArrayRef, row: usize) -> Result<Option<String>, String> {
        let Some(label) = number(column, row)?.or_else(|| text(column, row)).filter(|label| !label.is_empty()) else {
            return Ok(None);
        };
        // In a column of classes, -1 means that there is no label.
        if !self.class_names.is_empty() && label == "-1" {
            return Ok(None);
        }
        if !self.by_name || *column.data_type() == DataType::Utf8 {
            return Ok(Some(label));
        }
        let name = label.parse().ok().and_then(|number: usize| self.class_names.get(number)).cloned();
        name.map(Some).ok_or_else(|| {
            format!("its label {label} is none of the {} classes in the file's metadata", self.class_names.len())
        })
    }
}

fn holds_labels(schema: &Schema, name: &str) -> bool {
    schema.field_with_name(name).is_ok_and(|field| can_label(field.data_type()))
}

fn can_label(kind: &DataType) -> bool {
    *kind == DataType::Utf8 || kind.is_integer() || matches!(kind, DataType::Float32 | DataType::Float64)
}

/// The names of a column's classes, if the file has Hugging Face metadata.
fn class_names(metadata: &ArrowReaderMetadata, label: &str) -> Vec<String> {
    let pairs = metadata.metadata().file_metadata().key_value_metadata();
    let noted = pairs.and_then(|pairs| pairs.iter().find(|pair| pair.key == "huggingface")?.value.as_deref());
    let noted: serde_json::Value = noted.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let names = noted["info"]["features"][label]["names"].as_array();
    names.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// A floating-point number as a whole number. pandas writes floating-point columns if whole numbers are missing in some rows.
fn number(array: &ArrayRef, row: usize) -> Result<Option<String>, String> {
    let value = match array.data_type() {
        _ if array.is_null(row) => return Ok(None),
        DataType::Float32 => f64::from(array.as_primitive::<Float32Type>().value(row)),
        DataType::Float64 => array.as_primitive::<Float64Type>().value(row),
        _ => return Ok(None),
    };
    if value.is_nan() {
        return Ok(None);
    }
    // Above this limit, floating-point numbers skip some whole numbers.
    if value.fract() != 0.0 || value.abs() > 9_007_199_254_740_992.0 {
        return Err(format!("its label {value} is not a whole number: a class has a name or a whole number"));
    }
    Ok(Some(format!("{value:.0}")))
}

/// A string or whole number as text.
pub(super) fn text(array: &ArrayRef, row: usize) -> Option<String> {
    if array.is_null(row) {
        return None;
    }
    macro_rules! number {
        ($kind:ty) => {
            array.as_primitive::<$kind>().value(row).to_string()
        };
    }
    Some(match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).to_owned(),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        _ => return None,
    })
}
