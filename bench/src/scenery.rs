//! A job's files, as far as a coordinator reads them: images, classes and a model.

use std::fs;
use std::path::{Path, PathBuf};

use crate::BenchError;

/// Images per directory.
const PER_DIRECTORY: u64 = 1000;

/// The files of a benchmark's job.
#[derive(Clone, Debug)]
pub struct Scenery {
    /// Directory with empty images in nested directories.
    pub images: PathBuf,
    /// Class file.
    pub classes: PathBuf,
    /// Model directory with only the configurations.
    pub model: PathBuf,
    /// The job's output, empty at first.
    pub out: PathBuf,
    /// The coordinator's log.
    pub log: PathBuf,
}

impl Scenery {
    /// Makes the files in `dir`; reuses the images of an earlier benchmark.
    pub fn make(dir: &Path, samples: u64, classes: u32) -> Result<Self, BenchError> {
        let stage = Self {
            images: dir.join(format!("images-{samples}")),
            classes: dir.join(format!("classes-{classes}.txt")),
            model: dir.join("model"),
            out: dir.join(format!("out-{samples}")),
            log: dir.join("coordinator.log"),
        };
        make_directory(dir)?;
        if stage.out.exists() {
            fs::remove_dir_all(&stage.out).map_err(failed("removing", &stage.out))?;
        }
        let names: String = (0..classes).map(|class| format!("class {class:04}\n")).collect();
        write(&stage.classes, &names)?;
        write(
            &stage.model.join("model_index.json"),
            r#"{"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}"#,
        )?;
        write(
            &stage.model.join("scheduler/scheduler_config.json"),
            r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}"#,
        )?;
        let complete = dir.join(format!("images-{samples}.complete"));
        if !complete.exists() {
            make_images(&stage.images, samples)?;
            write(&complete, "")?;
        }
        Ok(stage)
    }
}

/// Empty images: `images/12/345/012345678.jpg`.
fn make_images(root: &Path, samples: u64) -> Result<(), BenchError> {
    for directory in 0..samples.div_ceil(PER_DIRECTORY) {
        let path = root.join(format!("{}/{:03}", directory / 1000, directory % 1000));
        make_directory(&path)?;
        let first = directory * PER_DIRECTORY;
        for sample in first..samples.min(first + PER_DIRECTORY) {
            let image = path.join(format!("{sample:09}.jpg"));
            fs::File::create(&image).map_err(failed("creating", &image))?;
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), BenchError> {
    fs::create_dir_all(path).map_err(failed("creating", path))
}

fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    path.parent().map_or(Ok(()), make_directory)?;
    fs::write(path, text).map_err(failed("writing", path))
}

fn failed(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::Scenery { action, path: path.clone(), source }
}
