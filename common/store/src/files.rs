//! Opens local files without hanging: a named pipe would wait for a writer, and a device may never end.
//!
//! Files of a dataset or model must be regular files ([`open`]). A small text file named by the user may also be a pipe, as in
//! `--classes <(...)` ([`read_given`]).

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// The most bytes read from a pipe or device.
const LARGEST_GIVEN: u64 = 256 << 20;

/// What a path is, if it is not a regular file.
pub fn irregular(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return None;
    }
    Some(if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    })
}

/// Refuses anything but a regular file.
fn check(metadata: &Metadata) -> Result<()> {
    match irregular(metadata) {
        None => Ok(()),
        Some(what) => Err(Error::new(ErrorKind::InvalidInput, format!("it is {what}, not a regular file"))),
    }
}

/// Opens a regular file for reading, without waiting. For anything else the error says what it is.
pub fn open(path: &Path) -> Result<File> {
    // Checked before opening, since opening a device may have effects.
    check(&std::fs::metadata(path)?)?;
    // Checked again, since it may have become a pipe meanwhile.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// The content of a regular file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut file = open(path)?;
    let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or_default());
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The content of a regular file in UTF-8.
pub fn read_to_string(path: &Path) -> Result<String> {
    text(read(path)?)
}

/// Reads a file named by the user, which may be a pipe. Waits for its end, and fails if it is larger than such a file can
/// reasonably be.
pub fn read_given(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let limit = if file.metadata()?.is_file() { u64::MAX } else { LARGEST_GIVEN };
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == limit {
        let text = format!("it has no end within {} MiB: give a regular file", limit >> 20);
        return Err(Error::new(ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// [`read_given`] in UTF-8.
pub fn read_given_to_string(path: &Path) -> Result<String> {
    text(read_given(path)?)
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_without_waiting() {
        let root = tempfile::TempDir::new().unwrap();
        let pipe = root.path().join("a.png");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let socket = root.path().join("b.png");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let cases = [(pipe.as_path(), "a named pipe"), (&socket, "a socket"), (root.path(), "a directory")];
        for (path, what) in cases.into_iter().chain([(Path::new("/dev/zero"), "a device")]) {
            let error = read(path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let file = root.path().join("c.png");
        std::fs::write(&file, "content").unwrap();
        assert_eq!(read(&file).unwrap(), b"content");
    }

    #[test]
    fn a_given_file_may_be_a_pipe_but_must_end() {
        let root = tempfile::TempDir::new().unwrap();
        let pipe = root.path().join("classes.txt");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let writer = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::write(pipe, "cat\ndog\n")
        });
        assert_eq!(read_given_to_string(&pipe).unwrap(), "cat\ndog\n");
        writer.join().unwrap().unwrap();
        assert!(read_given(Path::new("/dev/zero")).unwrap_err().to_string().contains("no end"));
    }
}
