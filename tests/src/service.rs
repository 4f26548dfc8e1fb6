//! A coordinator as operators run it: with a log, a token and the flags that a test needs.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::patience::wait_until;
use crate::{Process, coordinator_flags, elbo, free_address, job_flags, json, results, run_ok, some_images};

/// The token of every coordinator in these tests.
pub const TOKEN: &str = "a-secret-0f93";

/// A job and the addresses its coordinator listens on.
#[derive(Debug)]
pub struct Service {
    /// Host and port.
    pub address: String,
    /// Host and port of the HTTP endpoint.
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

    /// The path of a file of this test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// The path of the output.
    pub fn out(&self) -> PathBuf {
        self.file("out")
    }

    /// Starts the coordinator with further flags and waits until it is ready. Its log goes to the file `coordinator.log`.
    pub fn coordinator(&self, flags: &[&str]) -> Process {
        let mut command = elbo();
        command.arg("coordinator").args(coordinator_flags(self.images.path(), &self.out()));
        command.args(["--listen", &self.address, "--lease-seconds", "20", "--http", &self.http]).args(flags);
        let mut process = self.start(command.env("ELBO_TOKEN", TOKEN), "coordinator.log");
        let is_ready = || {
            assert!(process.is_running(), "{}", self.log());
            self.is_ready().unwrap_or(false)
        };
        wait_until(|| self.log(), is_ready);
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

    /// Starts a command and sends its log to a file.
    pub fn start(&self, command: &mut Command, log: &str) -> Process {
        let log = File::create(self.file(log)).expect("a log");
        Process(command.stdout(Stdio::null()).stderr(log).spawn().expect("starting elbo"))
    }

    /// A worker's command with the right token; `url` reaches this coordinator, perhaps by another scheme or host.
    pub fn worker(&self, url: &str) -> Command {
        let mut command = elbo();
        command.args(["worker", "--threads", "1", "--batch", "16", "--patience", "20", "--coordinator", url]);
        command.env("ELBO_TOKEN", TOKEN);
        command
    }

    /// The coordinator's log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("coordinator.log")).expect("the log")
    }

    /// Asserts that the output is complete and has the same bytes as an undisturbed run.
    pub fn check_results(&self) {
        let expected = self.file("expected");
        run_ok(elbo().arg("label").args(job_flags(self.images.path(), &expected)));
        assert!(results(&self.out()) == results(&expected), "the results differ from an undisturbed run's");
        let verified = json(elbo().args(["verify", "--json"]).arg(self.out()));
        assert_eq!(verified["ok"], true, "{verified}");
        assert_eq!(verified["quarantined"], 0, "{verified}");
    }
}
