//! The HTTP side of a process, for probes, Prometheus and people. It only reads, and shows no secrets.
//!
//! Alive and ready are two things: `/livez` says that this process answers, whatever storage, coordinator or workers do,
//! since restarting it would mend none of them. `/readyz` says whether it does its work.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::host::{self, Hosts};
use crate::listen::{LimitedListener, Limits};

/// What a process tells.
pub trait Operations: Send + Sync {
    /// Whether it does its work; else why not.
    fn ready(&self) -> Result<(), String>;
    /// Its metrics in the OpenMetrics text format.
    fn metrics(&self) -> String;
    /// Its state as one JSON object.
    fn status(&self) -> serde_json::Value;
    /// Its state as a page of HTML.
    fn page(&self) -> String;
}

/// The place of a process's [`Operations`], which is empty while it starts. Where one job follows another, as a race its pilot,
/// it holds the latest.
#[derive(Clone, Default)]
pub struct Operator(Arc<RwLock<Option<Arc<dyn Operations>>>>);

impl std::fmt::Debug for Operator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Operator").field("started", &self.get().is_some()).finish()
    }
}

impl Operator {
    /// The process has started, or goes on with something else, which is shown from here on.
    pub fn started(&self, operations: Arc<dyn Operations>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(operations);
    }

    /// Answers on `listener`, to the names in `hosts`, until `stop`.
    pub async fn serve(self, listener: TcpListener, hosts: Hosts, stop: CancellationToken) -> std::io::Result<()> {
        let routes = Router::new()
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route("/", get(page))
            .route_layer(from_fn_with_state(hosts, host::check))
            // This tells nothing, and a probe that was refused would have the process killed.
            .route("/livez", get(async || "alive\n"))
            .with_state(self);
        // Probes and scrapers come a few times a minute, and browsers keep no more than six connections.
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

/// What browsers are told beside the content: it may run nothing, and is to be asked for anew.
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
        None => {
            (StatusCode::SERVICE_UNAVAILABLE, STRICT, content, document("starting", "<p>starting</p>")).into_response()
        }
        Some(operations) => (STRICT, content, operations.page()).into_response(),
    }
}

/// A page that is self-contained and renews itself; `body` is HTML, `title` is text.
pub fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"5\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{}</title><style>{}</style>{body}</html>\n",
        escape(title),
        include_str!("page.css")
    )
}

/// Text as it is written in HTML, in attributes too: what workers call themselves is theirs to choose.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A registry as text.
pub fn encode(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A job's operations, which tell its name.
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
    async fn what_follows_is_shown_in_the_place_of_what_was_before() {
        let operator = Operator::default();
        // Who serves has its own handle.
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
