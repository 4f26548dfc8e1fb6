//! Reads a remote shard by ranges.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::runtime::Handle;

use elbo_store::{Store, retry};

/// The first window of a remote shard: a header, and the small members after it.
const FIRST_WINDOW: u64 = 16 << 10;
/// The largest window. If windows are consecutive, members are small, and fewer, larger requests are better.
const LARGEST_WINDOW: u64 = 1 << 20;

/// A remote file to read and seek in, for a thread that may block.
pub(super) struct Ranges {
    handle: Handle,
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// Its name in messages.
    name: String,
    size: u64,
    position: u64,
    /// The bytes in memory, and the position of the first.
    window: (u64, Bytes),
    window_size: u64,
}

impl Ranges {
    pub(super) fn new(store: &Store, path: Path, size: u64) -> Self {
        let (handle, window) = (Handle::current(), (0, Bytes::new()));
        let (store, name) = (store.inner(), store.location().below(path.as_ref()));
        Self { handle, store, path, name, size, position: 0, window, window_size: FIRST_WINDOW }
    }

    /// The bytes in memory from the current position on; empty at the end.
    fn ahead(&mut self) -> io::Result<Bytes> {
        let (start, bytes) = &self.window;
        let end = start + bytes.len() as u64;
        if (*start..end).contains(&self.position) {
            return Ok(bytes.slice((self.position - start) as usize..));
        }
        if self.position >= self.size {
            return Ok(Bytes::new());
        }
        let follows = self.position == end && end > 0;
        self.window_size = if follows { (2 * self.window_size).min(LARGEST_WINDOW) } else { FIRST_WINDOW };
        let range = self.position..self.position.saturating_add(self.window_size).min(self.size);
        let get = || self.store.get_range(&self.path, range.clone());
        let bytes = self.handle.block_on(retry::run("reading", &self.name, get)).map_err(io::Error::other)?;
        self.window = (self.position, bytes.clone());
        Ok(bytes)
    }
}

impl Read for Ranges {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let ahead = self.ahead()?;
        let count = ahead.len().min(target.len());
        target[..count].copy_from_slice(&ahead[..count]);
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Ranges {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| io::Error::other("the archive refers to a position outside of it"))?;
        Ok(self.position)
    }
}
