//! Batch sizes that were found by measuring, kept for the next worker on such a device with such a job.
//!
//! A size changes no result, so what is kept is a hint: a file that can't be read or written is measured for again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use elbo_common::fingerprint::JobIdentity;
use elbo_common::model_source::own_cache;

/// What a batch size is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Situation(String);

impl Situation {
    /// A job's model on a device (by its name) with so many lanes.
    pub(crate) fn new(device: &str, lanes: usize, identity: &JobIdentity) -> Self {
        let spec = &identity.spec;
        let files = identity.model_files.iter().map(|(file, hash)| format!("{file}={hash}\n")).collect::<String>();
        let model = &blake3::hash(files.as_bytes()).to_hex()[..16];
        let (dtype, size, prompts) = (spec.dtype, spec.size.unwrap_or(0), spec.classes.prompts.len());
        let version = env!("CARGO_PKG_VERSION");
        Self(format!("{device}, lanes={lanes}, model={model}, {dtype}, size={size}, prompts={prompts}, elbo={version}"))
    }
}

/// The file batch sizes are kept in.
#[derive(Clone, Debug)]
pub(crate) struct KeptBatches(PathBuf);

impl Default for KeptBatches {
    /// `batches.json` in this program's cache.
    fn default() -> Self {
        Self(own_cache().join("batches.json"))
    }
}

impl KeptBatches {
    fn all(&self) -> BTreeMap<String, usize> {
        let text = std::fs::read(&self.0).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// The size kept for a situation.
    pub(crate) fn get(&self, situation: &Situation) -> Option<usize> {
        self.all().get(&situation.0).copied().filter(|batch| *batch > 0)
    }

    /// Keeps a size.
    pub(crate) fn put(&self, situation: &Situation, batch: usize) {
        let mut all = self.all();
        all.insert(situation.0.clone(), batch);
        let temporary = self.0.with_extension(format!("{}.part", std::process::id()));
        let kept = serde_json::to_vec_pretty(&all).map_err(std::io::Error::from).and_then(|text| {
            self.0.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            std::fs::write(&temporary, text)?;
            std::fs::rename(&temporary, &self.0)
        });
        if let Err(error) = kept {
            tracing::debug!(path = %self.0.display(), %error, "the batch size is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_kept_by_situation_and_a_damaged_file_is_nothing_kept() {
        let dir = tempfile::tempdir().unwrap();
        let kept = KeptBatches(dir.path().join("cache/batches.json"));
        let (here, there) = (Situation("here".into()), Situation("there".into()));
        assert_eq!(kept.get(&here), None);
        kept.put(&here, 16);
        kept.put(&there, 64);
        assert_eq!((kept.get(&here), kept.get(&there)), (Some(16), Some(64)));
        assert_eq!(std::fs::read_dir(dir.path().join("cache")).unwrap().count(), 1);
        std::fs::write(&kept.0, "{").unwrap();
        assert_eq!(kept.get(&here), None);
        kept.put(&here, 8);
        assert_eq!(kept.get(&here), Some(8));
    }
}
