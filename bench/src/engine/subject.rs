//! The measured network: a published configuration, or one on disk.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use elbo_models::{Family, LoadOptions, Network, WeightsFrom};
use serde_json::Value;

use crate::BenchError;

/// Built-in configurations, as diffusers stores them.
const CONFIGS: [(&str, &str); 6] = [
    ("digits", include_str!("../../../cli/demo/model/unet/config.json")),
    ("sd15", include_str!("../../configs/sd15.json")),
    ("sd2-base", include_str!("../../configs/sd2-base.json")),
    ("sdxl", include_str!("../../configs/sdxl.json")),
    ("sd3-m", include_str!("../../configs/sd3-m.json")),
    ("dit-xl-2", include_str!("../../configs/dit-xl-2.json")),
];

/// The possible names of a network.
pub const NAMES: &str = "digits, sd15, sd2-base, sdxl, sd3-m, dit-xl-2 or a model directory";

/// A network to make with weights from a seed.
#[derive(Clone, Debug)]
pub struct Subject {
    name: String,
    config: String,
    family: Family,
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let config = match CONFIGS.iter().find(|(known, _)| *known == name) {
            Some((_, config)) => (*config).to_owned(),
            None => read(Path::new(name))?,
        };
        let class = serde_json::from_str::<Value>(&config).map_err(|error| format!("{name}: {error}"))?;
        let family = match class["_class_name"].as_str() {
            Some("UNet2DConditionModel") => Family::StableDiffusion,
            Some("SD3Transformer2DModel") => Family::Sd3,
            Some("DiTTransformer2DModel" | "Transformer2DModel") => Family::Dit,
            other => return Err(format!("{name}: unknown network class {other:?}: give {NAMES}")),
        };
        Ok(Self { name: name.to_owned(), config, family })
    }
}

/// The configuration of the network in a model directory.
fn read(dir: &Path) -> Result<String, String> {
    let candidates = ["unet/config.json", "transformer/config.json", "config.json"].map(|file| dir.join(file));
    let found = candidates.iter().find(|path| path.is_file());
    let path: &PathBuf = found.ok_or_else(|| format!("no network '{}': give {NAMES}", dir.display()))?;
    std::fs::read_to_string(path).map_err(|error| format!("reading {}: {error}", path.display()))
}

impl Subject {
    /// The network.
    pub(super) fn make(&self, mut options: LoadOptions) -> Result<Network, BenchError> {
        options.weights = WeightsFrom::Seed(0);
        let dir = self.directory()?;
        Ok(Network::load(self.family, &dir.path().join(self.family.network()), &options)?)
    }

    /// The network's family.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// A temporary model directory with only the network's configuration.
    pub(super) fn directory(&self) -> Result<tempfile::TempDir, BenchError> {
        let stage = |path: &Path, source| BenchError::Scenery { action: "writing", path: path.to_owned(), source };
        let dir = tempfile::tempdir().map_err(|error| stage(&std::env::temp_dir(), error))?;
        let network = dir.path().join(self.family.network());
        let written =
            std::fs::create_dir(&network).and_then(|()| std::fs::write(network.join("config.json"), &self.config));
        written.map_err(|error| stage(&network, error))?;
        Ok(dir)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
