//! The gRPC server: the service and reflection need the token, health does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use elbo_net::{Door, LimitedListener, RateLimitedLog};
use elbo_proto::{DESCRIPTORS, MAX_MESSAGE_BYTES, v1};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::Instrument;
use v1::coordinator_server::CoordinatorServer;

use crate::options::CoordinatorOptions;
use crate::service::{Current, Service, Shared};
use crate::status::Phase;

/// Concurrent calls per connection: a worker has one or two for each of its devices, and heartbeats.
const STREAMS: u32 = 128;

/// Bytes of a call's headers: a token and a few short ones.
const HEADER_BYTES: u32 = 16 << 10;

/// How often a connection is pinged, and how long it may take to answer.
const PING: Duration = Duration::from_secs(20);

/// A server that failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It can't serve.
    #[error("serving on {address}: {source}")]
    Transport {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: tonic::transport::Error,
    },
    /// It was closed after an earlier job.
    #[error("the coordinator's server is closed: start another one for the next job")]
    Closed,
    /// Its task ended by a panic, which is a defect.
    #[error("the coordinator's server ended unexpectedly: run the same command again to resume, and report this")]
    Panic,
}

/// Refuses calls without the right bearer token.
#[derive(Clone)]
struct Token {
    expected: Option<blake3::Hash>,
    current: Current,
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
        self.current.get().telemetry.unauthorized.inc();
        if log.is_due() {
            let peer = request.remote_addr().map(|peer| peer.to_string()).unwrap_or_default();
            tracing::warn!(peer, "call refused: {told}");
        }
        Err(Status::unauthenticated(format!("{told}: {remedy}")))
    }
}

/// The server at a coordinator's address. It outlives its jobs: workers of one job wait there for the next.
#[derive(Debug)]
pub struct Server {
    options: CoordinatorOptions,
    address: SocketAddr,
    door: Door,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Calls wait in the socket's queue.
    Bound(LimitedListener),
    Serving(Serving),
    Closed,
}

#[derive(Debug)]
struct Serving {
    current: Current,
    health: HealthReporter,
    /// The task that reports when the current job needs no more workers.
    _telling: AbortOnDropHandle<()>,
    task: AbortOnDropHandle<Result<(), tonic::transport::Error>>,
    hang_up: CancellationToken,
}

impl Server {
    /// A server that answers calls once there is a job.
    pub fn new(listener: TcpListener, options: CoordinatorOptions) -> Self {
        let address = listener.local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        let listener = LimitedListener::new(listener, options.limits);
        Self { options, address, door: listener.door(), state: State::Bound(listener) }
    }

    /// Serves another job from now on.
    pub(crate) async fn serve(&mut self, shared: &Arc<Shared>) -> Result<(), ServeError> {
        let _ = shared.telemetry.door.set(self.door.clone());
        self.state = match std::mem::replace(&mut self.state, State::Closed) {
            State::Bound(listener) => {
                let (current, hang_up) = (Current::new(Arc::clone(shared)), CancellationToken::new());
                let (health, serving) = answer(current.clone(), &self.options, listener, hang_up.clone());
                let task = AbortOnDropHandle::new(tokio::spawn(serving.in_current_span()));
                let _telling = tell(&health, shared).await;
                State::Serving(Serving { current, health, _telling, task, hang_up })
            }
            State::Serving(serving) => {
                serving.current.set(Arc::clone(shared));
                let _telling = tell(&serving.health, shared).await;
                State::Serving(Serving { _telling, ..serving })
            }
            State::Closed => return Err(ServeError::Closed),
        };
        Ok(())
    }

    /// Closes the server, once running calls are answered.
    pub(crate) async fn close(&mut self) -> Result<(), ServeError> {
        let State::Serving(Serving { task, hang_up, .. }) = std::mem::replace(&mut self.state, State::Closed) else {
            return Ok(());
        };
        hang_up.cancel();
        let served = task.await.map_err(|_| ServeError::Panic)?;
        served.map_err(|source| ServeError::Transport { address: self.address, source })
    }
}

/// Reports that a job needs workers, until it needs none.
async fn tell(health: &HealthReporter, shared: &Arc<Shared>) -> AbortOnDropHandle<()> {
    health.set_serving::<CoordinatorServer<Service>>().await;
    health.set_service_status("", ServingStatus::Serving).await;
    shared.telemetry.serving.store(true, Ordering::Relaxed);
    let (health, closing) = (health.clone(), shared.closing.clone());
    AbortOnDropHandle::new(tokio::spawn(async move {
        closing.cancelled().await;
        health.set_not_serving::<CoordinatorServer<Service>>().await;
        health.set_service_status("", ServingStatus::NotServing).await;
    }))
}

/// Ends the coordinator when its server ends for any reason, since no worker could reach it.
struct EndsWithServer(Current);

impl Drop for EndsWithServer {
    fn drop(&mut self) {
        let shared = self.0.get();
        shared.telemetry.serving.store(false, Ordering::Relaxed);
        shared.close(Phase::Stopping);
    }
}

/// Serves the connections that the listener accepts, until `hang_up`. Also returns the reporter of the service's health.
fn answer(
    current: Current,
    options: &CoordinatorOptions,
    listener: LimitedListener,
    hang_up: CancellationToken,
) -> (HealthReporter, impl Future<Output = Result<(), tonic::transport::Error>> + use<>) {
    let token = Token {
        expected: options.token.as_ref().map(|t| blake3::hash(t.as_bytes())),
        current: current.clone(),
        told: Arc::default(),
    };
    let of_job = current.clone();
    let mut server = tonic::transport::Server::builder()
        .trace_fn(move |request| {
            let span = of_job.get().span.clone();
            let call =
                tracing::trace_span!(target: "elbo::trace", parent: &span, "call", method = request.uri().path());
            // Without tracing, log a call under the coordinator's span.
            if call.is_disabled() { span } else { call }
        })
        .max_concurrent_streams(STREAMS)
        .concurrency_limit_per_connection(STREAMS as usize)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING));
    let tls = options.tls.clone();
    let service = CoordinatorServer::new(Service { current: current.clone() })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // The descriptors are this build's own. If they were not readable, reflection would be left out.
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .ok();
    let (health, health_service) = tonic_health::server::health_reporter();
    let routes = server
        .add_service(InterceptedService::new(service, token.clone()))
        .add_service(health_service)
        .add_optional_service(reflection.map(|reflection| InterceptedService::new(reflection, token)));
    let serving = async move {
        let _guard = EndsWithServer(current);
        match tls {
            None => routes.serve_with_incoming_shutdown(listener.incoming(), hang_up.cancelled()).await,
            Some(tls) => routes.serve_with_incoming_shutdown(tls.incoming(listener), hang_up.cancelled()).await,
        }
    };
    (health, serving)
}
