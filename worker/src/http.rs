//! What a worker process tells operators over HTTP.

use std::fmt::Write;

use elbo_net::Operations;
use elbo_net::http::{document, encode, escape};

use crate::metrics::metrics;

/// This process, as operators see it.
#[derive(Clone, Debug)]
pub struct WorkerOperations {
    /// The coordinator's URL.
    pub coordinator: String,
    /// What it computes on.
    pub device: String,
}

impl WorkerOperations {
    fn state(&self) -> &'static str {
        match (metrics().has_joined(), metrics().has_loaded()) {
            (false, _) => "joining",
            (true, false) => "loading",
            (true, true) => "working",
        }
    }
}

impl Operations for WorkerOperations {
    fn ready(&self) -> Result<(), String> {
        match self.state() {
            "working" => Ok(()),
            "loading" => Err("loading the model".into()),
            _ => Err(format!("not joined to {}", self.coordinator)),
        }
    }

    fn metrics(&self) -> String {
        encode(&metrics().registry)
    }

    fn status(&self) -> serde_json::Value {
        let (worker, job) = metrics().names();
        serde_json::json!({
            "state": self.state(),
            "worker": worker,
            "job": job,
            "coordinator": self.coordinator,
            "device": self.device,
            "activity": metrics().activity(),
            "leases": metrics().leases.get(),
            "evaluations": metrics().evaluations.get(),
            "evaluations_acknowledged": metrics().acknowledged.get(),
            "images_read": metrics().images_read.get(),
            "retries": metrics().retries.get(),
        })
    }

    fn page(&self) -> String {
        let mut body = format!("<h1>elbo: worker is {}</h1><table>", self.state());
        if let serde_json::Value::Object(status) = self.status() {
            for (name, value) in status {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                // Writing to a string does not fail.
                let _ = write!(body, "<tr><th>{}<td>{}", escape(&name.replace('_', " ")), escape(&text));
            }
        }
        body.push_str("</table>");
        document("elbo worker", &body)
    }
}
