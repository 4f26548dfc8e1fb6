//! Hashes by which damage to a file shows, wherever in it a bit has changed.
//!
//! The ledger keeps a [`Checksum`] of every file of a committed shard. Every table also holds one of its own rows
//! ([`DATA`]), so that a file can be checked where there is no ledger; that one says nothing of the footer, which it is in.

use futures::StreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::{Store, StoreError, retry};

/// The key of a table's metadata with the BLAKE3 hash of all bytes before its footer, and how many these are.
pub const DATA: &str = "elbo.checksum";

/// A file as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where it lies in the output.
    pub path: Path,
    /// Its size in bytes.
    pub size: u64,
    /// The BLAKE3 hash of its bytes.
    pub hash: [u8; 32],
}

impl Checksum {
    /// The checksum of a file with these bytes.
    pub fn of(path: &Path, bytes: &[u8]) -> Self {
        Self { path: path.clone(), size: bytes.len() as u64, hash: blake3::hash(bytes).into() }
    }

    /// The checksum of the file that is there; `None` where there is none.
    pub async fn read(out: &Store, path: &Path) -> Result<Option<Self>, StoreError> {
        Ok(Hashed::read(out, path, None).await?.map(|hashed| hashed.whole))
    }
}

/// The hashes of a file's bytes.
#[derive(Debug)]
pub struct Hashed {
    /// Of all of them.
    pub whole: Checksum,
    /// Of those before its footer, if it was asked for.
    data: Option<blake3::Hash>,
}

impl Hashed {
    /// Reads a file, piece by piece, and hashes it; also what its table says are the bytes before the footer.
    pub async fn read(out: &Store, path: &Path, data: Option<&Data>) -> Result<Option<Self>, StoreError> {
        let store = out.inner();
        let hash = || async {
            let mut pieces = store.get(path).await?.into_stream();
            let (mut hasher, mut size, mut of_data) = (blake3::Hasher::new(), 0, None);
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                let end = size + piece.len() as u64;
                if let Some(data) = data.filter(|data| (size..end).contains(&data.bytes)) {
                    let mut hasher = hasher.clone();
                    hasher.update(&piece[..(data.bytes - size) as usize]);
                    of_data = Some(hasher.finalize());
                }
                hasher.update(&piece);
                size = end;
            }
            Ok(Self { whole: Checksum { path: path.clone(), size, hash: hasher.finalize().into() }, data: of_data })
        };
        match retry::run("reading", &out.location().below(path.as_ref()), hash).await {
            Ok(hashed) => Ok(Some(hashed)),
            Err(StoreError::Object { source: object_store::Error::NotFound { .. }, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the bytes before the footer are those that were written.
    pub fn has(&self, data: &Data) -> bool {
        self.data.is_some_and(|hash| hash.to_hex().as_str() == data.hash)
    }
}

/// What a table says of its bytes before the footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    hash: String,
    bytes: u64,
}

impl Data {
    /// What is said of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { hash: blake3::hash(bytes).to_hex().to_string(), bytes: bytes.len() as u64 }
    }

    /// The reverse of its display; `None` where it can't be understood.
    pub fn parse(text: &str) -> Option<Self> {
        let (hash, bytes) = text.strip_prefix("blake3:")?.split_once(':')?;
        Some(Self { hash: hash.to_owned(), bytes: bytes.parse().ok()? })
    }

    /// Whether a file's bytes are as it says.
    pub fn is_of(&self, file: &[u8]) -> bool {
        usize::try_from(self.bytes).ok().and_then(|bytes| file.get(..bytes)).is_some_and(|data| Self::of(data) == *self)
    }
}

impl std::fmt::Display for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "blake3:{}:{}", self.hash, self.bytes)
    }
}
