//! Watching intermediate results.

use candle_core::{Result, Tensor};

/// Receives intermediate results by the name diffusers gives the submodule (`down_blocks.0.resnets.1`).
///
/// Used to compare a model with another implementation submodule by submodule; an absent probe costs nothing.
pub struct Probe<'a>(Option<&'a mut Watch<'a>>);

type Watch<'a> = dyn FnMut(&str, &Tensor) + 'a;

impl std::fmt::Debug for Probe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Probe").field(&self.0.is_some()).finish()
    }
}

impl<'a> Probe<'a> {
    /// Nobody watches.
    pub fn none() -> Self {
        Self(None)
    }

    /// `watch` is called with every submodule's name and output.
    pub fn new(watch: &'a mut dyn FnMut(&str, &Tensor)) -> Self {
        Self(Some(watch))
    }

    /// Shows an intermediate result that is at hand.
    pub(crate) fn see(&mut self, name: impl FnOnce() -> String, tensor: &Tensor) {
        if let Some(watch) = &mut self.0 {
            watch(&name(), tensor);
        }
    }

    /// Shows a result that is computed only to be watched.
    pub(crate) fn compute(&mut self, name: &str, tensor: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Some(watch) = &mut self.0 {
            watch(name, &tensor()?);
        }
        Ok(())
    }
}
