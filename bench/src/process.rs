//! Runs the coordinator as a process: starts it, watches it through `/proc`, kills it.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::BenchError;
use crate::scenery::Scenery;

/// A running coordinator; killed when dropped.
#[derive(Debug)]
pub struct Coordinator {
    child: Child,
    log: PathBuf,
    /// When it was started.
    pub started: Instant,
    /// Its URL.
    pub address: String,
}

/// Memory of a process in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Resident now.
    pub resident: u64,
    /// The peak resident memory since the process started, or since [`Coordinator::forget_peak`].
    pub peak: u64,
}

/// The kernel's unit of CPU time in `/proc`, the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A port that nothing listens on.
pub fn free_port() -> Result<u16, BenchError> {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    Ok(free.map_err(|error| BenchError::Answer(format!("has no port to listen on: {error}")))?.port())
}

impl Coordinator {
    /// Starts `program coordinator` over a stage.
    pub fn start(program: &Path, stage: &Scenery, preset: &str, port: u16) -> Result<Self, BenchError> {
        let failed = |source| BenchError::Start { program: program.to_owned(), source };
        let log = fs::File::options().create(true).append(true).open(&stage.log).map_err(failed)?;
        let mut command = Command::new(program);
        command
            .arg("coordinator")
            .arg("--images")
            .arg(&stage.images)
            .arg("--classes")
            .arg(&stage.classes)
            .arg("--model")
            .arg(&stage.model)
            .arg("--out")
            .arg(&stage.out)
            .args(["--preset", preset, "--progress", "none", "--listen", &format!("127.0.0.1:{port}")])
            .env_remove("ELBO_TOKEN")
            .env_remove("ELBO_TOKEN_FILE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let started = Instant::now();
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child, log: stage.log.clone(), started, address: format!("http://127.0.0.1:{port}") })
    }

    /// Fails if the process has ended.
    pub fn check(&mut self) -> Result<(), BenchError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(BenchError::Ended { status: status.to_string(), log: self.log.clone() }),
            Err(error) => Err(BenchError::Answer(format!("can't be waited for: {error}"))),
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<(), BenchError> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map(drop).map_err(|error| BenchError::Answer(format!("can't be killed: {error}")))
    }

    /// Waits until it has finished its job.
    pub async fn wait(&mut self) -> Result<(), BenchError> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                _ => self.check()?,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }

    /// CPU time used by all threads so far.
    pub fn cpu(&self) -> Result<Duration, BenchError> {
        let path = self.proc("stat");
        let stat = fs::read_to_string(&path).unwrap_or_default();
        parse_cpu(&stat).ok_or(BenchError::Proc(path))
    }

    /// Memory in use.
    pub fn memory(&self) -> Result<Memory, BenchError> {
        let path = self.proc("status");
        let status = fs::read_to_string(&path).unwrap_or_default();
        parse_memory(&status).ok_or(BenchError::Proc(path))
    }

    /// Resets the peak of [`Coordinator::memory`].
    pub fn forget_peak(&self) -> Result<(), BenchError> {
        let path = self.proc("clear_refs");
        // 5 resets the high-water mark: proc_pid_clear_refs(5).
        fs::write(&path, "5").map_err(|_| BenchError::Proc(path))
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time: fields 14 and 15. Fields are counted after the name in parentheses, which may contain anything.
fn parse_cpu(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Duration::try_from_secs_f64((ticks()? + ticks()?) / TICKS_PER_SECOND).ok()
}

fn parse_memory(status: &str) -> Option<Memory> {
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
    };
    Some(Memory { resident: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
}

/// The size of all files below a directory; files that disappear while counting are ignored.
pub fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_parsed() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194560 9 0 0 0 250 50 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse_cpu(stat), Some(Duration::from_secs(3)));
        assert_eq!(parse_cpu("42"), None);
        let status = "Name:\telbo\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(parse_memory(status), Some(Memory { resident: 1 << 20, peak: 2 << 20 }));
        assert_eq!(parse_memory("Name:\telbo\n"), None);
    }
}
