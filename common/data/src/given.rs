//! Reads the files that a user gives besides the images: classes, class maps, hierarchies, noise.

use std::path::Path;

use elbo_core::class::{CLASS_FILE, CLASS_MAP, ClassError, Classes, HIERARCHY, Hierarchy, HierarchyError, ModelLabels};
use elbo_core::hand_table::{HandError, HandText};
use elbo_core::noise::{NoiseError, NoiseTable};
use elbo_store::files;

/// The text of a file written by hand, which may be a pipe; `what` is its kind, for errors.
pub(crate) fn text(what: &'static str, path: &Path) -> Result<HandText, HandError> {
    let file = path.display().to_string();
    match files::read_given(path) {
        Ok(bytes) => HandText::new(what, file, bytes),
        Err(error) => Err(HandError::unread(what, file, &error)),
    }
}

/// Reads a class file for a model that takes prompts: see [`Classes::of_text`].
pub fn classes(path: &Path, templates: &[String]) -> Result<Classes, ClassError> {
    Classes::of_text(&text(CLASS_FILE, path)?, templates)
}

/// Reads a class file for a class-conditional model: see [`Classes::of_labels`].
pub fn classes_of_labels(path: &Path, templates: &[String], labels: &ModelLabels) -> Result<Classes, ClassError> {
    Classes::of_labels(&text(CLASS_FILE, path)?, templates, labels)
}

/// Reads a class map: see [`Classes::of_map`].
pub fn class_map(path: &Path, labels: &ModelLabels) -> Result<Classes, ClassError> {
    Classes::of_map(&text(CLASS_MAP, path)?, labels)
}

/// Reads a hierarchy: see [`Hierarchy::of_text`].
pub fn hierarchy(path: &Path, classes: &Classes, templates: &[String]) -> Result<Hierarchy, HierarchyError> {
    Hierarchy::of_text(&text(HIERARCHY, path)?, classes, templates)
}

/// Reads a noise file: see [`NoiseTable::parse`].
pub fn noise(path: &Path) -> Result<NoiseTable, NoiseError> {
    let bytes = files::read(path).map_err(|source| NoiseError::Read { path: path.to_owned(), source })?;
    NoiseTable::parse(path, &bytes)
}
