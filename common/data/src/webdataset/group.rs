//! The members of a sample, and the sample they make.

use std::collections::BTreeMap;

use elbo_core::python_json;
use elbo_core::sample::Part;
use elbo_core::text::printable;
use serde_json::Value;

use super::super::walk::{File, extension_of};
use super::super::{Account, DatasetError, Found, Reason, caption_of, check_captions};
use super::Wanted;

/// A text that belongs to an image.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) path: String,
    /// Its content, or its size in bytes if it is too large.
    pub(super) content: Result<Vec<u8>, u64>,
}

/// The members of one sample.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) images: Vec<Member>,
    /// By extension.
    pub(super) texts: BTreeMap<String, Text>,
}

/// An image among the members.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) path: String,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Group {
    /// Makes the sample, if there is an image among the members.
    pub(super) fn finish(
        mut self,
        shard: &File,
        wanted: &Wanted,
        passed_over: &mut Account,
    ) -> Result<Option<Found>, DatasetError> {
        let wrong = |problem: String| {
            shard.wrong(format!("has a sample {} that can't be used: {problem}", printable(&self.name)))
        };
        let Some(image) = choose(&self.images).map_err(wrong)?.cloned() else {
            self.texts.values().for_each(|text| passed_over.note(Reason::WithoutImage, &text.path));
            return Ok(None);
        };
        self.images.retain(|other| other.path != image.path);
        self.images.iter().for_each(|other| passed_over.note(Reason::AnotherImage, &other.path));
        let candidates = self.captions(wanted).map_err(wrong)?;
        let mut label = None;
        if wanted.labels {
            label = match self.label(wanted) {
                Ok(label) => label,
                Err(Unread::Json(path, _)) => {
                    passed_over.note(Reason::UnreadableLabel, &path);
                    None
                }
                Err(Unread::Text(problem)) => return Err(wrong(problem)),
            };
        }
        let label = label.map(|label| caption_of(&candidates, label)).transpose();
        let label =
            label.map_err(|label| wrong(format!("its label '{}' is none of its captions", printable(&label))))?;
        Ok(Some(Found {
            key: format!("{}/{}", shard.key, image.path),
            location: shard.location.clone(),
            part: Some(Part::Member { offset: image.offset }),
            size: image.length,
            etag: shard.etag.clone(),
            label,
            candidates,
            pair: None,
        }))
    }

    /// The content of a text.
    fn text(&self, extension: &str) -> Result<Option<&str>, Unread> {
        let Some(Text { path, content }) = self.texts.get(extension) else { return Ok(None) };
        let path = printable(path);
        let bytes = content.as_ref().map_err(|length| {
            Unread::Text(format!("its member {path} of {length} bytes is too large for a label or captions"))
        })?;
        let text = std::str::from_utf8(bytes);
        text.map(Some).map_err(|_| Unread::Text(format!("its member {path} is not UTF-8: save it as UTF-8")))
    }

    /// The content of its .json, or null without one. Call this only if a field is needed.
    fn json(&self) -> Result<Value, Unread> {
        let Some(Text { path, .. }) = self.texts.get("json") else { return Ok(Value::Null) };
        let unread = |problem: String| Unread::Json(path.clone(), problem);
        let text = self.text("json").map_err(|error| unread(error.to_string()))?.unwrap_or_default();
        python_json::parse(text.as_bytes()).map_err(|error| unread(printable(&error.to_string())))
    }

    fn captions(&self, wanted: &Wanted) -> Result<Vec<String>, String> {
        let Some(name) = &wanted.captions else { return Ok(Vec::new()) };
        let text = self.text(name).map_err(|error| error.to_string())?;
        let captions = match text.filter(|_| name != "json") {
            Some(text) => text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect(),
            None => {
                let value = self.json().map_err(|error| error.to_string())?;
                json_captions(&value[name]).ok_or_else(|| {
                    format!("it has neither a .{name} nor a list of captions in its .json's field '{name}'")
                })?
            }
        };
        check_captions(&captions)?;
        Ok(captions)
    }

    fn label(&self, wanted: &Wanted) -> Result<Option<String>, Unread> {
        let text = |extension: &str| {
            let text = if extension == "json" { None } else { self.text(extension)? };
            Ok(text.map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned))
        };
        let field = |name: &str| Ok(json_text(&self.json()?[name]));
        match &wanted.label {
            Some(name) => text(name)?.map_or_else(|| field(name), |label| Ok(Some(label))),
            None => match text("cls")? {
                Some(label) => Ok(Some(label)),
                None => field("label")?.map_or_else(|| text("txt"), |label| Ok(Some(label))),
            },
        }
    }
}

/// The image of a sample. If there are several, the one whose whole extension is an image's.
fn choose(images: &[Member]) -> Result<Option<&Member>, String> {
    let same = |a: &Member, b: &Member| {
        let extension = |member: &Member| match extension_of(&member.path) {
            Reason::Extension(extension) if ["jpg", "jpe", "jfif"].contains(&extension.as_str()) => "jpeg".to_owned(),
            Reason::Extension(extension) => extension,
            _ => String::new(),
        };
        extension(a) == extension(b)
    };
    let clash = |a: &Member, b: &Member| {
        if a.path == b.path {
            return Err(format!(
                "its member {} is there twice: write the archive again with each member once",
                printable(&a.path)
            ));
        }
        Err(format!(
            "its members {} and {} are two images of one sample, since in WebDataset's layout names that agree up to the \
             first dot belong together: rename them so that they differ before it",
            printable(&a.path),
            printable(&b.path)
        ))
    };
    let singles: Vec<_> = images.iter().filter(|image| !is_double(&image.path)).collect();
    match (&singles[..], images) {
        ([], [first, second, ..]) => clash(first, second),
        ([], all) => Ok(all.first()),
        ([first, rest @ ..], _) => match rest.iter().find(|other| same(first, other)) {
            Some(second) => clash(first, second),
            None => Ok(Some(first)),
        },
    }
}

/// A text that can't be read.
#[derive(Debug, thiserror::Error)]
enum Unread {
    #[error("its member {} is not JSON: {}", printable(.0), .1)]
    Json(String, String),
    #[error("{0}")]
    Text(String),
}

fn json_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn json_captions(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|caption| caption.as_str().map(str::to_owned)).collect()
}

/// Whether a file has an extension before its last one, like a mask's `.seg.png`.
fn is_double(file: &str) -> bool {
    file.rsplit('/').next().unwrap_or_default().matches('.').count() > 1
}
