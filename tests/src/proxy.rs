//! A proxy in front of an S3 server that injects faults of networks and busy servers, from a seed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A fault of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// `503 SlowDown`; the server never sees the request.
    SlowDown,
    /// `500 InternalError`; the server never sees the request.
    Internal,
    /// The connection is closed without an answer; the server never sees the request.
    Refused,
    /// The server answers, but the connection closes and the answer is lost.
    LostReply,
    /// The server does what was asked, but the answer is `500`.
    Lied,
    /// The answer breaks off in the middle of its body.
    CutOff,
    /// The answer is late.
    Delay,
}

const FAULTS: [Fault; 7] =
    [Fault::SlowDown, Fault::Internal, Fault::Refused, Fault::LostReply, Fault::Lied, Fault::CutOff, Fault::Delay];

/// A running proxy; it stops when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Its own URL.
    pub endpoint: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    seed: u64,
    percent: u64,
    requests: AtomicU64,
    stopped: AtomicBool,
    injected: Mutex<Vec<Fault>>,
    held: Mutex<Held>,
    changed: Condvar,
    /// From this request number on, every request gets this status and code.
    refusal: Mutex<Option<(u64, &'static str, &'static str)>>,
}

/// The state of a put that the proxy delays.
#[derive(Debug, Default)]
enum Held {
    /// No put is to be delayed.
    #[default]
    Nothing,
    /// Delay the next put whose path and header match.
    Wanted(&'static str, &'static str),
    /// The put has arrived and waits.
    Waiting,
    /// The put may go on.
    Released,
    /// The server has answered it.
    Answered(String),
}

impl Proxy {
    /// Starts a proxy that injects faults into `percent` of the requests to `upstream`, an `http://` endpoint.
    pub fn start(upstream: &str, seed: u64, percent: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            upstream: upstream.trim_start_matches("http://").to_owned(),
            seed,
            percent,
            requests: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            injected: Mutex::new(Vec::new()),
            held: Mutex::default(),
            changed: Condvar::new(),
            refusal: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&serving);
                // It is no error here if either end hangs up.
                std::thread::spawn(move || drop(stream.and_then(|stream| shared.pass(stream))));
            }
        });
        Self { endpoint, shared, thread: Some(thread) }
    }

    /// Refuses every request after this many more, like a store once the caller's credentials have expired.
    pub fn refuse_after(&self, requests: u64, status: &'static str, code: &'static str) {
        let from = self.shared.requests.load(Ordering::Relaxed) + requests;
        *self.shared.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some((from, status, code));
    }

    /// Passes requests on again.
    pub fn accept(&self) {
        *self.shared.refusal.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The faults injected so far.
    pub fn injected(&self) -> Vec<Fault> {
        self.shared.injected.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Proxy {
    /// Delays the next put whose path ends with `path` and that has a header starting with `header`, until it is released.
    pub fn hold(&self, path: &'static str, header: &'static str) {
        *self.shared.held() = Held::Wanted(path, header);
    }

    /// Whether a put is being delayed.
    pub fn is_holding(&self) -> bool {
        matches!(*self.shared.held(), Held::Waiting)
    }

    /// Lets the put go on, even if its client is gone; returns the first line of the server's answer.
    pub fn release(&self) -> String {
        let mut held = self.shared.held();
        *held = Held::Released;
        self.shared.changed.notify_all();
        loop {
            held = self.shared.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
            if let Held::Answered(answer) = &*held {
                return answer.clone();
            }
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A well-mixed number from a seed and a position (SplitMix64).
pub(crate) fn mixed(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Shared {
    fn fault(&self) -> Option<Fault> {
        let roll = mixed(self.seed, self.requests.fetch_add(1, Ordering::Relaxed));
        let fault = (roll % 100 < self.percent).then(|| FAULTS[(roll / 100) as usize % FAULTS.len()])?;
        self.injected.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
        Some(fault)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while a request is delayed; returns whether it was.
    fn wait(&self, request: &[u8]) -> bool {
        let mut held = self.held();
        let Held::Wanted(path, header) = *held else { return false };
        let head = String::from_utf8_lossy(request).into_owned();
        let is_wanted = |line: &str| line.to_ascii_lowercase().starts_with(header);
        let mut lines = head.lines();
        let is_put = lines.next().is_some_and(|line| line.starts_with("PUT ") && line.contains(path));
        if !is_put || !lines.take_while(|line| !line.is_empty()).any(is_wanted) {
            return false;
        }
        *held = Held::Waiting;
        while !matches!(*held, Held::Released) {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Passes one request on; each connection serves one request.
    fn pass(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some(request) = read_request(&client)? else { return Ok(()) };
        let refusal = *self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, status, code)) = refusal
            && self.requests.load(Ordering::Relaxed) >= from
        {
            return fail(&mut client, status, code);
        }
        let was_held = self.wait(&request);
        let fault = self.fault();
        match fault {
            Some(Fault::SlowDown) => return fail(&mut client, "503 Slow Down", "SlowDown"),
            Some(Fault::Internal) => return fail(&mut client, "500 Internal Server Error", "InternalError"),
            Some(Fault::Refused) => return Ok(()),
            _ => {}
        }
        let mut server = TcpStream::connect(&self.upstream)?;
        server.write_all(&request)?;
        let mut answer = Vec::new();
        server.read_to_end(&mut answer)?;
        if was_held {
            let line = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
            *self.held() = Held::Answered(line);
            self.changed.notify_all();
        }
        match fault {
            Some(Fault::LostReply) => Ok(()),
            Some(Fault::Lied) => fail(&mut client, "500 Internal Server Error", "InternalError"),
            Some(Fault::CutOff) => {
                let body = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |at| at + 4);
                client.write_all(&answer[..body + (answer.len() - body) / 2])
            }
            Some(Fault::Delay) => {
                std::thread::sleep(Duration::from_millis(300));
                client.write_all(&answer)
            }
            _ => client.write_all(&answer),
        }
    }
}

fn fail(client: &mut TcpStream, status: &str, code: &str) -> std::io::Result<()> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>");
    let length = body.len();
    write!(client, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// Reads a whole request and asks to close the connection after the answer; `None` if the client sent no request.
fn read_request(stream: &TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut reader = BufReader::new(stream);
    let (mut request, mut length) = (Vec::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        match &*line {
            "\r\n" => break,
            _ if lower.starts_with("connection:") => {}
            _ => request.extend_from_slice(line.as_bytes()),
        }
    }
    request.extend_from_slice(b"Connection: close\r\n\r\n");
    let head = request.len();
    request.resize(head + length, 0);
    reader.read_exact(&mut request[head..])?;
    Ok(Some(request))
}
