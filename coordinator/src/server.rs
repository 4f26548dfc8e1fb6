//! The gRPC server: the service behind its token, reflection likewise, and health without one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use elbo_net::{LimitedListener, RateLimitedLog};
use elbo_proto::{DESCRIPTORS, MAX_MESSAGE_BYTES, v1};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Status};
use v1::coordinator_server::CoordinatorServer;

use crate::options::Options;
use crate::service::{Service, Shared};

/// Calls of one connection at a time: a worker has one or two for each of its devices, and heartbeats.
const STREAMS: u32 = 128;

/// Bytes of a call's headers; a token and a few short ones.
const HEADER_BYTES: u32 = 16 << 10;

/// How often a connection is asked whether it is alive, and how long it may take to answer.
const PING: Duration = Duration::from_secs(20);

/// Refuses calls without the right bearer token.
#[derive(Clone)]
struct Token {
    expected: Option<blake3::Hash>,
    shared: Arc<Shared>,
    /// When calls without a token, and with a wrong one, were last logged.
    told: Arc<[RateLimitedLog; 2]>,
}

impl tonic::service::Interceptor for Token {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(expected) = self.expected else { return Ok(request) };
        let given = request.metadata().get("authorization").and_then(|v| v.to_str().ok());
        let (log, told, remedy) = match given.and_then(|v| v.strip_prefix("Bearer ")) {
            // Hashes compare in constant time.
            Some(token) if blake3::hash(token.as_bytes()) == expected => return Ok(request),
            Some(_) => (&self.told[0], "the token is wrong", "use the coordinator's --token-file or ELBO_TOKEN"),
            None => (&self.told[1], "a token is needed", "give the coordinator's with --token-file or ELBO_TOKEN"),
        };
        self.shared.telemetry.unauthorized.inc();
        if log.is_due() {
            let peer = request.remote_addr().map(|peer| peer.to_string()).unwrap_or_default();
            tracing::warn!(peer, "call refused: {told}");
        }
        Err(Status::unauthenticated(format!("{told}: {remedy}")))
    }
}

/// Serves those who come through the door until `hang_up`.
pub(crate) fn serve(
    shared: Arc<Shared>,
    options: &Options,
    door: LimitedListener,
    hang_up: CancellationToken,
) -> impl Future<Output = Result<(), tonic::transport::Error>> + use<> {
    let token = Token {
        expected: options.token.as_ref().map(|t| blake3::hash(t.as_bytes())),
        shared: Arc::clone(&shared),
        told: Arc::default(),
    };
    let span = shared.span.clone();
    let mut server = Server::builder()
        .trace_fn(move |request| {
            let call =
                tracing::trace_span!(target: "elbo::trace", parent: &span, "call", method = request.uri().path());
            // Where nobody traces, what is logged of a call is logged as the coordinator's.
            if call.is_disabled() { span.clone() } else { call }
        })
        .max_concurrent_streams(STREAMS)
        .concurrency_limit_per_connection(STREAMS as usize)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING));
    let tls = options.tls.clone();
    let service = CoordinatorServer::new(Service { shared: Arc::clone(&shared) })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // The descriptors are this build's own; were they not readable, reflection would be left out.
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .ok();
    let _ = shared.telemetry.door.set(door.door());
    async move {
        // Without its server a coordinator ends too, whatever ended that: nobody could work any more.
        let _closing = shared.closing.clone().drop_guard();
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<CoordinatorServer<Service>>().await;
        shared.telemetry.serving.store(true, Ordering::Relaxed);
        let closing = shared.closing.clone();
        let telling = tokio::spawn(async move {
            closing.cancelled().await;
            health.set_not_serving::<CoordinatorServer<Service>>().await;
            health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
        });
        let routes = server
            .add_service(InterceptedService::new(service, token.clone()))
            .add_service(health_service)
            .add_optional_service(reflection.map(|reflection| InterceptedService::new(reflection, token)));
        let served = match tls {
            None => routes.serve_with_incoming_shutdown(door.incoming(), hang_up.cancelled()).await,
            Some(tls) => routes.serve_with_incoming_shutdown(tls.incoming(door), hang_up.cancelled()).await,
        };
        telling.abort();
        shared.telemetry.serving.store(false, Ordering::Relaxed);
        served
    }
}
