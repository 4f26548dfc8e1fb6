//! Latents of the samples a worker is busy with, so that a sample's next round need not read its image again.

use std::sync::Arc;

use elbo_core::ids::SampleId;
use quick_cache::sync::Cache;

/// A model's encoding of an image: a scaled latent `x0` in [H, W, C] order, or an embedding.
pub type Latent = Arc<Vec<f32>>;

/// A sample and the stage that encoded it.
pub type Key = (SampleId, usize);

/// Latents by sample and stage, bounded by memory.
#[derive(Debug)]
pub struct LatentCache(Cache<Key, Latent>);

impl LatentCache {
    /// A cache for at most `bytes` of latents with `elements` elements each, but for at least one latent.
    pub fn new(bytes: usize, elements: usize) -> Self {
        Self(Cache::new((bytes / (4 * elements.max(1))).max(1)))
    }

    /// A sample's latent from a stage, if it is still here.
    pub fn get(&self, key: Key) -> Option<Latent> {
        self.0.get(&key)
    }

    /// Keeps a latent.
    pub fn put(&self, key: Key, latent: Latent) {
        self.0.insert(key, latent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_drops_latents() {
        let (capacity, elements) = (100, 3);
        let cache = LatentCache::new(capacity * 4 * elements, elements);
        (0..1000).for_each(|i| cache.put((SampleId(i), 0), Arc::new(vec![i as f32; elements])));
        let left: Vec<_> = (0..1000).filter_map(|i| Some((i, cache.get((SampleId(i), 0))?))).collect();
        assert!((capacity / 2..=capacity).contains(&left.len()), "{}", left.len());
        assert!(left.iter().all(|(i, latent)| latent[0] == *i as f32));
        let one = LatentCache::new(1, 1000);
        one.put((SampleId(1), 0), Arc::new(vec![1.0]));
        assert!(one.get((SampleId(1), 0)).is_some());
    }
}
