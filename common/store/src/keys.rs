//! Removes keys that are not valid paths, such as `a//b.png`, from a listing. [`object_store`] would refuse the whole page.
//!
//! S3 and Azure allow any text as a key, but the clients treat it as a path, which may not contain `//`, `/./`, `/../`, a slash
//! at either end, or control characters. Objects with such keys can't be requested, so they are left out, reported and counted.
//! Empty objects whose keys end in a slash stand for directories and are left out silently.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use http::Method;
use http::header::CONTENT_LENGTH;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::path::Path;
use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::Event;

use elbo_core::text::shown;

/// The most keys that are reported by name.
const EXAMPLES: usize = 3;

/// The keys that a listing passed over because they are not valid paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SkippedKeys {
    /// Their number.
    pub count: u64,
    /// A few of them, safe to print.
    pub examples: Vec<String>,
}

/// Collects the keys passed over. A key that appears on several pages counts once.
#[derive(Debug, Default)]
pub(super) struct Skipped {
    seen: Mutex<(HashSet<u64>, SkippedKeys)>,
    hasher: RandomState,
}

impl Skipped {
    pub(super) fn so_far(&self) -> SkippedKeys {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    fn note(&self, key: &str) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (known, skipped) = &mut *seen;
        if !known.insert(self.hasher.hash_one(key)) {
            return;
        }
        skipped.count += 1;
        let key = shown(key);
        if skipped.examples.len() < EXAMPLES {
            tracing::warn!(
                "the key '{key}' is passed over: it is not a valid path, since it has //, /./, /../, a slash at an end, or a control character; rename the object"
            );
            skipped.examples.push(key);
        } else if skipped.count.is_power_of_two() {
            tracing::warn!("{} keys that are not valid paths have been passed over so far", skipped.count);
        }
    }
}

/// Creates clients whose listings contain only keys that are valid paths.
#[derive(Debug)]
pub(super) struct PathsOnly(pub(super) Arc<Skipped>);

impl HttpConnector for PathsOnly {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Filter { client, skipped: Arc::clone(&self.0) }))
    }
}

#[derive(Debug)]
struct Filter {
    client: HttpClient,
    skipped: Arc<Skipped>,
}

#[async_trait]
impl HttpService for Filter {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        // The requests for a page from the clients of S3 and Google, and of Azure.
        let query = request.uri().query().unwrap_or_default();
        let lists = query.split('&').any(|part| part == "list-type=2" || part == "comp=list");
        let is_listing = request.method() == Method::GET && lists;
        let response = self.client.execute(request).await?;
        if !is_listing || !response.status().is_success() {
            return Ok(response);
        }
        let (mut parts, body) = response.into_parts();
        let page = body.bytes().await?;
        let cleaned =
            std::str::from_utf8(&page).ok().and_then(|page| without_other_keys(page, |key| self.skipped.note(key)));
        if let Some(cleaned) = &cleaned {
            parts.headers.insert(CONTENT_LENGTH, cleaned.len().into());
        }
        Ok(HttpResponse::from_parts(parts, cleaned.map_or_else(|| page.into(), Into::into)))
    }
}

/// A page of a listing without the objects whose keys are not valid paths, each of which is reported to `told`. `None` if
/// nothing was removed. A page that is not XML is left for the client to refuse.
fn without_other_keys(page: &str, mut told: impl FnMut(&str)) -> Option<String> {
    let mut reader = Reader::from_str(page);
    let (mut cleaned, mut kept) = (String::new(), 0);
    loop {
        let start = usize::try_from(reader.buffer_position()).ok()?;
        match reader.read_event().ok()? {
            Event::Start(element) if matches!(element.name().as_ref(), b"Contents" | b"Blob") => {
                let object = Object::read(&mut reader)?;
                if object.has_path() {
                    continue;
                }
                if !object.is_directory() {
                    told(&object.key);
                }
                cleaned.push_str(&page[kept..start]);
                kept = usize::try_from(reader.buffer_position()).ok()?;
            }
            Event::Eof => break,
            _ => {}
        }
    }
    (kept > 0).then(|| cleaned + &page[kept..])
}

/// An object in a page.
#[derive(Debug, Default)]
struct Object {
    key: String,
    /// Whether the page has the key encoded. Azure encodes characters that XML can't hold; other stores write them unencoded.
    is_encoded: bool,
    size: Option<u64>,
}

impl Object {
    /// Reads up to the end of the current element.
    fn read(reader: &mut Reader<&[u8]>) -> Option<Self> {
        let (mut object, mut depth) = (Self::default(), 0);
        loop {
            match reader.read_event().ok()? {
                Event::Start(element) => {
                    let name = element.name();
                    match name.as_ref() {
                        b"Key" | b"Name" if depth == 0 => {
                            let text = reader.read_text(name).ok()?;
                            let raw = text.decode().ok()?;
                            let key = unescape(&raw).ok();
                            let is_marked = element.attributes().flatten().any(|it| it.key.as_ref() == b"Encoded");
                            object.is_encoded = is_marked || key.is_none();
                            object.key = key.unwrap_or_else(|| raw.clone()).into_owned();
                        }
                        b"Size" | b"Content-Length" => {
                            let text = reader.read_text(name).ok()?;
                            object.size = text.decode().ok()?.trim().parse().ok();
                        }
                        _ => depth += 1,
                    }
                }
                Event::End(_) if depth == 0 => return Some(object),
                Event::End(_) => depth -= 1,
                Event::Eof => return None,
                _ => {}
            }
        }
    }

    /// Whether its key is a valid path.
    fn has_path(&self) -> bool {
        !self.is_encoded && Path::parse(&self.key).is_ok_and(|path| path.as_ref() == self.key)
    }

    /// Whether it stands for a directory.
    fn is_directory(&self) -> bool {
        self.size == Some(0) && self.key.ends_with('/')
    }
}

#[cfg(test)]
mod tests;
