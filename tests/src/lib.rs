//! Helpers of the end-to-end tests: the real binary, real processes, and the digits they label.

#![allow(clippy::expect_used, clippy::panic, reason = "a test that can't be set up must fail")]

pub mod disk;
pub mod faults;
pub mod lease_log;
pub mod link;
pub mod numbers;
pub mod patience;
pub mod proxy;
pub mod servers;
pub mod service;
pub mod web;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use elbo_core::prediction::Prediction;
use elbo_output::predictions::decode_predictions;
use tempfile::TempDir;

use self::patience::wait_until;

/// The repository's root: where the tests were built, or `ELBO_TEST_ROOT` if they were moved.
pub fn root() -> PathBuf {
    std::env::var_os("ELBO_TEST_ROOT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

/// The fixtures.
pub fn fixtures() -> PathBuf {
    root().join("tests/fixtures")
}

/// The digits model.
pub fn model() -> PathBuf {
    root().join("cli/demo/model")
}

/// The digits' images, one directory per class.
pub fn images() -> PathBuf {
    root().join("cli/demo/images")
}

/// The digits' class file.
pub fn classes() -> PathBuf {
    root().join("cli/demo/classes.csv")
}

/// The `elbo` program that `cargo test` has built beside these tests.
pub fn elbo() -> Command {
    let test = std::env::current_exe().expect("this test's path");
    let path = test.ancestors().nth(2).expect("target directory").join("elbo");
    assert!(
        path.is_file(),
        "{} is missing: run the tests of the whole workspace, `cargo test --release`",
        path.display()
    );
    let mut command = Command::new(path);
    command.env_remove("ELBO_TOKEN").stdin(Stdio::null());
    command
}

/// A directory with the first `per_class` images of every class.
pub fn some_images(per_class: usize) -> TempDir {
    let target = TempDir::new().expect("a directory");
    for class in sorted(&images()) {
        let to = target.path().join(class.file_name().expect("a name"));
        std::fs::create_dir(&to).expect("a directory");
        for image in sorted(&class).into_iter().take(per_class) {
            std::fs::copy(&image, to.join(image.file_name().expect("a name"))).expect("copying");
        }
    }
    target
}

/// The entries of a directory, sorted.
pub fn sorted(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|e| e.expect("an entry").path())
        .collect();
    entries.sort();
    entries
}

/// Copies a directory, so that a test can damage the copy.
pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in sorted(from) {
        let target = to.join(entry.file_name().expect("a name"));
        if entry.is_dir() {
            copy_tree(&entry, &target);
        } else {
            std::fs::copy(&entry, target).expect("copying");
        }
    }
}

/// The flags of a job on `images` with a schedule of 3 prompts on 8, then 1 on 20 slots: 116 evaluations an image.
pub fn job_flags(images: &Path, out: &Path) -> Vec<String> {
    let text = |p: &Path| p.to_string_lossy().into_owned();
    let flags = [
        ("--images", text(images)),
        ("--classes", text(&classes())),
        ("--model", text(&model())),
        ("--out", text(out)),
        ("--keep", "3,1".into()),
        ("--samples", "8,20".into()),
        ("--label-from", "parent".into()),
        ("--shard-size", "25".into()),
        ("--batch", "16".into()),
        ("--progress", "none".into()),
    ];
    // The batch size changes no result, and measuring one takes time at every start.
    flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

/// The flags of [`job_flags`] that a coordinator takes; it computes nothing itself.
pub fn coordinator_flags(images: &Path, out: &Path) -> Vec<String> {
    let flags = job_flags(images, out);
    let batch = flags.iter().position(|f| f == "--batch").expect("the flag");
    [&flags[..batch], &flags[batch + 2..]].concat()
}

/// The flags with some values replaced.
pub fn with(mut flags: Vec<String>, values: &[(&str, &str)]) -> Vec<String> {
    for (flag, value) in values {
        let at = flags.iter().position(|f| f == flag).expect("the flag");
        (*value).clone_into(&mut flags[at + 1]);
    }
    flags
}

/// The path and bytes of every file of an output that has rows of samples.
pub fn results(out: &Path) -> Vec<(String, Vec<u8>)> {
    ["predictions", "errors", "audit", "quarantine"]
        .iter()
        .map(|d| out.join(d))
        .filter(|d| d.is_dir())
        .flat_map(|d| sorted(&d))
        .map(|f| {
            let name = f.strip_prefix(out).expect("below").to_string_lossy().into_owned();
            (name, std::fs::read(&f).expect("reading"))
        })
        .collect()
}

/// Every prediction of an output, in order.
pub fn predictions(out: &Path) -> Vec<Prediction> {
    let decode = |file: PathBuf| decode_predictions(std::fs::read(file).expect("reading").into()).expect("predictions");
    sorted(&out.join("predictions")).into_iter().flat_map(decode).collect()
}

/// Creates a named pipe.
pub fn make_pipe(path: &Path) {
    run_ok(Command::new("mkfifo").arg(path));
}

/// Runs a command to its end and returns its output.
pub fn run(command: &mut Command) -> Output {
    command.output().expect("running elbo")
}

/// What a command printed to stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must succeed.
pub fn run_ok(command: &mut Command) -> Output {
    let output = run(command);
    assert!(output.status.success(), "{command:?}\n{}", stderr(&output));
    output
}

/// The JSON object a command prints.
pub fn json(command: &mut Command) -> serde_json::Value {
    let output = run_ok(command);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

/// A process that is killed when dropped.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// Starts a command in the background, without output.
    pub fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starting elbo"))
    }

    /// `kill -9` of a process that must be alive, or else the test would test nothing.
    pub fn kill(&mut self) {
        assert!(self.is_running(), "the process has ended before it could be killed");
        self.end();
    }

    /// Kills a process that may have ended already.
    pub fn end(&mut self) {
        self.0.kill().expect("killing");
        self.0.wait().expect("waiting");
    }

    /// `kill -9` after a while; returns whether the process was still alive.
    pub fn kill_after(&mut self, delay: Duration) -> bool {
        std::thread::sleep(delay);
        let is_alive = self.is_running();
        self.end();
        is_alive
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.0.id().to_string()).status();
        assert!(sent.expect("kill").success());
    }

    /// Waits for the end, with a limit; returns the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        wait_until(|| "the process did not end", || !self.is_running());
        self.0.wait().expect("waiting").code()
    }

    /// Waits for the end, which must be a success; returns the peak memory in bytes.
    pub fn peak_memory(&mut self) -> u64 {
        let status = format!("/proc/{}/status", self.0.id());
        let mut peak = 0;
        let look = || {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
            peak = kibibytes.map_or(peak, |kibibytes| kibibytes << 10);
            !self.is_running()
        };
        wait_until(|| "the process did not end", look);
        assert_eq!(self.wait(), Some(0));
        peak
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("waiting").is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A free loopback address.
pub fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

/// A Python with the packages of a requirements file below `tests/`, in a virtual environment kept under `target/`.
pub fn python(requirements: &str) -> PathBuf {
    let file = root().join("tests").join(requirements);
    let name = requirements.replace(['/', '.'], "-");
    let venv = root().join("target/python").join(name);
    let (python, stamp) = (venv.join("bin/python"), venv.join("installed.txt"));
    let wanted = std::fs::read(&file).expect("the requirements");
    if std::fs::read(&stamp).ok().as_ref() != Some(&wanted) {
        let mut make = Command::new("python3");
        run_ok(make.args(["-m", "venv"]).arg(&venv));
        let mut install = Command::new(&python);
        run_ok(install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]).arg(&file));
        std::fs::write(&stamp, wanted).expect("the stamp");
    }
    python
}
