//! A coordinator as operators run one: with a log, a token and whatever flags a test is about.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{PATIENCE, Process, coordinator_flags, elbo, free_address, job_flags, json, results, run_ok, some_images};

/// The token of every coordinator here.
pub const TOKEN: &str = "a-secret-0f93";

/// A job, and the address its coordinator listens on.
#[derive(Debug)]
pub struct Service {
    /// Host and port.
    pub address: String,
    /// Those of the HTTP side.
    pub http: String,
    images: TempDir,
    /// A directory for this test's files.
    pub files: TempDir,
}

impl Service {
    /// A job on `per_class` images of every digit.
    pub fn new(per_class: usize) -> Self {
        let (address, http) = (free_address(), free_address());
        Self { address, http, images: some_images(per_class), files: TempDir::new().expect("a directory") }
    }

    /// A file of this test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The output.
    pub fn out(&self) -> PathBuf {
        self.file("out")
    }

    /// Starts the coordinator with further flags, its log going to the file `coordinator.log`; waits until it is ready.
    pub fn coordinator(&self, flags: &[&str]) -> Process {
        let mut command = elbo();
        command.arg("coordinator").args(coordinator_flags(self.images.path(), &self.out()));
        command.args(["--listen", &self.address, "--lease-seconds", "20", "--http", &self.http]).args(flags);
        let mut process = self.start(command.env("ELBO_TOKEN", TOKEN), "coordinator.log");
        let end = Instant::now() + PATIENCE;
        while !self.is_ready().unwrap_or(false) {
            assert!(Instant::now() < end && process.is_running(), "{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        process
    }

    /// Whether the coordinator says that it serves workers.
    fn is_ready(&self) -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(&self.http)?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    }

    /// Starts a command with its log going to a file.
    pub fn start(&self, command: &mut Command, log: &str) -> Process {
        let log = File::create(self.file(log)).expect("a log");
        Process(command.stdout(Stdio::null()).stderr(log).spawn().expect("starting elbo"))
    }

    /// A worker's command with the right token, for this coordinator by another scheme or host.
    pub fn worker(&self, url: &str) -> Command {
        let mut command = elbo();
        command.args(["worker", "--threads", "1", "--batch", "16", "--patience", "20", "--coordinator", url]);
        command.env("ELBO_TOKEN", TOKEN);
        command
    }

    /// What the coordinator has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("coordinator.log")).expect("the log")
    }

    /// The job has ended with the bytes that an undisturbed run gives, and the output is whole.
    pub fn check_results(&self) {
        let expected = self.file("expected");
        run_ok(elbo().arg("label").args(job_flags(self.images.path(), &expected)));
        assert!(results(&self.out()) == results(&expected), "the results differ from an undisturbed run's");
        let verified = json(elbo().args(["verify", "--json"]).arg(self.out()));
        assert_eq!(verified["ok"], true, "{verified}");
        assert_eq!(verified["quarantined"], 0, "{verified}");
    }
}
