//! A limit on the memory for images that are read ahead.
//!
//! An image's memory is known before it is decoded. A reader waits for its share of a [`Budget`] before it takes memory, and
//! returns the share by dropping it. A request for more than the whole budget gets all of it, so it runs alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Unit of shares, in bytes.
const UNIT: u64 = 64 << 10;

/// Memory that many readers take shares of. Clones share the same memory.
///
/// ```
/// # use elbo_data::budget::Budget;
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let budget = Budget::new(1 << 20);
/// let whole = budget.take(5 << 20).await;
/// assert_eq!(budget.free(), 0);
/// drop(whole);
/// assert_eq!(budget.free(), 1 << 20);
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct Budget {
    free: Arc<Semaphore>,
    units: u32,
    /// The fewest units that were ever free.
    fewest: Arc<AtomicUsize>,
}

/// A part of a [`Budget`], returned when dropped.
#[derive(Debug)]
pub struct Reservation(Option<OwnedSemaphorePermit>);

impl Budget {
    /// A budget of `bytes`, rounded up.
    pub fn new(bytes: u64) -> Self {
        let units = units(bytes).max(1);
        let free = Arc::new(Semaphore::new(units as usize));
        Self { free, units, fewest: Arc::new(AtomicUsize::new(units as usize)) }
    }

    /// Waits for `bytes`, or for the whole budget if that is less; first come, first served.
    pub async fn take(&self, bytes: u64) -> Reservation {
        // The semaphore is never closed.
        let share = Arc::clone(&self.free).acquire_many_owned(units(bytes).min(self.units)).await.ok();
        self.fewest.fetch_min(self.free.available_permits(), Ordering::Relaxed);
        Reservation(share)
    }

    /// Free bytes.
    pub fn free(&self) -> u64 {
        self.free.available_permits() as u64 * UNIT
    }

    /// The most bytes that were ever taken at once.
    pub fn peak(&self) -> u64 {
        u64::from(self.units) * UNIT - self.fewest.load(Ordering::Relaxed) as u64 * UNIT
    }
}

fn units(bytes: u64) -> u32 {
    // The maximum of a semaphore is more memory than any machine has.
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(1 << 28)
}

impl Reservation {
    /// Returns all but `bytes` of the share.
    pub fn keep(&mut self, bytes: u64) {
        if let Some(permit) = &mut self.0 {
            let surplus = permit.num_permits().saturating_sub(units(bytes) as usize);
            drop(permit.split(surplus));
        }
    }

    /// Binds this share to `bytes`: it is returned when the last reference to them is dropped.
    pub fn bind(self, bytes: Bytes) -> Bytes {
        struct Bound {
            bytes: Bytes,
            /// Dropped with the bytes.
            _share: Reservation,
        }
        impl AsRef<[u8]> for Bound {
            fn as_ref(&self) -> &[u8] {
                &self.bytes
            }
        }
        Bytes::from_owner(Bound { bytes, _share: self })
    }
}

/// The memory of a process for images that are read ahead. It is divided so that there is no deadlock: files are read, then
/// decoded; reading never waits for the memory of decoding.
#[derive(Clone, Debug)]
pub struct Memory {
    /// For files, tar members, and row groups of Parquet files that are being read: an eighth.
    pub files: Budget,
    /// For pictures, including the memory of their decoder and the resize: five eighths.
    pub pictures: Budget,
    /// Bytes of images and row groups that each reader of Parquet files keeps for nearby rows: a quarter, divided among the
    /// readers.
    pub kept: u64,
}

impl Memory {
    /// The default memory for images, in bytes.
    pub const DEFAULT: u64 = 2 << 30;

    /// Divides `bytes` for `readers` readers.
    pub fn new(bytes: u64, readers: usize) -> Self {
        let eighth = bytes / 8;
        Self { files: Budget::new(eighth), pictures: Budget::new(5 * eighth), kept: 2 * eighth / readers.max(1) as u64 }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(Self::DEFAULT, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shares_never_exceed_the_budget_and_one_too_large_gets_all_of_it() {
        let budget = Budget::new(100 * UNIT);
        let take = |units: u64| {
            let budget = budget.clone();
            async move {
                let share = budget.take(units * UNIT).await;
                tokio::task::yield_now().await;
                drop(share);
            }
        };
        // With a deadlock, this test would never end.
        futures::future::join_all([40, 1000, 60, 1, 0, 100, 33, 33, 33, 33].map(take)).await;
        assert_eq!((budget.peak(), budget.free()), (100 * UNIT, 100 * UNIT));

        let mut share = budget.take(70 * UNIT).await;
        assert!(futures::FutureExt::now_or_never(budget.take(31 * UNIT)).is_none());
        share.keep(10 * UNIT);
        assert_eq!(budget.free(), 90 * UNIT);
    }

    #[tokio::test]
    async fn bytes_hold_their_share_until_the_last_reference_is_dropped() {
        let budget = Budget::new(10 * UNIT);
        let bytes = budget.take(4 * UNIT).await.bind(Bytes::from_static(b"image"));
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!((&part[..], budget.free()), (&b"ma"[..], 6 * UNIT));
        drop(part);
        assert_eq!(budget.free(), 10 * UNIT);
    }
}
