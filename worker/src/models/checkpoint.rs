//! Reading a model directory in diffusers' layout: JSON configurations and safetensors weights.
//!
//! A component's weights are one file or several shards with an index, in one of several variants. Files are mapped,
//! not read, and every tensor is converted when a layer takes it: host memory holds one weight at a time beside the
//! layers, and a mistake names the file and the key.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use elbo_common::files;
use elbo_common::model_files::is_plain_name;
use elbo_common::python_json;
use elbo_common::weight_files::{Stored, stored};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::drawn::drawn;
pub use super::error::ModelError;
use super::file::WeightsFile;
use super::lora::Lora;
use super::names::{Naming, as_stored};
use super::options::{LoadOptions, Precision, WeightsFrom};

/// Reads a file, telling a missing one from an unreadable one.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    files::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ModelError::MissingFile(path.to_owned()),
        _ => ModelError::Read { path: path.to_owned(), source },
    })
}

/// Reads a JSON configuration.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ModelError> {
    python_json::parse(&read(path)?).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// Says that a configuration's setting is not supported.
pub(crate) fn unsupported(path: &Path, key: &str, value: impl std::fmt::Debug) -> ModelError {
    ModelError::Unsupported { path: path.to_owned(), key: key.to_owned(), value: format!("{value:?}") }
}

/// The weights of one component.
#[derive(Debug)]
pub struct Weights {
    files: Vec<WeightsFile>,
    /// Where a weight is.
    tensors: HashMap<String, Place>,
    naming: Naming,
    /// The directory's name, by which adapters call the component.
    component: String,
    loras: Vec<Arc<Lora>>,
    device: Device,
    precision: Precision,
    from: WeightsFrom,
}

/// A file and the name that a weight has in it.
#[derive(Debug)]
struct Place {
    file: usize,
    stored: String,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens the weights `<stem>[.<variant>].safetensors` or their shards in `dir`, for layers to take them as `options` say.
    pub fn open(dir: &Path, stem: &str, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::open_named(dir, stem, as_stored, options)
    }

    /// Like [`Weights::open`] for weights that have had other names.
    pub(crate) fn open_named(
        dir: &Path,
        stem: &str,
        naming: Naming,
        options: &LoadOptions,
    ) -> Result<Self, ModelError> {
        let mut weights = Self {
            files: Vec::new(),
            tensors: HashMap::new(),
            naming,
            component: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            loras: options.loras.clone(),
            device: options.device.clone(),
            precision: options.precision,
            from: options.weights,
        };
        if weights.from != WeightsFrom::Files {
            return Ok(weights);
        }
        match WeightsLayout::find(dir, stem)? {
            WeightsLayout::Whole(path) => {
                let file = WeightsFile::open(&path)?;
                file.keys().for_each(|key| weights.place(key.clone(), 0));
                weights.files.push(file);
            }
            WeightsLayout::Sharded(index) => weights.add_shards(&index)?,
        }
        for lora in &weights.loras {
            lora.check(&weights.component, |key| weights.shape(key))?;
        }
        Ok(weights)
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

    /// Notes where a weight is. One that has its usual name goes before one that does not.
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

    /// The weights whose names start with `name.`.
    pub fn at(&self, name: &str) -> Params<'_> {
        Params { weights: self, prefix: name.to_owned() }
    }

    /// Name, shape and stored type of every weight, in no order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&str, &[usize], String)> {
        self.tensors.iter().filter_map(|(key, Place { file, stored })| {
            let file = self.files.get(*file)?;
            Some((key.as_str(), file.shape(stored)?, file.stored_type(stored)?))
        })
    }

    /// The file a weight is in, and its name there.
    fn stored(&self, key: &str) -> Option<(&WeightsFile, &str)> {
        let Place { file, stored } = self.tensors.get(key)?;
        Some((self.files.get(*file)?, stored))
    }

    fn shape(&self, key: &str) -> Option<&[usize]> {
        let (file, stored) = self.stored(key)?;
        file.shape(stored)
    }

    /// A weight with every adapter's change to it, as layers hold it.
    fn take(&self, key: &str, stored: &Tensor, shape: &[usize]) -> Result<Tensor, ModelError> {
        let mut weight = stored.reshape(shape)?;
        for lora in &self.loras {
            if let Some(change) = lora.change(&self.component, key)? {
                weight = (weight.to_dtype(DType::F32)? + change.reshape(shape)?)?;
            }
        }
        self.held(&weight)
    }

    /// A weight as layers hold it.
    fn held(&self, weight: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.precision.round(weight)?.to_device(&self.device)?)
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

/// Whether `dir` has weights called `stem`, in whichever variant.
pub(crate) fn has_weights(dir: &Path, stem: &str) -> bool {
    !matches!(WeightsLayout::find(dir, stem), Err(ModelError::MissingFile(_) | ModelError::Pickle(_)))
}

/// The names of the files in a directory, sorted; none where it can't be read.
fn file_names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Weights in a format that is not read.
fn pickle(dir: &Path) -> Option<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    let known = ["bin", "ckpt", "pt", "pth"].map(OsStr::new);
    files.into_iter().find(|path| path.extension().is_some_and(|extension| known.contains(&extension)))
}

/// A component's weights below a prefix, such as `down_blocks.0.resnets.1`.
#[derive(Clone, Debug)]
pub struct Params<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Params<'_> {
    /// The weights one level below.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { weights: self.weights, prefix: self.name(name) }
    }

    /// Where layers get their weights.
    pub(crate) fn device(&self) -> &Device {
        &self.weights.device
    }

    /// The type layers get their weights in.
    pub(crate) fn dtype(&self) -> DType {
        self.weights.precision.compute
    }

    /// Whether a weight of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.weights.tensors.contains_key(&self.name(name))
    }

    /// The weight `name` of the given shape.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        self.get_any(name, &[shape])
    }

    /// The weight `name`, stored in one of several shapes; it is returned in the first.
    pub fn get_any(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor, ModelError> {
        let shape = shapes.first().copied().unwrap_or_default();
        if let WeightsFrom::Seed(seed) = self.weights.from {
            return self.weights.held(&drawn(seed, &self.name(name), shape)?);
        }
        let (file, stored) = self.find(name, shapes)?;
        self.weights.take(&self.name(name), &file.tensor(stored)?, shape)
    }

    /// The single value `name`, not rounded to the layers' type.
    pub(crate) fn scalar(&self, name: &str) -> Result<f32, ModelError> {
        let (file, stored) = self.find(name, &[&[], &[1]])?;
        Ok(file.tensor(stored)?.reshape(())?.to_dtype(DType::F32)?.to_scalar()?)
    }

    /// The file a weight is in, and its name there.
    fn find(&self, name: &str, shapes: &[&[usize]]) -> Result<(&WeightsFile, &str), ModelError> {
        let (weights, key) = (self.weights, self.name(name));
        let Some((file, stored)) = weights.stored(&key) else {
            let path = weights.files.first().map(|file| file.path().to_owned()).unwrap_or_default();
            return Err(ModelError::MissingKey { path, key });
        };
        let found = file.shape(stored).unwrap_or_default();
        if !shapes.contains(&found) {
            let expected = shapes.first().copied().unwrap_or_default().to_vec();
            let (path, key, found) = (file.path().to_owned(), stored.to_owned(), found.to_vec());
            return Err(ModelError::WrongShape { path, key, expected, found });
        }
        Ok((file, stored))
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}
