"""Reads the predictions of an output with five programs, and checks that they see the same.

    python read_predictions.py OUT

Prints {rows, columns, metadata, statistics, names, by_reader: {reader: rows}}: the types that pyarrow sees, the file's own
key-value pairs, the smallest and largest value of some columns of every file by DuckDB, and the class names that DuckDB reads
from the files. A row is [sample_id, key, label, predicted_class, predicted_index, margin, evaluations, status, error, number
of scores, second-best class, its mean error, whether it has a standard error]. Exits with 1 if readers differ.
"""
import json
import math
import sys
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
from datasets import load_dataset

PLAIN = ["sample_id", "key", "label", "predicted_class", "predicted_index", "margin", "evaluations", "status", "error"]


def row(record):
    """A row from any dictionary-like object that a reader returns; missing values are None."""
    plain = [record[name] for name in PLAIN]
    scores = list(record["scores"])
    second = scores[1] if len(scores) > 1 else {"class_index": None, "mean_error": None, "std_error": None}
    nested = [len(scores), second["class_index"], second["mean_error"], second["std_error"] is not None]
    return [None if isinstance(v, float) and math.isnan(v) else v for v in plain + nested]


def with_pyarrow(directory):
    return [row(record) for record in pq.read_table(directory).to_pylist()]


def with_duckdb(directory):
    found = duckdb.execute(
        f"""
        SELECT {", ".join(PLAIN)}, len(scores), scores[2].class_index, scores[2].mean_error, scores[2].std_error IS NOT NULL
        FROM read_parquet(?) ORDER BY sample_id
        """,
        [str(directory / "*.parquet")],
    )
    return [list(record) for record in found.fetchall()]


def with_polars(directory):
    frame = pl.scan_parquet(directory / "*.parquet").sort("sample_id")
    second = pl.col("scores").list.get(1, null_on_oob=True).struct
    nested = [
        pl.col("scores").list.len(),
        second.field("class_index"),
        second.field("mean_error"),
        second.field("std_error").is_not_null().alias("has_std_error"),
    ]
    return [list(record) for record in frame.select(PLAIN + nested).collect().rows()]


def with_pandas(directory):
    return [row(record) for record in pd.read_parquet(directory).replace({float("nan"): None}).to_dict("records")]


def with_datasets(directory):
    return [row(record) for record in load_dataset("parquet", data_files=str(directory / "*.parquet"), split="train")]


def statistics(directory):
    found = duckdb.execute(
        """
        SELECT path_in_schema, min(stats_min_value::BIGINT), max(stats_max_value::BIGINT)
        FROM parquet_metadata(?) WHERE path_in_schema IN ('sample_id', 'predicted_index')
        GROUP BY file_name, path_in_schema ORDER BY path_in_schema, 2
        """,
        [str(directory / "*.parquet")],
    )
    return [list(record) for record in found.fetchall()]


def names(directory):
    """The names of the classes, read by SQL from the prediction files alone."""
    found = duckdb.execute(
        """
        SELECT DISTINCT s.class_index, json_extract_string(m.classes, '$."' || s.class_index || '"')
        FROM (SELECT unnest(scores) AS s FROM read_parquet($1)),
             (SELECT decode(value) AS classes FROM parquet_kv_metadata($1) WHERE decode(key) = 'elbo.classes' LIMIT 1) m
        ORDER BY 1
        """,
        [str(directory / "*.parquet")],
    )
    return [list(record) for record in found.fetchall()]


def main():
    directory = Path(sys.argv[1]) / "predictions"
    readers = [with_pyarrow, with_duckdb, with_polars, with_pandas, with_datasets]
    rows = {reader.__name__.removeprefix("with_"): reader(directory) for reader in readers}
    first = sorted(directory.iterdir())[0]
    metadata = pq.read_metadata(first).metadata
    print(
        json.dumps(
            {
                "rows": rows["pyarrow"],
                "columns": {field.name: str(field.type) for field in pq.read_schema(first)},
                "metadata": {k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"elbo.")},
                "statistics": statistics(directory),
                "names": names(directory),
                "by_reader": {name: len(found) for name, found in rows.items()},
            }
        )
    )
    for name, found in rows.items():
        for expected, other in zip(rows["pyarrow"], found, strict=True):
            if expected != other:
                sys.exit(f"pyarrow reads {expected}, {name} reads {other}")


if __name__ == "__main__":
    main()
