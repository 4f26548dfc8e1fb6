//! Shows intermediate results to tests.

use candle_core::{Result, Tensor};

/// Receives intermediate results with diffusers' name of the submodule (`down_blocks.0.resnets.1`).
///
/// It is used to compare a model with another implementation, submodule by submodule. An absent probe costs nothing.
pub struct Probe<'a>(Option<&'a mut Watch<'a>>);

type Watch<'a> = dyn FnMut(&str, &Tensor) + 'a;

impl std::fmt::Debug for Probe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Probe").field(&self.0.is_some()).finish()
    }
}

impl<'a> Probe<'a> {
    /// A probe that ignores everything.
    pub fn none() -> Self {
        Self(None)
    }

    /// A probe that calls `watch` with every submodule's name and output.
    pub fn new(watch: &'a mut dyn FnMut(&str, &Tensor)) -> Self {
        Self(Some(watch))
    }

    /// Shows an intermediate result that the model computes anyway.
    pub(crate) fn see(&mut self, name: impl FnOnce() -> String, tensor: &Tensor) {
        if let Some(watch) = &mut self.0 {
            watch(&name(), tensor);
        }
    }

    /// Shows a result that is computed only for the probe.
    pub(crate) fn compute(&mut self, name: &str, tensor: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if let Some(watch) = &mut self.0 {
            watch(name, &tensor()?);
        }
        Ok(())
    }
}
