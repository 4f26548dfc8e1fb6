//! The connection to the coordinator: every call is retried until it is answered or patience runs out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use elbo_common::ids::LeaseKey;
use elbo_proto::v1::coordinator_client::CoordinatorClient;
use elbo_proto::{MAX_MESSAGE_BYTES, PROTOCOL, v1};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// A coordinator that can't be worked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not one.
    #[error("'{0}' is not a coordinator's address: give a URL like http://host:7600")]
    Address(String),
    /// The token can't be sent.
    #[error("the token holds characters that can't be sent: use printable ASCII")]
    Token,
    /// Nobody answers.
    #[error(
        "the coordinator at {address} has not answered for {seconds} s ({reason}): check that it runs and can be reached, then start this worker again"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// For how long.
        seconds: u64,
        /// The last error.
        reason: String,
    },
    /// The coordinator said no.
    #[error("the coordinator at {address} refused: {reason}")]
    Refused {
        /// Where.
        address: String,
        /// Its words.
        reason: String,
    },
}

/// How a call ended that was not answered.
#[derive(Debug)]
pub enum CallError {
    /// The coordinator does not know this worker: join again.
    Rejoin,
    /// The coordinator refused this very call; others may go through.
    Rejected(String),
    /// No more calls.
    Fatal(ClientError),
}

/// Adds the bearer token to every call.
#[derive(Clone, Debug)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// A coordinator, as a worker sees it.
#[derive(Clone, Debug)]
pub struct Client {
    inner: CoordinatorClient<InterceptedService<Channel, Bearer>>,
    address: String,
    /// The worker's name, unique for its process.
    pub worker: String,
    patience: Duration,
}

impl Client {
    /// A client that connects when first used. `patience` is how long an unreachable coordinator is waited for.
    pub fn new(address: &str, token: Option<&str>, worker: String, patience: Duration) -> Result<Self, ClientError> {
        let wrong = |_| ClientError::Address(address.to_owned());
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(wrong)?;
        if !matches!(endpoint.uri().scheme_str(), Some("http" | "https")) {
            return Err(ClientError::Address(address.to_owned()));
        }
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_while_idle(true);
        let token = token
            .map(|t| MetadataValue::try_from(format!("Bearer {t}")))
            .transpose()
            .map_err(|_| ClientError::Token)?;
        let inner = CoordinatorClient::with_interceptor(endpoint.connect_lazy(), Bearer(token))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { inner, address: address.to_owned(), worker, patience })
    }

    /// Calls until answered, with growing pauses while the coordinator can't be reached.
    async fn call<T, F>(
        &self,
        call: impl Fn(CoordinatorClient<InterceptedService<Channel, Bearer>>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut silent_since: Option<tokio::time::Instant> = None;
        let mut pause = Duration::from_millis(100);
        loop {
            let status = match call(self.inner.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let reason = status.message().to_owned();
            match status.code() {
                Code::NotFound => return Err(CallError::Rejoin),
                Code::InvalidArgument => return Err(CallError::Rejected(reason)),
                Code::FailedPrecondition | Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => {
                    return Err(CallError::Fatal(ClientError::Refused { address: self.address.clone(), reason }));
                }
                _ => {}
            }
            let since = *silent_since.get_or_insert_with(tokio::time::Instant::now);
            if since.elapsed() >= self.patience {
                let (address, seconds) = (self.address.clone(), since.elapsed().as_secs());
                return Err(CallError::Fatal(ClientError::Unreachable { address, seconds, reason }));
            }
            tracing::debug!(code = ?status.code(), reason, "no answer from the coordinator, trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Introduces the worker, with the blocks it has in hand, and gets the job.
    pub async fn join(&self, host: &str, device: &str, held: Vec<v1::HeldBlock>) -> Result<v1::JoinReply, CallError> {
        let request = v1::JoinRequest {
            protocol: PROTOCOL,
            worker: self.worker.clone(),
            host: host.to_owned(),
            device: device.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            held,
        };
        self.call(|mut c| {
            let request = request.clone();
            async move { c.join(request).await }
        })
        .await
    }

    /// Asks for a block, telling which leases are held already.
    pub async fn lease(
        &self,
        evaluations_per_second: f64,
        held: Vec<v1::HeldLease>,
    ) -> Result<v1::LeaseReply, CallError> {
        let worker = self.worker.clone();
        let request = v1::LeaseRequest { worker, evaluations_per_second, wait_ms: 10_000, held };
        self.call(|mut c| {
            let request = request.clone();
            async move { c.lease(request).await }
        })
        .await
    }

    /// Delivers results; answered when they are durable.
    pub async fn report(&self, request: &v1::ReportRequest) -> Result<v1::ReportReply, CallError> {
        let sent = AtomicBool::new(request.again);
        self.call(|mut c| {
            let request = v1::ReportRequest { again: sent.swap(true, Ordering::Relaxed), ..request.clone() };
            async move { c.report(request).await }
        })
        .await
    }

    /// Says that the worker is alive, and what it is at.
    pub async fn heartbeat(&self, sign: v1::HeartbeatRequest) -> Result<v1::HeartbeatReply, CallError> {
        let request = v1::HeartbeatRequest { worker: self.worker.clone(), ..sign };
        self.call(|mut c| {
            let request = request.clone();
            async move { c.heartbeat(request).await }
        })
        .await
    }

    /// Hands a lease back; with an error if it failed.
    pub async fn release(&self, key: LeaseKey, error: &str) -> Result<v1::ReleaseReply, CallError> {
        let request = v1::ReleaseRequest {
            worker: self.worker.clone(),
            epoch: key.epoch.0,
            leases: vec![key.lease.0],
            error: error.to_owned(),
            ..v1::ReleaseRequest::default()
        };
        self.call(|mut c| {
            let request = request.clone();
            async move { c.release(request).await }
        })
        .await
    }

    /// Leaves for good, in one attempt: a coordinator that is gone needs no goodbye. The `reason` is empty where the worker
    /// was asked to, or the job is done.
    pub async fn leave(&self, reason: &str) {
        let (worker, reason) = (self.worker.clone(), reason.to_owned());
        let request = v1::ReleaseRequest { worker, leaving: true, reason, ..v1::ReleaseRequest::default() };
        let goodbye = self.inner.clone().release(request).await.map(drop);
        if let Err(status) = goodbye {
            tracing::debug!(reason = status.message(), "left without a goodbye");
        }
    }
}
