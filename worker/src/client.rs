//! The connection to the coordinator. Every call is retried until it is answered or patience runs out.

use std::error::Error;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use elbo_core::causes::with_causes;
use elbo_core::ids::LeaseKey;
use elbo_net::{ClientTls, TlsError, TlsProblem, tls};
use elbo_proto::v1::coordinator_client::CoordinatorClient;
use elbo_proto::{MAX_MESSAGE_BYTES, PROTOCOL, check_size, shortened, v1};
use elbo_store::retry;
use tokio::sync::Notify;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::call_error::{CallError, ClientError};
use crate::metrics::metrics;

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

/// The first pause between two attempts at a call.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// How long a leaving worker waits for an answer.
pub(crate) const GOODBYE: Duration = Duration::from_secs(2);

/// A coordinator's stub, which sends the token.
type Stub = CoordinatorClient<InterceptedService<Channel, Bearer>>;

/// How to connect to a coordinator.
#[derive(Clone, Debug)]
struct Line {
    /// The endpoint without TLS.
    endpoint: Endpoint,
    tls: Option<ClientTls>,
    token: Bearer,
}

impl Line {
    /// A stub that connects when first used, with the current TLS files; and their generation.
    fn connect(&self) -> Result<(Stub, u64), TlsError> {
        let mut endpoint = self.endpoint.clone();
        let mut generation = 0;
        if let Some(tls) = &self.tls {
            let (config, current) = tls.config();
            let setup = |e: tonic::transport::Error| TlsError::Setup(with_causes(&e));
            endpoint = endpoint.tls_config(config).map_err(setup)?;
            generation = current;
        }
        let stub = CoordinatorClient::with_interceptor(endpoint.connect_lazy(), self.token.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok((stub, generation))
    }
}

/// A worker's client for a coordinator.
#[derive(Clone, Debug)]
pub struct Client {
    /// The stub, and the generation of its TLS files.
    stub: Arc<Mutex<(Stub, u64)>>,
    line: Arc<Line>,
    address: String,
    /// Host and port.
    peer: Arc<(String, u16)>,
    /// Whether the coordinator has answered a call, so that address and TLS are right.
    answered: Arc<AtomicBool>,
    /// The worker's name, unique for its process.
    pub worker: String,
    /// The process name shared by all its engines, if it has several.
    process: String,
    /// What computes: a CPU's instruction set or a GPU's name.
    hardware: String,
    /// The job it has joined.
    job: Arc<OnceLock<String>>,
    /// Signals that the coordinator has let the worker join, so that calls that wait for it may go out.
    joined: Arc<Notify>,
    patience: Duration,
}

impl Client {
    /// A client that connects when first used. `patience` is how long to wait for an unreachable coordinator. With
    /// `https://`, it uses `tls`, or the system's trusted certificates if that is absent.
    pub fn new(
        address: &str,
        token: Option<&str>,
        tls: Option<&ClientTls>,
        worker: String,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let wrong = |_| ClientError::Address(address.to_owned());
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(wrong)?;
        let uri = endpoint.uri().clone();
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => Some(tls.cloned().map_or_else(|| ClientTls::read(None, None), Ok)?),
            _ => return Err(ClientError::Address(address.to_owned())),
        };
        let host = uri.host().ok_or_else(|| ClientError::Address(address.to_owned()))?.to_owned();
        let port = uri.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_while_idle(true);
        if token.is_some() && tls.is_none() && !is_this_machine(&host) {
            tracing::warn!(
                coordinator = address,
                "the token is sent over the network unencrypted: anyone who can listen there can use it; give the coordinator --tls-cert and --tls-key, and use https://"
            );
        }
        let token = token.map(|t| MetadataValue::try_from(format!("Bearer {t}")));
        let mut token = token.transpose().map_err(|_| ClientError::Token)?;
        if let Some(token) = &mut token {
            // This hides it where headers are shown.
            token.set_sensitive(true);
        }
        let line = Line { endpoint, tls, token: Bearer(token) };
        let stub = Arc::new(Mutex::new(line.connect()?));
        let (line, peer, answered) = (Arc::new(line), Arc::new((host, port)), Arc::default());
        let (address, process, hardware) = (address.to_owned(), String::new(), String::new());
        Ok(Self {
            stub,
            line,
            address,
            peer,
            answered,
            worker,
            process,
            hardware,
            job: Arc::default(),
            joined: Arc::default(),
            patience,
        })
    }

    fn stub(&self) -> Stub {
        self.stub.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// A client for one of several engines of a process.
    pub fn of_process(self, process: &str) -> Self {
        Self { process: process.to_owned(), ..self }
    }

    /// A client for an engine that computes with this.
    pub fn with_hardware(self, hardware: &str) -> Self {
        Self { hardware: hardware.to_owned(), ..self }
    }

    /// After an unanswered call: if the TLS files have changed, makes a new connection for the next call. A connection that
    /// works is left alone, however old its certificates.
    fn renew(&self) {
        let Some(tls) = &self.line.tls else { return };
        let (_, generation) = tls.config();
        let mut stub = self.stub.lock().unwrap_or_else(PoisonError::into_inner);
        if stub.1 != generation {
            match self.line.connect() {
                Ok(renewed) => *stub = renewed,
                Err(error) => tracing::debug!(%error, "the renewed TLS files can't be used"),
            }
        }
    }

    /// Repeats a call until it is answered, with growing pauses while the coordinator can't be reached. A pause ends early
    /// when the worker joins a coordinator again.
    async fn call<T, F>(&self, call: impl Fn(Stub) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut silent_since: Option<tokio::time::Instant> = None;
        let mut pauses = retry::pauses(FIRST_PAUSE);
        loop {
            let status = match call(self.stub()).await {
                Ok(response) => {
                    self.answered.store(true, Ordering::Relaxed);
                    return Ok(response.into_inner());
                }
                Err(status) => status,
            };
            let mut reason = status.message().to_owned();
            if let Some(cause) = status.source().map(with_causes).filter(|cause| !reason.contains(cause)) {
                reason = format!("{reason}: {cause}");
            }
            match status.code() {
                Code::NotFound => {
                    metrics().left(&self.worker);
                    return Err(CallError::Rejoin);
                }
                // It would be just as large the next time.
                Code::OutOfRange => {
                    let address = self.address.clone();
                    return Err(CallError::Fatal(ClientError::Oversized { address, reason }));
                }
                Code::InvalidArgument => return Err(CallError::Rejected(status.message().to_owned())),
                Code::FailedPrecondition | Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => {
                    let (address, reason) = (self.address.clone(), status.message().to_owned());
                    return Err(CallError::Fatal(ClientError::Refused { address, reason }));
                }
                _ => {}
            }
            self.renew();
            // A coordinator that has answered before has matching TLS settings: it is only away.
            if silent_since.is_none() && !self.answered.load(Ordering::Relaxed) {
                let (host, port) = &*self.peer;
                match tls::diagnose(host, *port, self.line.tls.as_ref()).await {
                    Some(TlsProblem::Other(problem)) => reason = problem,
                    Some(problem) => {
                        let address = self.address.clone();
                        return Err(CallError::Fatal(ClientError::Tls { address, problem }));
                    }
                    None => {}
                }
            }
            let since = *silent_since.get_or_insert_with(tokio::time::Instant::now);
            if since.elapsed() >= self.patience {
                let (address, seconds) = (self.address.clone(), since.elapsed().as_secs());
                return Err(CallError::Fatal(ClientError::Unreachable { address, seconds, reason }));
            }
            metrics().retries.inc();
            tracing::debug!(code = ?status.code(), reason, "no answer from the coordinator, trying again");
            tokio::select! {
                () = tokio::time::sleep(pauses.next().unwrap_or_default()) => {}
                () = self.joined.notified() => pauses = retry::pauses(FIRST_PAUSE),
            }
        }
    }

    /// The progress of the job.
    pub async fn status(&self) -> Result<v1::StatusReply, CallError> {
        self.call(|mut c| async move { c.status(v1::StatusRequest {}).await }).await
    }

    /// The job it has joined; empty if none yet.
    fn job(&self) -> String {
        self.job.get().cloned().unwrap_or_default()
    }

    /// Joins, with the blocks that the worker has in hand, and learns the job, which must be the same every time.
    pub async fn join(&self, host: &str, device: &str, held: Vec<v1::HeldBlock>) -> Result<v1::JoinReply, CallError> {
        let request = v1::JoinRequest {
            protocol: PROTOCOL,
            worker: self.worker.clone(),
            host: host.to_owned(),
            device: device.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            held,
            job: self.job(),
            process: self.process.clone(),
            hardware: self.hardware.clone(),
        };
        check_size("the list of blocks in hand", &request)?;
        let joined = self
            .call(|mut c| {
                let request = request.clone();
                async move { c.join(request).await }
            })
            .await;
        if let Ok(reply) = &joined {
            if *self.job.get_or_init(|| reply.job.clone()) != reply.job {
                return Err(CallError::OtherJob);
            }
            tracing::Span::current().record("job", &reply.job);
            metrics().joined(&self.worker, &reply.job);
            self.joined.notify_waiters();
        }
        joined
    }

    /// The identity of the job it has joined, as JSON, fetched in parts.
    pub async fn describe(&self) -> Result<Vec<u8>, CallError> {
        let mut whole = Vec::new();
        loop {
            let request = v1::DescribeRequest { job: self.job(), offset: whole.len() as u64 };
            let reply = self
                .call(|mut c| {
                    let request = request.clone();
                    async move { c.describe(request).await }
                })
                .await?;
            if reply.job != request.job {
                return Err(CallError::OtherJob);
            }
            whole.extend_from_slice(&reply.part);
            if whole.len() as u64 >= reply.total || reply.part.is_empty() {
                return Ok(whole);
            }
        }
    }

    /// Asks for a block, and lists the leases that are held already.
    pub async fn lease(
        &self,
        evaluations_per_second: f64,
        held: Vec<v1::HeldLease>,
    ) -> Result<v1::LeaseReply, CallError> {
        let worker = self.worker.clone();
        let request = v1::LeaseRequest { worker, evaluations_per_second, wait_ms: 10_000, held, job: self.job() };
        check_size("the list of leases in hand", &request)?;
        metrics().asks_for_work();
        self.call(|mut c| {
            let request = request.clone();
            async move { c.lease(request).await }
        })
        .await
    }

    /// Delivers results; the answer comes when they are durable. Notes in the report whether it was sent without an answer.
    pub async fn report(&self, report: &mut v1::ReportRequest) -> Result<v1::ReportReply, CallError> {
        check_size("a report", &*report)?;
        let (before, attempts) = (report.again, AtomicU32::new(0));
        let answer = self
            .call(|mut c| {
                let again = before || attempts.fetch_add(1, Ordering::Relaxed) > 0;
                let request = v1::ReportRequest { again, job: self.job(), ..report.clone() };
                async move { c.report(request).await }
            })
            .await;
        // All attempts except the last went unanswered.
        report.again = before || attempts.into_inner() > 1;
        metrics().reported(report, &answer);
        answer
    }

    /// Sends a heartbeat: the worker is alive, and its activity.
    pub async fn heartbeat(&self, sign: v1::HeartbeatRequest) -> Result<v1::HeartbeatReply, CallError> {
        let request = v1::HeartbeatRequest { worker: self.worker.clone(), job: self.job(), ..sign };
        check_size("a heartbeat", &request)?;
        metrics().beats(&request);
        self.call(|mut c| {
            let request = request.clone();
            async move { c.heartbeat(request).await }
        })
        .await
    }

    /// Hands a lease back, with an error if it failed.
    pub async fn release(&self, key: LeaseKey, error: &str) -> Result<v1::ReleaseReply, CallError> {
        let request = v1::ReleaseRequest {
            worker: self.worker.clone(),
            epoch: key.epoch.0,
            leases: vec![key.lease.0],
            error: shortened(error.to_owned()),
            ..v1::ReleaseRequest::default()
        };
        self.call(|mut c| {
            let request = request.clone();
            async move { c.release(request).await }
        })
        .await
    }

    /// Leaves for good, in one short attempt: a coordinator that is gone needs no goodbye. The `reason` is empty if the
    /// worker was asked to leave, or the job is done.
    pub async fn leave(&self, reason: &str) {
        let (worker, reason) = (self.worker.clone(), shortened(reason.to_owned()));
        let request = v1::ReleaseRequest { worker, leaving: true, reason, ..v1::ReleaseRequest::default() };
        metrics().left(&self.worker);
        let mut client = self.stub();
        match tokio::time::timeout(GOODBYE, client.release(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => tracing::debug!(reason = status.message(), "left without a goodbye"),
            Err(_) => tracing::debug!("left without an answer to the goodbye"),
        }
    }
}

/// Whether a host is this machine, so that nothing sent to it leaves the machine.
fn is_this_machine(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.map_or_else(|_| host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_this_machine() {
        assert!(["127.0.0.1", "127.8.8.8", "[::1]", "localhost"].iter().all(|host| is_this_machine(host)));
        assert!(
            !["10.0.0.1", "[fe80::1]", "coordinator", "localhost.example"].iter().any(|host| is_this_machine(host))
        );
    }
}
