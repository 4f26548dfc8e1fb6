//! Accepts connections from untrusted clients: a limited number, and none that stay silent.
//!
//! A live gRPC client responds to the server's pings, so it sends bytes several times a minute. A client that sends nothing is
//! disconnected, whether during the TLS handshake, before its first request or after a thousand.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::rate_limited_log::RateLimitedLog;

/// Length of the preface of every HTTP/2 connection. A TLS handshake is longer.
const GREETING_BYTES: u64 = 24;

/// Limits on connections.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most open connections; further ones are closed at once.
    pub connections: usize,
    /// The time limit for the first bytes.
    pub greeting: Duration,
    /// The longest time without any data.
    pub silence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 8192, greeting: Duration::from_secs(10), silence: Duration::from_secs(60) }
    }
}

#[derive(Debug)]
struct Counts {
    places: Arc<Semaphore>,
    refused: AtomicU64,
}

/// A listener that enforces [`Limits`].
#[derive(Debug)]
pub struct LimitedListener {
    listener: TcpListener,
    limits: Limits,
    counts: Arc<Counts>,
    told: RateLimitedLog,
}

/// Counts the connections that a [`LimitedListener`] has accepted and refused.
#[derive(Clone, Debug)]
pub struct Door {
    limit: usize,
    counts: Arc<Counts>,
}

impl Door {
    /// The number of open connections.
    pub fn open(&self) -> u64 {
        (self.limit - self.counts.places.available_permits().min(self.limit)) as u64
    }

    /// The number of refused connections.
    pub fn refused(&self) -> u64 {
        self.counts.refused.load(Ordering::Relaxed)
    }
}

impl LimitedListener {
    /// Applies limits to a listener.
    pub fn new(listener: TcpListener, limits: Limits) -> Self {
        let places = Arc::new(Semaphore::new(limits.connections));
        Self {
            listener,
            limits,
            counts: Arc::new(Counts { places, refused: AtomicU64::new(0) }),
            told: RateLimitedLog::default(),
        }
    }

    /// The counter of its connections.
    pub fn door(&self) -> Door {
        Door { limit: self.limits.connections, counts: Arc::clone(&self.counts) }
    }

    /// The next connection within the limit.
    pub(crate) async fn next(&mut self) -> (Connection, SocketAddr) {
        loop {
            let (stream, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // The peer has already disconnected, or no file descriptor is free. The next one may succeed.
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&self.counts.places).try_acquire_owned() else {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
                if self.told.is_due() {
                    tracing::warn!(%peer, limit = self.limits.connections, "too many connections: turning new ones away");
                }
                continue;
            };
            // Sends small messages at once. If the option can't be set, they are only slower.
            let _ = stream.set_nodelay(true);
            return (Connection::new(stream, self.limits, place, peer), peer);
        }
    }

    /// The accepted connections, for a gRPC server.
    pub fn incoming(self) -> impl Stream<Item = io::Result<Connection>> {
        futures::stream::unfold(self, |mut door| async move {
            let (connection, _) = door.next().await;
            Some((Ok(connection), door))
        })
    }
}

impl axum::serve::Listener for LimitedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that closes when its peer is silent for too long.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    limits: Limits,
    opened: Instant,
    heard: Instant,
    received: u64,
    alarm: Pin<Box<Sleep>>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(stream: TcpStream, limits: Limits, place: OwnedSemaphorePermit, peer: SocketAddr) -> Self {
        let now = Instant::now();
        let alarm = Box::pin(tokio::time::sleep(limits.greeting));
        Self { stream, limits, opened: now, heard: now, received: 0, alarm, peer, _place: place }
    }

    /// When it closes if nothing more arrives.
    fn deadline(&self) -> Instant {
        let silence = self.heard + self.limits.silence;
        if self.received < GREETING_BYTES { silence.min(self.opened + self.limits.greeting) } else { silence }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(cx, buffer) {
            this.received += (buffer.filled().len() - before) as u64;
            this.heard = Instant::now();
            return Poll::Ready(read);
        }
        // The timer is moved only when it fires: most connections are read far more often than that.
        while this.alarm.as_mut().poll(cx).is_ready() {
            let deadline = this.deadline();
            if deadline <= Instant::now() {
                tracing::debug!(peer = %this.peer, received = this.received, "hanging up on a silent connection");
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            this.alarm.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn silent_connections_are_closed_and_make_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (greeting, silence) = (Duration::from_millis(200), Duration::from_millis(600));
        let keeper = LimitedListener::new(listener, Limits { connections: 1, greeting, silence });
        let door = keeper.door();
        let mut incoming = Box::pin(keeper.incoming());
        let _mute = TcpStream::connect(address).await.unwrap();
        let mut accepted = incoming.next().await.unwrap().unwrap();
        assert_eq!(door.open(), 1);
        let mut bytes = [0; 64];
        let cut = accepted.read(&mut bytes).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::TimedOut);
        drop(accepted);
        assert_eq!(door.open(), 0);
        // After the greeting, longer silence is allowed.
        let mut polite = TcpStream::connect(address).await.unwrap();
        let mut accepted = incoming.next().await.unwrap().unwrap();
        polite.write_all(&[1; 24]).await.unwrap();
        accepted.read_exact(&mut bytes[..24]).await.unwrap();
        let started = Instant::now();
        assert!(accepted.read(&mut bytes).await.is_err());
        assert!(started.elapsed() > Duration::from_millis(400));
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_are_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let keeper = LimitedListener::new(listener, Limits { connections: 1, ..Limits::default() });
        let door = keeper.door();
        let mut incoming = Box::pin(keeper.incoming());
        let _first = TcpStream::connect(address).await.unwrap();
        let held = incoming.next().await.unwrap().unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        let mut byte = [0; 1];
        tokio::select! {
            _ = incoming.next() => panic!("there was no place"),
            read = second.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_))),
        }
        assert_eq!((door.open(), door.refused()), (1, 1));
        drop(held);
    }
}
