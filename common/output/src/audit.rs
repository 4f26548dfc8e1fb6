//! The audited samples of a shard, as Parquet.

use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, StringArray, UInt32Array, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use elbo_core::audit::Audited;
use elbo_core::ids::{ClassIndex, SampleId};
use elbo_store::table::{self, Columns, Table, TableError};
use parquet::errors::ParquetError;

use crate::predictions::text;

/// Encodes the audited samples of a shard as Parquet, with `meta` as the file's key-value metadata.
pub fn encode(rows: &[Audited], meta: &[(String, String)]) -> Result<Bytes, TableError> {
    table::encode::<AuditTable>(rows, rows.len(), meta)
}

/// Decodes the audited samples of a Parquet file.
pub fn decode(bytes: Bytes) -> Result<Vec<Audited>, TableError> {
    table::decode::<AuditTable>(bytes)
}

/// The table of a shard's audited samples.
#[derive(Debug)]
pub(crate) struct AuditTable;

impl Table for AuditTable {
    type Row = Audited;

    const NAME: &'static str = "audited samples";

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("sample_id", DataType::UInt64, false),
            Field::new("key", DataType::Utf8, false),
            Field::new("label", DataType::Utf8, true),
            Field::new("predicted_index", DataType::Int32, false),
            Field::new("evaluations", DataType::UInt32, false),
            Field::new("reference_index", DataType::Int32, false),
            Field::new("reference_evaluations", DataType::UInt32, false),
        ])
    }

    fn columns(rows: &[Audited]) -> Result<Vec<ArrayRef>, ParquetError> {
        Ok(vec![
            Arc::new(UInt64Array::from_iter_values(rows.iter().map(|r| r.sample.0))),
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| &r.key))),
            Arc::new(StringArray::from_iter(rows.iter().map(|r| r.label.as_ref()))),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.class.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.evaluations))),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|r| r.reference_class.0))),
            Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.reference_evaluations))),
        ])
    }

    fn read(columns: &Columns<'_>, rows: &mut Vec<Audited>) -> Result<(), TableError> {
        let sample: &UInt64Array = columns.required("sample_id")?;
        let key: &StringArray = columns.required("key")?;
        let label: &StringArray = columns.nullable("label")?;
        let class: &Int32Array = columns.required("predicted_index")?;
        let evaluations: &UInt32Array = columns.required("evaluations")?;
        let reference: &Int32Array = columns.required("reference_index")?;
        let reference_evaluations: &UInt32Array = columns.required("reference_evaluations")?;
        rows.extend((0..columns.rows()).map(|i| Audited {
            sample: SampleId(sample.value(i)),
            key: key.value(i).to_owned(),
            label: text(label, i),
            class: ClassIndex(class.value(i)),
            evaluations: evaluations.value(i),
            reference_class: ClassIndex(reference.value(i)),
            reference_evaluations: reference_evaluations.value(i),
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_parquet() {
        let row = |id, label: Option<&str>, class, reference| Audited {
            sample: SampleId(id),
            key: format!("{id}.png"),
            label: label.map(str::to_owned),
            class: ClassIndex(class),
            evaluations: 20,
            reference_class: ClassIndex(reference),
            reference_evaluations: 300,
        };
        let rows = [row(0, Some("ant"), 0, 0), row(1, None, 2, 1)];
        assert_eq!(decode(encode(&rows, &[]).unwrap()).unwrap(), rows);
    }
}
