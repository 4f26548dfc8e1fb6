//! Writes a profile as a trace for Perfetto (ui.perfetto.dev) and Chrome: complete events of the trace event format.

use std::path::Path;

use elbo_kernels::profile::Span;
use serde_json::json;

use crate::BenchError;

/// Writes operations as a trace.
pub(super) fn write(path: &Path, spans: &[Span]) -> Result<(), BenchError> {
    let micros = |time: std::time::Duration| time.as_nanos() as f64 / 1e3;
    let events: Vec<_> = spans
        .iter()
        .map(|span| {
            json!({
                "name": span.name, "cat": span.part.name(), "ph": "X", "pid": 1, "tid": span.thread,
                "ts": micros(span.start), "dur": micros(span.time),
                "args": { "gflop": span.flops as f64 / 1e9, "gflop_per_second": rate(span) },
            })
        })
        .collect();
    let trace = json!({ "traceEvents": events, "displayTimeUnit": "ms" });
    std::fs::write(path, trace.to_string()).map_err(|source| BenchError::Scenery {
        action: "writing",
        path: path.to_owned(),
        source,
    })
}

fn rate(span: &Span) -> f64 {
    span.flops as f64 / 1e9 / span.time.as_secs_f64().max(1e-9)
}
