//! The HTTP server of a process, for probes, Prometheus and people. It is read-only and shows no secrets.
//!
//! Liveness and readiness differ. `/livez` says that this process responds, whatever the state of storage, coordinator or
//! workers, since a restart would not fix those. `/readyz` says whether the process does its work.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::host::{self, Hosts};
use crate::listen::{LimitedListener, Limits};

/// What a process shows.
pub trait Operations: Send + Sync {
    /// Whether it does its work; the error says why not.
    fn ready(&self) -> Result<(), String>;
    /// Its metrics in the OpenMetrics text format.
    fn metrics(&self) -> String;
    /// Its state as one JSON object.
    fn status(&self) -> serde_json::Value;
    /// Its state as a page of HTML.
    fn page(&self) -> String;
}

/// A process's [`Operations`], empty while it starts. If one job follows another, as a race follows its pilot, it holds the
/// latest.
#[derive(Clone, Default)]
pub struct Operator(Arc<RwLock<Option<Arc<dyn Operations>>>>);

impl std::fmt::Debug for Operator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Operator").field("started", &self.get().is_some()).finish()
    }
}

impl Operator {
    /// Shows these operations from now on: the process has started, or continues with another job.
    pub fn started(&self, operations: Arc<dyn Operations>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(operations);
    }

    /// Serves on `listener`, for the names in `hosts`, until `stop`.
    pub async fn serve(self, listener: TcpListener, hosts: Hosts, stop: CancellationToken) -> std::io::Result<()> {
        let routes = Router::new()
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route("/", get(page))
            .route_layer(from_fn_with_state(hosts, host::check))
            // This route has no host check: it reveals nothing, and a refused probe would get the process killed.
            .route("/livez", get(async || "alive\n"))
            .with_state(self);
        // Probes and scrapers send a few requests a minute, and browsers open at most six connections.
        let limits = Limits { connections: 256, silence: Duration::from_secs(30), ..Limits::default() };
        let listener = LimitedListener::new(listener, limits);
        axum::serve(listener, routes).with_graceful_shutdown(async move { stop.cancelled().await }).await
    }

    fn get(&self) -> Option<Arc<dyn Operations>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn starting() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response()
}

async fn ready(State(operator): State<Operator>) -> Response {
    match operator.get().map(|operations| operations.ready()) {
        None => starting(),
        Some(Ok(())) => "ready\n".into_response(),
        Some(Err(reason)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

/// Headers for browsers: the page may run no scripts, and must not be cached.
const STRICT: [(HeaderName, &str); 3] = [
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CACHE_CONTROL, "no-store"),
];

async fn metrics(State(operator): State<Operator>) -> Response {
    let Some(operations) = operator.get() else { return starting() };
    let content = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (content, operations.metrics()).into_response()
}

async fn status(State(operator): State<Operator>) -> Response {
    let content = [(header::CONTENT_TYPE, "application/json")];
    match operator.get() {
        None => (StatusCode::SERVICE_UNAVAILABLE, STRICT, content, r#"{"state":"starting"}"#).into_response(),
        Some(operations) => (STRICT, content, operations.status().to_string()).into_response(),
    }
}

async fn page(State(operator): State<Operator>) -> Response {
    let content = [(header::CONTENT_TYPE, "text/html; charset=utf-8")];
    match operator.get() {
        None => (StatusCode::SERVICE_UNAVAILABLE, STRICT, content, document("starting", html! { p { "starting" } }))
            .into_response(),
        Some(operations) => (STRICT, content, operations.page()).into_response(),
    }
}

/// A self-contained page that reloads itself.
pub fn document(title: &str, body: Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="refresh" content="5";
                meta name="viewport" content="width=device-width";
                title { (title) }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body { (body) }
        }
    };
    page.into_string()
}

/// Encodes a registry as text.
pub fn encode(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Operations that show a job's name.
    struct Job(&'static str);

    impl Operations for Job {
        fn ready(&self) -> Result<(), String> {
            if self.0 == "pilot" { Err("stopping".into()) } else { Ok(()) }
        }

        fn metrics(&self) -> String {
            self.0.into()
        }

        fn status(&self) -> serde_json::Value {
            self.0.into()
        }

        fn page(&self) -> String {
            self.0.into()
        }
    }

    #[tokio::test]
    async fn later_operations_replace_earlier_ones() {
        let operator = Operator::default();
        // The server has its own handle.
        let served = || State(operator.clone());
        assert_eq!(ready(served()).await.status(), StatusCode::SERVICE_UNAVAILABLE);
        for (job, code) in [("pilot", StatusCode::SERVICE_UNAVAILABLE), ("race", StatusCode::OK)] {
            operator.started(Arc::new(Job(job)));
            assert_eq!(ready(served()).await.status(), code);
            for (answer, text) in [
                (metrics(served()).await, job.to_owned()),
                (page(served()).await, job.to_owned()),
                (status(served()).await, format!("\"{job}\"")),
            ] {
                let body = axum::body::to_bytes(answer.into_body(), 1024).await.unwrap();
                assert_eq!(std::str::from_utf8(&body).unwrap(), text);
            }
        }
    }
}
