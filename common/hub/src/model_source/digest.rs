//! The hashes by which sources identify their files.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// The expected hash of a file's content, in lowercase hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// SHA-256 of the content: for the hub's large files (Git LFS, Xet) and for lists of `sha256sum`.
    Sha256(String),
    /// SHA-1 of a Git blob: for the hub's other files.
    GitBlob(String),
}

impl Digest {
    /// Parses a SHA-256.
    pub(super) fn sha256(text: &str) -> Option<Self> {
        is_hex(text, 64).then(|| Self::Sha256(text.to_ascii_lowercase()))
    }

    /// Parses the name of a Git blob.
    pub(super) fn git_blob(text: &str) -> Option<Self> {
        is_hex(text, 40).then(|| Self::GitBlob(text.to_ascii_lowercase()))
    }

    /// Parses the name of a blob in the hub's cache, where files are named by their hash.
    pub(super) fn of_blob_name(name: &str) -> Option<Self> {
        Self::sha256(name).or_else(|| Self::git_blob(name))
    }

    /// Whether a file has this hash.
    pub(super) fn is_of(&self, path: &Path) -> io::Result<bool> {
        let mut file = File::open(path)?;
        Ok(match self {
            Self::Sha256(expected) => hash(Sha256::new(), &mut file)? == *expected,
            Self::GitBlob(expected) => {
                let mut hasher = Sha1::new();
                hasher.update(format!("blob {}\0", file.metadata()?.len()));
                hash(hasher, &mut file)? == *expected
            }
        })
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn hash(mut hasher: impl sha2::Digest, file: &mut File) -> io::Result<String> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_match_sha256sum_and_git() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "hello\n").unwrap();
        // `sha256sum a` and `git hash-object a`.
        let sha256 = Digest::sha256("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03").unwrap();
        let git = Digest::git_blob("CE013625030BA8DBA906F756967F9E9CA394464A").unwrap();
        assert!(sha256.is_of(&path).unwrap() && git.is_of(&path).unwrap());
        std::fs::write(&path, "hellO\n").unwrap();
        assert!(!sha256.is_of(&path).unwrap() && !git.is_of(&path).unwrap());
        assert_eq!(Digest::of_blob_name("x"), None);
        assert_eq!(Digest::sha256("ce013625030ba8dba906f756967f9e9ca394464a"), None);
    }
}
