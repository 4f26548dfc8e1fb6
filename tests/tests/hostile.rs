//! Hostile input at a coordinator's port: noise, half-open connections, malformed and oversized messages, and well-formed but
//! false messages from a client with the token. All of it is refused and logged, and the job ends with the same bytes.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't be set up must fail")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use elbo_proto::v1;
use elbo_proto::v1::coordinator_client::CoordinatorClient;
use elbo_tests::patience::seconds;
use elbo_tests::service::{Service, TOKEN};
use elbo_tests::{Process, elbo, json};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// More than the coordinator accepts.
const OVERSIZED: usize = elbo_proto::MAX_MESSAGE_BYTES + 1;

/// Raw bytes in place of messages.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(to, &bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; bytes::Buf::remaining(from)];
        bytes::Buf::copy_to_slice(from, &mut bytes);
        Ok(Some(bytes))
    }
}

/// A client that can connect, with or without a token.
struct Caller {
    channel: Channel,
    token: Option<&'static str>,
}

impl Caller {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = self.token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        request
    }

    fn client(&self) -> CoordinatorClient<Channel> {
        CoordinatorClient::new(self.channel.clone()).max_encoding_message_size(2 * OVERSIZED)
    }

    async fn join(&self, worker: &str) -> Result<Response<v1::JoinReply>, Status> {
        let protocol = elbo_proto::PROTOCOL;
        let join = v1::JoinRequest { protocol, worker: worker.into(), ..v1::JoinRequest::default() };
        self.client().join(self.request(join)).await
    }

    async fn lease(&self, worker: &str, rate: f64) -> v1::Block {
        let lease = v1::LeaseRequest {
            worker: worker.into(),
            evaluations_per_second: rate,
            wait_ms: 10_000,
            ..v1::LeaseRequest::default()
        };
        match self.client().lease(self.request(lease)).await.unwrap().into_inner().outcome {
            Some(v1::lease_reply::Outcome::Block(block)) => block,
            other => panic!("no block but {other:?}"),
        }
    }

    async fn report(&self, report: v1::ReportRequest) -> Result<Response<v1::ReportReply>, Status> {
        self.client().report(self.request(report)).await
    }

    async fn release(&self, worker: &str, block: &v1::Block, error: &str) {
        let release = v1::ReleaseRequest {
            worker: worker.into(),
            epoch: block.epoch,
            leases: vec![block.lease],
            error: error.into(),
            ..v1::ReleaseRequest::default()
        };
        self.client().release(self.request(release)).await.unwrap();
    }

    /// Sends bytes as a message of a method.
    async fn raw(&self, method: &'static str, bytes: Vec<u8>) -> Result<Response<Vec<u8>>, Status> {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone()).max_encoding_message_size(2 * OVERSIZED);
        grpc.ready().await.map_err(|e| Status::unknown(e.to_string()))?;
        grpc.unary(self.request(bytes), format!("/elbo.v1.Coordinator/{method}").parse().unwrap(), Raw).await
    }
}

/// A report that a worker could send for a block's first unit, with plausible sums.
fn report(worker: &str, block: &v1::Block) -> v1::ReportRequest {
    let unit = &block.units[0];
    let (slots, prompts) = (unit.slot_end - unit.slot_begin, unit.prompts.len());
    let result = v1::UnitResult {
        id: unit.id,
        prompts: unit.prompts.clone(),
        slots,
        sum: vec![f64::from(slots); prompts],
        sum_sq: vec![f64::from(slots); prompts],
        errors: Vec::new(),
    };
    let (worker, epoch, lease) = (worker.into(), block.epoch, block.lease);
    v1::ReportRequest { worker, epoch, lease, results: vec![result], ..v1::ReportRequest::default() }
}

/// Pseudorandom bytes, the same in every run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Sends bytes to a port and reads for a moment.
fn send(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    // The server may hang up in the middle.
    let _ = stream.write_all(bytes);
    let mut answer = vec![0; 1024];
    let length = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(length);
    answer
}

/// Noise, other protocols, and messages that never end.
fn pester(address: &str) {
    for seed in 0..40 {
        send(address, &noise(seed, 1 << (seed % 17)));
    }
    let http1 = send(address, b"GET /metrics HTTP/1.1\r\nHost: elbo\r\n\r\n");
    assert!(!http1.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&http1));
    send(address, b"POST /elbo.v1.Coordinator/Status HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n");
    // The start of a TLS handshake, and an HTTP/2 connection with invalid frames.
    send(address, &[&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &noise(1, 60)].concat());
    for seed in 0..20 {
        send(address, &[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(), noise(seed, 500)].concat());
    }
    // A frame that claims 16 MB, and headers that never end.
    send(address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x01\x04\0\0\0\x01");
    let continued = [&[0, 64, 0, 9, 0, 0, 0, 0, 1][..], &noise(3, 16_384)].concat();
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\0\x01\0\0\0\0\x01";
    send(address, &[&greeting[..], &continued.repeat(64)].concat());
}

async fn connect(service: &Service, token: Option<&'static str>) -> Caller {
    let channel = Channel::from_shared(format!("http://{}", service.address)).unwrap().connect().await.unwrap();
    Caller { channel, token }
}

/// Calls without the token or with a wrong one are refused.
async fn strangers(service: &Service) {
    for token in [None, Some("guessed"), Some("a-secret-0f93x")] {
        let stranger = connect(service, token).await;
        assert_eq!(stranger.join("stranger").await.unwrap_err().code(), Code::Unauthenticated);
        let status = stranger.client().status(stranger.request(v1::StatusRequest {})).await;
        assert_eq!(status.unwrap_err().code(), Code::Unauthenticated);
        let raw = stranger.raw("Report", noise(7, 100_000)).await;
        assert_eq!(raw.unwrap_err().code(), Code::Unauthenticated);
    }
}

/// Invalid messages, and messages that are too large.
async fn malformed(caller: &Caller) {
    for method in ["Join", "Lease", "Report", "Heartbeat", "Release"] {
        for seed in 1..20 {
            // Most noise is not a valid message; if it is, it names no worker that has joined.
            assert!(caller.raw(method, noise(seed, 300)).await.is_err(), "{method} {seed}");
        }
        // A length beyond the end of the message, and a group that is never closed.
        assert!(caller.raw(method, vec![0x0a, 0xff, 0xff, 0xff, 0x7f]).await.is_err());
        assert!(caller.raw(method, vec![0x0b; 5_000]).await.is_err());
        let oversized = caller.raw(method, vec![0; OVERSIZED]).await.unwrap_err();
        assert!(matches!(oversized.code(), Code::OutOfRange | Code::ResourceExhausted), "{oversized}");
    }
    assert_eq!(caller.raw("Nothing", Vec::new()).await.unwrap_err().code(), Code::Unimplemented);
    for name in ["", "two\nlines", "\u{1b}[2Jcleared", &"x".repeat(4 << 20)] {
        assert_eq!(caller.join(name).await.unwrap_err().code(), Code::InvalidArgument);
    }
}

/// Well-formed reports of units that were not leased, or with impossible values.
async fn lies(caller: &Caller, block: &v1::Block) {
    let good = report("mallory", block);
    type Change = fn(&mut v1::ReportRequest);
    let changes: [(&str, Change); 20] = [
        ("a lease never granted", |r| r.lease += 1_000),
        ("the largest lease", |r| r.lease = u64::MAX),
        ("an epoch that never was", |r| r.epoch = 0),
        ("a sum that is not a number", |r| r.results[0].sum[0] = f64::NAN),
        ("a negative sum", |r| r.results[0].sum[0] = -1.0),
        ("an infinite sum", |r| r.results[0].sum[0] = f64::INFINITY),
        ("squares that are not a number", |r| r.results[0].sum_sq[0] = f64::NAN),
        ("squares too small for the sum", |r| r.results[0].sum_sq[0] = 0.0),
        ("too few sums", |r| r.results[0].sum.truncate(1)),
        ("too many squares", |r| r.results[0].sum_sq.push(1.0)),
        ("other slots", |r| r.results[0].slots += 1),
        ("other prompts", |r| r.results[0].prompts[0] += 1),
        ("a million prompts", |r| r.results[0].prompts = vec![0; 1 << 20]),
        ("single errors nobody asked for", |r| r.results[0].errors = vec![f32::NAN; 80]),
        ("no unit", |r| r.results[0].id = None),
        ("a sample beyond the last", |r| r.results[0].id.as_mut().unwrap().sample = u64::MAX),
        ("a round beyond the last", |r| r.results[0].id.as_mut().unwrap().round = 60_000),
        ("a round that is none", |r| r.results[0].id.as_mut().unwrap().round = u32::MAX),
        ("a failure of no sample", |r| {
            let (stage, error) = ("decode".into(), "broken".into());
            r.failures.push(v1::SampleFailure { sample: 1 << 40, stage, error });
        }),
        ("a failure at no stage", |r| {
            let (stage, error) = ("<script>".into(), "broken".into());
            r.failures.push(v1::SampleFailure { sample: 0, stage, error });
        }),
    ];
    for (what, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = caller.report(bad).await.map(|_| ()).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused}");
    }
    // A later coordinator may have granted the lease: this one accepts nothing, and the worker should look for the later one.
    for epoch in [good.epoch + 1, u64::MAX] {
        let later = v1::ReportRequest { epoch, ..good.clone() };
        assert_eq!(caller.report(later).await.unwrap_err().code(), Code::Unavailable);
    }
    let many = v1::ReportRequest { results: vec![v1::UnitResult::default(); 1 << 20], ..good.clone() };
    assert_eq!(caller.report(many).await.unwrap_err().code(), Code::InvalidArgument);
    let unknown = v1::ReportRequest { worker: "eve".into(), ..good };
    assert_eq!(caller.report(unknown).await.unwrap_err().code(), Code::NotFound);
    for (unreported, expected) in [(u64::MAX, Code::Ok), (0, Code::Ok)] {
        let beat = v1::HeartbeatRequest {
            worker: "mallory".into(),
            unreported_evaluations: unreported,
            ..v1::HeartbeatRequest::default()
        };
        let code = caller.client().heartbeat(caller.request(beat)).await.map_or_else(|e| e.code(), |_| Code::Ok);
        assert_eq!(code, expected);
    }
}

/// Well-formed reports of units leased to another worker, and of units leased to no worker.
async fn forgeries(caller: &Caller, own: &v1::Block, alices: &v1::Block) {
    let refused = |report| async move {
        let refused = caller.report(report).await.map(|_| ()).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        refused.message().to_owned()
    };
    let forged = report("mallory", alices);
    assert!(refused(forged.clone()).await.contains("granted to another worker"));
    let under_own = v1::ReportRequest { lease: own.lease, ..forged.clone() };
    assert!(refused(under_own.clone()).await.contains("does not include"));
    let failure = v1::SampleFailure { sample: alices.samples[0].id, stage: "decode".into(), error: "broken".into() };
    let own_samples: Vec<_> = own.samples.iter().map(|sample| sample.id).collect();
    assert!(!own_samples.contains(&failure.sample), "the failure must be of another worker's sample");
    for lie in [&forged, &under_own] {
        let (results, failures) = (Vec::new(), vec![failure.clone()]);
        refused(v1::ReportRequest { results, failures, ..lie.clone() }).await;
    }
    // Claiming the lease when joining does not help.
    let held = vec![v1::HeldBlock {
        epoch: alices.epoch,
        lease: alices.lease,
        units: alices.units.iter().filter_map(|unit| unit.id).collect(),
    }];
    let (protocol, worker) = (elbo_proto::PROTOCOL, "mallory".into());
    let join = v1::JoinRequest { protocol, worker, held, ..v1::JoinRequest::default() };
    caller.client().join(caller.request(join)).await.unwrap();
    assert!(refused(forged).await.contains("granted to another worker"));
}

fn leases(status: &serde_json::Value, worker: &str) -> u64 {
    let workers = status["workers"].as_array().unwrap();
    workers.iter().find(|w| w["worker"] == worker).map_or(0, |w| w["leases"].as_u64().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_input_is_refused_and_the_job_ends_with_the_same_bytes() {
    // The test holds a thousand connections below.
    rlimit::increase_nofile_limit(4096).unwrap();
    let service = Service::new(4);
    let mut coordinator = service.coordinator(&[]);
    let url = format!("http://{}", service.address);
    let status = || json(elbo().args(["status", "--json", &url]).env("ELBO_TOKEN", TOKEN));

    pester(&service.address);
    strangers(&service).await;
    let mallory = connect(&service, Some(TOKEN)).await;
    malformed(&mallory).await;
    let alice = connect(&service, Some(TOKEN)).await;
    alice.join("alice").await.unwrap();
    mallory.join("mallory").await.unwrap();
    let held = alice.lease("alice", 100.0).await;
    let block = mallory.lease("mallory", f64::NAN).await;
    lies(&mallory, &block).await;
    forgeries(&mallory, &block, &held).await;
    assert_eq!(status()["evaluations"], 0);

    // Mallory can neither hand back nor blame alice's lease.
    for _ in 0..3 {
        mallory.release("mallory", &held, "").await;
        mallory.release("mallory", &held, "poisoned").await;
    }
    let now = status();
    assert_eq!((leases(&now, "alice"), leases(&now, "mallory")), (1, 1), "{now}");
    assert_eq!(now["samples_quarantined"], 0, "{now}");
    mallory.release("mallory", &block, "").await;
    alice.release("alice", &held, "").await;
    assert_eq!(leases(&status(), "alice"), 0);

    // A thousand clients that connect and send nothing, or half a message, don't stop the workers, and are disconnected.
    let mut idle: Vec<_> = (0..1_000).map(|_| TcpStream::connect(&service.address).unwrap()).collect();
    for (n, stream) in idle.iter_mut().enumerate() {
        stream.write_all(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..n % 24]).unwrap();
    }
    let since = Instant::now();
    let mut worker = Process::start(&mut service.worker(&url));
    idle[7].set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut rest = Vec::new();
    // The server closed or reset the connection; the read did not time out here.
    let cut = idle[7].read_to_end(&mut rest);
    assert!(cut.is_ok() || cut.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
    assert!(since.elapsed() < seconds(25), "{:?}", since.elapsed());
    drop((alice, mallory));
    assert_eq!(coordinator.wait(), Some(0), "{}", service.log());
    assert_eq!(worker.wait(), Some(0));
    service.check_results();

    let log = service.log();
    for told in ["report refused", "does not hold", "call refused: a token is needed", "the token is wrong"] {
        assert!(log.contains(told), "'{told}' is not logged: {log}");
    }
    assert!(log.contains("the worker's name holds control characters") && !log.contains('\u{1b}'), "{log}");
    assert!(!log.contains("panicked") && !log.contains(TOKEN), "{log}");
}
