//! Reads transformers' `preprocessor_config.json`, which newer versions write into `processor_config.json`.

use std::path::Path;

use elbo_images::{Filter, Preprocessing};
use serde::Deserialize;
use serde_json::Value;

use super::architecture::Layout;
use crate::error::ModelError;
use crate::settings::with_defaults;
use crate::settings::{read_json, unsupported};

/// The mean and standard deviation of R, G and B in OpenAI's CLIP training.
pub(super) const OPENAI: ([f32; 3], [f32; 3]) =
    ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);

#[derive(Deserialize)]
struct Processor {
    do_resize: Option<bool>,
    size: Option<Size>,
    resample: Option<u32>,
    do_center_crop: Option<bool>,
    crop_size: Option<Size>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Rectangle { height: usize, width: usize },
    ShortSide { shortest_edge: usize },
}

/// The preprocessing for a model that takes images of `side` pixels.
pub(super) fn read(dir: &Path, layout: Layout, side: usize) -> Result<Preprocessing, ModelError> {
    let (own, whole) = (dir.join("preprocessor_config.json"), dir.join("processor_config.json"));
    if own.is_file() || !whole.is_file() {
        return preprocessing(&own, read_json(&own)?, layout, side);
    }
    let mut file: Value = read_json(&whole)?;
    match file.get_mut("image_processor").map(Value::take) {
        Some(settings) => preprocessing(&whole, with_defaults(&whole, settings)?, layout, side),
        None => Err(ModelError::MissingFile(own)),
    }
}

fn preprocessing(path: &Path, file: Processor, layout: Layout, side: usize) -> Result<Preprocessing, ModelError> {
    for (key, value) in [("do_resize", file.do_resize), ("do_rescale", file.do_rescale)] {
        if value == Some(false) {
            return Err(unsupported(path, key, false));
        }
    }
    if let Some(factor) = file.rescale_factor.filter(|factor| (factor * 255.0 - 1.0).abs() > 1e-6) {
        return Err(unsupported(path, "rescale_factor", factor));
    }
    let filter = match file.resample {
        None | Some(3) => Filter::Bicubic,
        Some(2) => Filter::Bilinear,
        Some(other) => return Err(unsupported(path, "resample", other)),
    };
    let (mean, std) = if layout == Layout::Clip { OPENAI } else { ([0.5; 3], [0.5; 3]) };
    let (mean, std) = match file.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (file.image_mean.unwrap_or(mean), file.image_std.unwrap_or(std)),
    };
    check_std(path, "image_std", std)?;
    let square = Size::Rectangle { height: side, width: side };
    let short_side = Size::ShortSide { shortest_edge: side };
    let pixels = side as u32;
    if layout == Layout::Siglip {
        return match file.size {
            Some(size) if size != square => Err(unsupported(path, "size", size)),
            _ => Ok(Preprocessing::siglip(pixels, filter, mean, std)),
        };
    }
    if let Some(crop) = file.crop_size.filter(|&crop| crop != square && crop != Size::Side(side)) {
        return Err(unsupported(path, "crop_size", crop));
    }
    match file.size.unwrap_or(short_side) {
        size if size == square => Ok(Preprocessing::siglip(pixels, filter, mean, std)),
        size if size != short_side && size != Size::Side(side) => Err(unsupported(path, "size", size)),
        _ if file.do_center_crop == Some(false) => Err(unsupported(path, "do_center_crop", false)),
        _ => Ok(Preprocessing::clip(pixels, filter, mean, std)),
    }
}

/// Refuses unusable standard deviations, since images are divided by them.
pub(super) fn check_std(path: &Path, key: &str, std: [f32; 3]) -> Result<(), ModelError> {
    if std.iter().all(|std| std.is_normal()) { Ok(()) } else { Err(unsupported(path, key, std)) }
}
