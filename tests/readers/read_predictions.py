"""Reads the predictions of an output directory with pyarrow and with DuckDB, and checks that they see the same.

    python read_predictions.py OUT

Prints {pyarrow: {rows, columns, accuracy}, duckdb: {rows, accuracy, mean_scores_len}}; exits with 1 where they differ.
Accuracy is the share of rows with status ok whose label is the predicted class; null where no such row has a label.
"""
import json
import math
import sys
from pathlib import Path

import duckdb
import pyarrow.parquet as pq


def with_pyarrow(directory):
    table = pq.read_table(directory)
    rows = table.to_pylist()
    judged = [row for row in rows if row["status"] == "ok" and row["label"] is not None]
    right = sum(row["label"] == row["predicted_class"] for row in judged)
    return {
        "rows": len(rows),
        "columns": {field.name: str(field.type) for field in table.schema},
        "accuracy": right / len(judged) if judged else None,
    }, (sum(len(row["scores"]) for row in rows) / len(rows) if rows else None)


def with_duckdb(directory):
    rows, accuracy, mean_scores_len = duckdb.execute(
        """
        SELECT count(*),
               avg((label = predicted_class)::INT) FILTER (status = 'ok' AND label IS NOT NULL),
               avg(len(scores))
        FROM read_parquet(?)
        """,
        [str(directory / "*.parquet")],
    ).fetchone()
    return {"rows": rows, "accuracy": accuracy, "mean_scores_len": mean_scores_len}


def same(a, b):
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-12))


def main():
    directory = Path(sys.argv[1]) / "predictions"
    (arrow, scores_len), duck = with_pyarrow(directory), with_duckdb(directory)
    print(json.dumps({"pyarrow": arrow, "duckdb": duck}))
    pairs = [(arrow["rows"], duck["rows"]), (arrow["accuracy"], duck["accuracy"]), (scores_len, duck["mean_scores_len"])]
    if not all(same(a, b) for a, b in pairs):
        sys.exit("pyarrow and duckdb read the predictions differently")


if __name__ == "__main__":
    main()
