//! Hashes that detect damage to a file: any changed bit shows.
//!
//! The ledger keeps a [`Checksum`] of every file of a committed shard. Every table also holds a hash of its own rows
//! ([`DATA`]), so that a file can be checked without the ledger. That hash is stored in the footer and does not cover it.

use futures::StreamExt;
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::{Store, StoreError, retry};

/// The metadata key of a table's own checksum: the BLAKE3 hash of all bytes before its footer, and their number.
pub const DATA: &str = "elbo.checksum";

/// The checksum of a file as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Its path in the output.
    pub path: Path,
    /// Its size in bytes.
    pub size: u64,
    /// The BLAKE3 hash of its bytes.
    pub hash: [u8; 32],
}

impl Checksum {
    /// The checksum of a file with this content.
    pub fn of(path: &Path, bytes: &[u8]) -> Self {
        Self { path: path.clone(), size: bytes.len() as u64, hash: blake3::hash(bytes).into() }
    }

    /// The checksum of a stored file; `None` if it does not exist.
    pub async fn read(out: &Store, path: &Path) -> Result<Option<Self>, StoreError> {
        Ok(Hashed::read(out, path, None).await?.map(|hashed| hashed.whole))
    }
}

/// The hashes of a file's content.
#[derive(Debug)]
pub struct Hashed {
    /// The checksum of the whole file.
    pub whole: Checksum,
    /// The hash of the bytes before its footer, if requested.
    data: Option<blake3::Hash>,
}

impl Hashed {
    /// Reads a file piece by piece and hashes it. With `data`, also hashes the bytes that it covers, those before the footer.
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

    /// Whether the bytes before the footer match `data`.
    pub fn has(&self, data: &Data) -> bool {
        self.data.is_some_and(|hash| hash.to_hex().as_str() == data.hash)
    }
}

/// A table's own checksum of the bytes before its footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    hash: String,
    bytes: u64,
}

impl Data {
    /// The checksum of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { hash: blake3::hash(bytes).to_hex().to_string(), bytes: bytes.len() as u64 }
    }

    /// The reverse of its display; `None` if the text is invalid.
    pub fn parse(text: &str) -> Option<Self> {
        let (hash, bytes) = text.strip_prefix("blake3:")?.split_once(':')?;
        Some(Self { hash: hash.to_owned(), bytes: bytes.parse().ok()? })
    }

    /// Whether a file's bytes match it.
    pub fn is_of(&self, file: &[u8]) -> bool {
        usize::try_from(self.bytes).ok().and_then(|bytes| file.get(..bytes)).is_some_and(|data| Self::of(data) == *self)
    }
}

impl std::fmt::Display for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "blake3:{}:{}", self.hash, self.bytes)
    }
}
