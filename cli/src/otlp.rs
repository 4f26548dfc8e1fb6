//! Traces over OTLP (HTTP, protobuf), where `OTEL_EXPORTER_OTLP_ENDPOINT` says where to; the other `OTEL_*` variables hold
//! too. Calls, blocks, and shards being opened and committed are spans of target `elbo::trace`, which logs know nothing of.

use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

/// How long a collector may take to answer, and how long an ending process waits for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends from the exporter's thread, which is none of the runtime's, by a task on it.
#[derive(Debug)]
struct OnRuntime {
    runtime: Handle,
    client: reqwest::Client,
}

#[async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, request) = (self.client.clone(), reqwest::Request::try_from(request)?);
        let sending = self.runtime.spawn(async move {
            let answer = client.execute(request).await?;
            let status = answer.status();
            Ok::<_, reqwest::Error>((status, answer.bytes().await?))
        });
        let (status, body) = sending.await??;
        Ok(Response::builder().status(status).body(body)?)
    }
}

/// The exporter, where one is asked for.
pub(crate) fn exporter(runtime: &Handle) -> anyhow::Result<Option<SdkTracerProvider>> {
    let wanted = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
    if !wanted.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
        return Ok(None);
    }
    let client = reqwest::Client::builder().timeout(PATIENCE).build().context("setting up traces")?;
    let client = OnRuntime { runtime: runtime.clone(), client };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .build()
        .context("setting up traces: OTEL_EXPORTER_OTLP_ENDPOINT takes a URL like http://collector:4318")?;
    // OTEL_SERVICE_NAME, where it is set, goes before.
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("elbo");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    Ok(Some(provider))
}

/// Hands spans to the exporter.
pub(crate) fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    // The exporter's own requests are none of ours to trace.
    let ours = Targets::new()
        .with_target("elbo::trace", LevelFilter::TRACE)
        .with_target("elbo_coordinator", LevelFilter::INFO)
        .with_target("elbo_worker", LevelFilter::INFO);
    tracing_opentelemetry::layer().with_tracer(provider.tracer("elbo")).with_filter(ours)
}

/// Sends what is left.
pub(crate) fn finish(provider: &SdkTracerProvider) {
    if let Err(error) = provider.shutdown_with_timeout(PATIENCE) {
        tracing::warn!(%error, "the last traces were not sent");
    }
}
