//! Latents of the samples a worker is busy with, so that a sample's next round needs no second look at its image.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use elbo_core::ids::SampleId;

/// What a model made of an image: a scaled latent `x0` in [H, W, C] order, or an embedding.
pub type Latent = Arc<Vec<f32>>;

/// A sample and the stage that looked at it.
pub type Key = (SampleId, usize);

/// Latents by sample and stage, bounded by memory, oldest out first.
#[derive(Debug)]
pub struct LatentCache {
    inner: Mutex<Inner>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Inner {
    latents: HashMap<Key, Latent>,
    order: VecDeque<Key>,
}

impl LatentCache {
    /// A cache for at most `bytes` of latents of `elements` elements each, at least one of them.
    pub fn new(bytes: usize, elements: usize) -> Self {
        Self { inner: Mutex::default(), capacity: (bytes / (4 * elements.max(1))).max(1) }
    }

    /// What a stage's model made of a sample, if it is still here.
    pub fn get(&self, key: Key) -> Option<Latent> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).latents.get(&key).cloned()
    }

    /// Keeps a latent.
    pub fn put(&self, key: Key, latent: Latent) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.latents.insert(key, latent).is_none() {
            inner.order.push_back(key);
        }
        while inner.order.len() > self.capacity {
            if let Some(oldest) = inner.order.pop_front() {
                inner.latents.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_latents_make_room() {
        let cache = LatentCache::new(2 * 4 * 3, 3);
        (0..3).for_each(|i| cache.put((SampleId(i), 0), Arc::new(vec![i as f32; 3])));
        assert!(cache.get((SampleId(0), 0)).is_none());
        assert_eq!(cache.get((SampleId(2), 0)).unwrap()[0], 2.0);
    }
}
