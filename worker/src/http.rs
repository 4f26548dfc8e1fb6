//! A worker process's answers to operators over HTTP.

use elbo_net::Operations;
use elbo_net::http::{document, encode};
use maud::html;

use crate::metrics::metrics;

/// The operators' view of this process.
#[derive(Clone, Debug)]
pub struct WorkerOperations {
    /// The coordinator's URL.
    pub coordinator: String,
    /// Its devices.
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
        let status = self.status();
        let facts = status.as_object().into_iter().flatten();
        let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let body = html! {
            h1 { "elbo: worker is " (self.state()) }
            table {
                @for (name, value) in facts { tr { th { (name.replace('_', " ")) } td { (text(value)) } } }
            }
        };
        document("elbo worker", body)
    }
}
