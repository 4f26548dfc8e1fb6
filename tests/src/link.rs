//! A network link between processes that can be cut, frozen and redirected, to imitate network faults.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a link does with the bytes it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Passes them on.
    Up = 0,
    /// Breaks connections and refuses new ones.
    Cut = 1,
    /// Keeps connections but passes nothing on; neither end notices.
    Frozen = 2,
}

#[derive(Debug)]
struct Shared {
    state: AtomicU8,
    stopped: AtomicBool,
    target: Mutex<String>,
}

impl Shared {
    fn is(&self, state: State) -> bool {
        self.state.load(Ordering::Relaxed) == state as u8
    }
}

/// A running link; it stops when dropped.
#[derive(Debug)]
pub struct Link {
    /// The address where it accepts connections.
    pub address: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How often a link checks what it should do.
const MOMENT: Duration = Duration::from_millis(20);

impl Link {
    /// Starts a link to an address.
    pub fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let shared = Arc::new(Shared {
            state: AtomicU8::new(State::Up as u8),
            stopped: AtomicBool::new(false),
            target: Mutex::new(target.to_owned()),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for client in listener.incoming() {
                if serving.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let target = serving.target.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let (Ok(client), false) = (client, serving.is(State::Cut))
                    && let Ok(server) = TcpStream::connect(target)
                {
                    join(&serving, client, server);
                }
            }
        });
        Self { address, shared, thread: Some(thread) }
    }

    /// Changes what the link does.
    pub fn set(&self, state: State) {
        self.shared.state.store(state as u8, Ordering::Relaxed);
    }

    /// Sends new connections to another address.
    pub fn turn_to(&self, target: &str) {
        target.clone_into(&mut self.shared.target.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Passes bytes both ways until either end, or the link, hangs up.
fn join(shared: &Arc<Shared>, client: TcpStream, server: TcpStream) {
    let (Ok(from_client), Ok(from_server)) = (client.try_clone(), server.try_clone()) else { return };
    for (from, to) in [(from_client, server), (from_server, client)] {
        let shared = Arc::clone(shared);
        std::thread::spawn(move || pass(&shared, from, to));
    }
}

fn pass(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let _ = from.set_read_timeout(Some(MOMENT));
    let mut buffer = vec![0; 1 << 16];
    while !shared.stopped.load(Ordering::Relaxed) && !shared.is(State::Cut) {
        if shared.is(State::Frozen) {
            std::thread::sleep(MOMENT);
            continue;
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) if to.write_all(&buffer[..count]).is_err() => break,
            Err(error) if !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                break;
            }
            Ok(_) | Err(_) => {}
        }
    }
    // It is no error here if either end hangs up.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
