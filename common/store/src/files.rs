//! Local files that are read without hanging: a named pipe waits for a writer, and a device may never end.
//!
//! What a dataset or a model is made of must be regular files ([`open`]). A small text file that a user names may be a pipe
//! too, as in `--classes <(...)` ([`read_given`]).

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// The most that is read of a pipe or device, in bytes.
const LARGEST_GIVEN: u64 = 256 << 20;

/// What there is in the place of a regular file.
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

/// Refuses what is no regular file.
fn check(metadata: &Metadata) -> Result<()> {
    match irregular(metadata) {
        None => Ok(()),
        Some(what) => Err(Error::new(ErrorKind::InvalidInput, format!("it is {what}, not a regular file"))),
    }
}

/// Opens a regular file for reading. Whatever else lies there is an error that says what it is; nothing is waited for.
pub fn open(path: &Path) -> Result<File> {
    // Opening a device can already do something.
    check(&std::fs::metadata(path)?)?;
    // It may have become a pipe since.
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

/// The content of a file that a user names, which may be a pipe: it is waited for, and read to its end, but no further than
/// any such file can be meant to be.
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
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
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
    fn a_file_that_is_given_may_be_a_pipe_but_must_end() {
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
