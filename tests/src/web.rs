//! A web server for one test: the Hugging Face hub's two kinds of GET, and plain files.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::sorted;

/// The files of one revision of a repository, by path.
pub type Files = BTreeMap<String, Vec<u8>>;

/// What a server has, and the requests it got.
#[derive(Debug, Default)]
pub struct Site {
    /// Repositories as `owner/name`, with their revisions' commits and files.
    pub models: BTreeMap<String, BTreeMap<String, (String, Files)>>,
    /// The token that repositories below `private/` require.
    pub token: String,
    /// Files of repositories that are served with a wrong last byte.
    pub spoilt: Vec<String>,
    /// The first answer longer than this many bytes breaks off there.
    pub cut: Mutex<Option<usize>>,
    /// Paths that end with this are served at one byte a second.
    pub dribble: Mutex<Option<String>>,
    /// Paths that were requested, with the range if there was one.
    pub asked: Mutex<Vec<String>>,
}

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct Web {
    /// What it serves.
    pub site: Arc<Site>,
    /// Its URL.
    pub url: String,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Web {
    /// Serves the files below a directory, at [`Web::files`].
    pub fn serve(directory: &Path) -> Self {
        let mut files = Files::new();
        let mut pending = vec![directory.to_owned()];
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(sorted(&path));
            } else {
                let name = path.strip_prefix(directory).expect("below").to_string_lossy().into_owned();
                files.insert(name, std::fs::read(&path).expect("reading"));
            }
        }
        let revisions = [("main".to_owned(), ("commit".to_owned(), files))];
        Self::start(Site { models: [("plain/data".to_owned(), revisions.into())].into(), ..Site::default() })
    }

    /// The URL of the served directory.
    pub fn files(&self) -> String {
        format!("{}/plain/data", self.url)
    }

    /// Starts serving.
    pub fn start(site: Site) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (site, stopped) = (Arc::new(site), Arc::new(AtomicBool::new(false)));
        let (serving, ending) = (Arc::clone(&site), Arc::clone(&stopped));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ending.load(Ordering::Relaxed) {
                    return;
                }
                let site = Arc::clone(&serving);
                // It is no error here if a client disconnects.
                std::thread::spawn(move || drop(stream.and_then(|stream| site.answer(stream))));
            }
        });
        Self { site, url, stopped, thread: Some(thread) }
    }

    /// The requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.site.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A parsed request.
#[derive(Debug, Default)]
struct Request {
    method: String,
    path: String,
    from: usize,
    /// The position after the last requested byte.
    to: Option<usize>,
    token: String,
}

impl Site {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let request = read(&stream)?;
        let note =
            if request.from > 0 { format!("{} from {}", request.path, request.from) } else { request.path.clone() };
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(note);
        let ranged = request.from > 0 || request.to.is_some();
        let (status, body) = match self.find(&request) {
            // Only WebDAV servers can list.
            _ if !["get", "head"].contains(&request.method.as_str()) => (405, Vec::new()),
            Ok(body) => (if ranged { 206 } else { 200 }, body),
            Err(status) => (status, Vec::new()),
        };
        let (from, total) = (request.from.min(body.len()), body.len());
        let mut part = &body[from..request.to.unwrap_or(total).clamp(from, total)];
        write!(stream, "HTTP/1.1 {status} -\r\nConnection: close\r\nContent-Length: {}\r\n", part.len())?;
        write!(stream, "ETag: \"{total}\"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n")?;
        write!(stream, "Content-Range: bytes {from}-{}/{total}\r\n\r\n", (from + part.len()).saturating_sub(1))?;
        let mut cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        if cut.is_some_and(|cut| cut < part.len()) {
            part = &part[..cut.take().unwrap_or_default()];
        }
        drop(cut);
        if request.method == "head" {
            return Ok(());
        }
        let dribble = self.dribble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if dribble.is_some_and(|end| request.path.ends_with(&end)) {
            for byte in part {
                stream.write_all(&[*byte])?;
                std::thread::sleep(Duration::from_secs(1));
            }
            return Ok(());
        }
        stream.write_all(part)
    }

    fn find(&self, request: &Request) -> Result<Vec<u8>, u16> {
        let path = request.path.split('?').next().unwrap_or_default();
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
        match parts[..] {
            ["api", "models", owner, name, rest] => {
                let (commit, files) = self.revision(owner, name, rest.trim_start_matches("revision/"), request)?;
                let siblings: Vec<_> = files.iter().map(|(path, bytes)| described(path, bytes)).collect();
                Ok(json!({ "sha": commit, "siblings": siblings }).to_string().into_bytes())
            }
            [owner, name, "resolve", commit, file] => {
                let (_, files) = self.revision(owner, name, commit, request)?;
                let mut bytes = files.get(file).cloned().ok_or(404u16)?;
                if let Some(last) = bytes.last_mut().filter(|_| self.spoilt.iter().any(|path| path == file)) {
                    *last ^= 1;
                }
                Ok(bytes)
            }
            _ => {
                let (model, file) = path.trim_start_matches("/plain/").split_once('/').ok_or(404u16)?;
                let (_, files) = self.revision("plain", model, "main", request)?;
                files.get(file).cloned().ok_or(404)
            }
        }
    }

    fn revision(&self, owner: &str, name: &str, revision: &str, request: &Request) -> Result<&(String, Files), u16> {
        if owner == "private" && request.token != format!("Bearer {}", self.token) {
            return Err(401);
        }
        let model = self.models.get(&format!("{owner}/{name}")).ok_or(404u16)?;
        let commit = || model.values().find(|(commit, _)| commit == revision);
        model.get(revision).or_else(commit).ok_or(404)
    }
}

/// A file in a hub's listing: large files have the SHA-256 of their content, others have their Git object name.
fn described(path: &str, bytes: &[u8]) -> Value {
    let hex = |hash: &[u8]| hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if path.ends_with(".safetensors") {
        let sha256 = hex(&Sha256::digest(bytes));
        return json!({ "rfilename": path, "size": bytes.len(), "blobId": "0".repeat(40), "lfs": { "sha256": sha256 } });
    }
    let mut git = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    git.update(bytes);
    json!({ "rfilename": path, "size": bytes.len(), "blobId": hex(&git.finalize()) })
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut request = Request::default();
    for (i, line) in BufReader::new(stream).lines().enumerate() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(' ').unwrap_or_default();
        match (i, name.to_ascii_lowercase().as_str()) {
            (0, method) => {
                request.method = method.to_owned();
                request.path = value.split(' ').next().unwrap_or_default().to_owned();
            }
            (_, "authorization:") => request.token = value.to_owned(),
            (_, "range:") => {
                let (from, last) = value.trim_start_matches("bytes=").split_once('-').unwrap_or_default();
                request.from = from.parse().unwrap_or_default();
                request.to = last.parse().ok().map(|last: usize| last + 1);
            }
            _ => {}
        }
    }
    Ok(request)
}
