//! Sends traces over OTLP (HTTP, protobuf) to `OTEL_EXPORTER_OTLP_ENDPOINT`, if it is set; the other `OTEL_*` variables also
//! apply. Calls, blocks, and the opening and committing of shards are spans of target `elbo::trace`, which logs don't show.

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

/// Timeout for a collector's answer, also when the process ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// An HTTP client for the exporter's thread, which is outside the runtime: it sends in a task on the runtime.
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

/// The exporter, if one is requested.
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
    // OTEL_SERVICE_NAME takes precedence, if it is set.
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("elbo");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    Ok(Some(provider))
}

/// A layer that passes spans to the exporter.
pub(crate) fn layer<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    // Don't trace the exporter's own requests.
    let ours = Targets::new()
        .with_target("elbo::trace", LevelFilter::TRACE)
        .with_target("elbo_coordinator", LevelFilter::INFO)
        .with_target("elbo_worker", LevelFilter::INFO);
    tracing_opentelemetry::layer().with_tracer(provider.tracer("elbo")).with_filter(ours)
}

/// Sends the remaining traces.
pub(crate) fn finish(provider: &SdkTracerProvider) {
    if let Err(error) = provider.shutdown_with_timeout(PATIENCE) {
        tracing::warn!(%error, "the last traces were not sent");
    }
}
