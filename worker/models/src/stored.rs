//! A component's stored weights: in one file or several shards with an index, in one of several variants.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use elbo_hub::model_files::is_plain_name;
use elbo_hub::weight_files::{Stored, stored};
use serde::Deserialize;

use super::error::ModelError;
use super::file::WeightsFile;
use super::names::Naming;
use super::settings::read_json;

/// The weights of one component, by their usual names.
#[derive(Debug)]
pub(crate) struct StoredWeights {
    files: Vec<WeightsFile>,
    /// The place of each weight.
    tensors: HashMap<String, Place>,
    naming: Naming,
}

/// A weight's file and its name in that file.
#[derive(Debug)]
struct Place {
    file: usize,
    stored: String,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl StoredWeights {
    /// No weights at all.
    pub(crate) fn none(naming: Naming) -> Self {
        Self { files: Vec::new(), tensors: HashMap::new(), naming }
    }

    /// Opens the weights `<stem>[.<variant>].safetensors` or their shards in `dir`.
    pub(crate) fn open(dir: &Path, stem: &str, naming: Naming) -> Result<Self, ModelError> {
        let mut weights = Self::none(naming);
        match WeightsLayout::find(dir, stem)? {
            WeightsLayout::Whole(path) => {
                let file = WeightsFile::open(&path)?;
                file.keys().for_each(|key| weights.place(key.clone(), 0));
                weights.files.push(file);
            }
            WeightsLayout::Sharded(index) => weights.add_shards(&index)?,
        }
        Ok(weights)
    }

    /// The first file.
    pub(crate) fn path(&self) -> PathBuf {
        self.files.first().map(|file| file.path().to_owned()).unwrap_or_default()
    }

    fn add_shards(&mut self, index: &Path) -> Result<(), ModelError> {
        let map = read_json::<ShardIndex>(index)?.weight_map;
        let mut opened = HashMap::new();
        for (key, shard) in map {
            if !is_plain_name(&shard) {
                return Err(ModelError::ShardName { index: index.to_owned(), shard });
            }
            let at = match opened.get(&shard) {
                Some(&at) => at,
                None => {
                    let path = index.with_file_name(&shard);
                    let file = WeightsFile::open(&path).map_err(|error| match error {
                        ModelError::MissingFile(_) => {
                            ModelError::MissingShard { index: index.to_owned(), shard: shard.clone(), key: key.clone() }
                        }
                        other => other,
                    })?;
                    self.files.push(file);
                    opened.insert(shard, self.files.len() - 1);
                    self.files.len() - 1
                }
            };
            if self.files[at].shape(&key).is_none() {
                return Err(ModelError::MissingKey { path: self.files[at].path().to_owned(), key });
            }
            self.place(key, at);
        }
        Ok(())
    }

    /// Records a weight's place. A weight stored under its usual name takes precedence over one that is not.
    fn place(&mut self, stored: String, file: usize) {
        let name = (self.naming)(&stored).into_owned();
        if name == stored || !self.tensors.contains_key(&name) {
            self.tensors.insert(name, Place { file, stored });
        }
    }

    /// The weights' usual names, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Name, shape and stored type of every weight, in no order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &[usize], String)> {
        self.tensors.iter().filter_map(|(key, Place { file, stored })| {
            let file = self.files.get(*file)?;
            Some((key.as_str(), file.shape(stored)?, file.stored_type(stored)?))
        })
    }

    /// The file a weight is in, and its name there.
    pub(crate) fn find(&self, key: &str) -> Option<(&WeightsFile, &str)> {
        let Place { file, stored } = self.tensors.get(key)?;
        Some((self.files.get(*file)?, stored))
    }

    /// A weight's shape, if there is such a weight.
    pub(crate) fn shape(&self, key: &str) -> Option<&[usize]> {
        let (file, stored) = self.find(key)?;
        file.shape(stored)
    }
}

/// How a component's weights are stored.
enum WeightsLayout {
    /// In one file.
    Whole(PathBuf),
    /// In the shards that an index names.
    Sharded(PathBuf),
}

impl WeightsLayout {
    fn find(dir: &Path, stem: &str) -> Result<Self, ModelError> {
        let names = file_names(dir);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match stored(&names, stem) {
            Ok(Some(Stored::Whole(name))) => Ok(Self::Whole(dir.join(name))),
            Ok(Some(Stored::Sharded(name))) => Ok(Self::Sharded(dir.join(name))),
            Ok(None) => Err(match pickle(dir) {
                Some(path) => ModelError::Pickle(path),
                None => ModelError::MissingFile(dir.join(format!("{stem}.safetensors"))),
            }),
            Err(found) => {
                let found = found.into_iter().map(str::to_owned).collect();
                Err(ModelError::Variants { directory: dir.to_owned(), stem: stem.to_owned(), found })
            }
        }
    }
}

/// Whether `dir` has weights called `stem`, in any variant.
pub(crate) fn has_weights(dir: &Path, stem: &str) -> bool {
    !matches!(WeightsLayout::find(dir, stem), Err(ModelError::MissingFile(_) | ModelError::Pickle(_)))
}

/// The sorted names of the files in a directory; empty if it can't be read.
fn file_names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Weights in an unsupported format.
fn pickle(dir: &Path) -> Option<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    let known = ["bin", "ckpt", "pt", "pth"].map(OsStr::new);
    files.into_iter().find(|path| path.extension().is_some_and(|extension| known.contains(&extension)))
}
