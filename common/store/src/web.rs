//! Compensates for missing or unusual behaviour of web servers, since the client of [`object_store`] above expects a store.
//!
//! - The server has weak tags (`W/"x"`), or different tags for compressed responses (`"x-gzip"`): both marks are removed.
//!   `If-Match`, which never matches a weak tag, is not sent; the response's tag is compared instead.
//! - It has no tags, but modification dates: a date is used as the tag if it is at least a minute old. A newer one may hide a
//!   change, or be the response's own date.
//! - It refuses HEAD, or sends no size in its response: the first byte is requested, and that response has tag and size.
//! - It responds to a range that covers the whole file with the whole file: this is treated as the range.
//! - It sends a file without its size: the size is set once the file has arrived.
//! - It sends a web page instead of a file, for example a login page: this counts as no file.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, DATE, ETAG, HeaderName, IF_MATCH, LAST_MODIFIED, RANGE,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use hyper::body::{Body, Frame, SizeHint};
use object_store::client::{
    HttpClient, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};

/// The largest response without a stated size, in bytes.
const MAX_UNSIZED: usize = 64 << 20;
/// The least age of a modification date that identifies the content (RFC 7232, section 2.2.2).
const SETTLED: Duration = Duration::from_secs(60);
/// Suffixes that servers append to the tag of a compressed response.
const CODINGS: [&str; 10] = ["--gzip", "-gzip", ";gzip", ":gzip", "-br", ";br", ":br", "-zstd", ";zstd", "-deflate"];

/// A client that compensates for what a web server leaves out.
#[derive(Debug)]
pub(super) struct Lenient(pub(super) HttpClient);

#[async_trait]
impl HttpService for Lenient {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return self.0.execute(request).await;
        }
        let listed = request.headers_mut().remove(IF_MATCH);
        let range = request.headers().get(RANGE).cloned();
        let response = match *request.method() {
            Method::HEAD => self.head(request).await?,
            _ => with_size(without_page(self.0.execute(request).await?).await?).await?,
        };
        if !response.status().is_success() {
            return Ok(response);
        }
        if listed.is_some_and(|listed| !is_same(&listed, response.headers())) {
            return Ok(answer(StatusCode::PRECONDITION_FAILED, Bytes::new()));
        }
        let response = with_plain_tag(response);
        Ok(if let Some(range) = range { whole_as_range(response, &range) } else { response })
    }
}

impl Lenient {
    /// The response to HEAD, obtained with a range request if the server does not support it.
    async fn head(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut get = request.clone();
        let response = self.0.execute(request).await?;
        let tells = match response.status() {
            StatusCode::BAD_REQUEST
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_IMPLEMENTED => false,
            status if status.is_success() => size(response.headers()).is_some_and(|size| size > 0),
            _ => true,
        };
        if tells {
            return Ok(response);
        }
        *get.method_mut() = Method::GET;
        get.headers_mut().insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let (mut parts, body) = without_page(self.0.execute(get).await?).await?.into_parts();
        let total = match parts.status {
            StatusCode::PARTIAL_CONTENT => total(&parts.headers),
            StatusCode::OK => size(&parts.headers),
            // The file is empty.
            StatusCode::RANGE_NOT_SATISFIABLE => total(&parts.headers).filter(|total| *total == 0),
            _ => return Ok(HttpResponse::from_parts(parts, body)),
        };
        // The rest of the body is not read.
        drop(body);
        parts.headers.remove(CONTENT_RANGE);
        parts.headers.remove(CONTENT_LENGTH);
        if let Some(total) = total {
            parts.status = StatusCode::OK;
            parts.headers.insert(CONTENT_LENGTH, total.into());
        }
        Ok(HttpResponse::from_parts(parts, Bytes::new().into()))
    }
}

fn answer(status: StatusCode, body: Bytes) -> HttpResponse {
    let mut response = HttpResponse::new(body.into());
    *response.status_mut() = status;
    response
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The size stated in a response.
fn size(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_LENGTH)?.trim().parse().ok()
}

/// The size of the whole file, from a partial response.
fn total(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_RANGE)?.rsplit_once('/')?.1.trim().parse().ok()
}

/// A tag without the mark of a weak tag and without the suffix of a compression.
fn plain(tag: &str) -> &str {
    let tag = tag.trim();
    let inner = tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"');
    CODINGS.iter().find_map(|coding| inner.strip_suffix(coding)).unwrap_or(inner)
}

/// The modification date, if it is old enough to identify the content.
fn settled_date(headers: &HeaderMap) -> Option<&str> {
    let changed = text(headers, LAST_MODIFIED)?;
    let at = httpdate::parse_http_date(changed).ok()?;
    let answered = text(headers, DATE).and_then(|date| httpdate::parse_http_date(date).ok());
    let is_settled = answered.is_none_or(|answered| answered.duration_since(at).is_ok_and(|age| age >= SETTLED));
    is_settled.then_some(changed)
}

/// The tag that later responses are compared with.
fn plain_tag(headers: &HeaderMap) -> Option<&str> {
    text(headers, ETAG).map(plain).or_else(|| settled_date(headers))
}

/// Whether a response has the content with this tag. A response without a tag counts as the same.
fn is_same(listed: &HeaderValue, headers: &HeaderMap) -> bool {
    let Ok(listed) = listed.to_str() else { return true };
    let listed = plain(listed);
    let found = if httpdate::parse_http_date(listed).is_ok() {
        text(headers, LAST_MODIFIED)
    } else {
        text(headers, ETAG).map(plain)
    };
    found.is_none_or(|found| found == listed)
}

fn with_plain_tag(mut response: HttpResponse) -> HttpResponse {
    let tag = plain_tag(response.headers()).and_then(|tag| HeaderValue::try_from(format!("\"{tag}\"")).ok());
    if let Some(tag) = tag {
        response.headers_mut().insert(ETAG, tag);
    }
    response
}

/// Turns a response with the whole file into one to a range request that covers the whole file.
fn whole_as_range(mut response: HttpResponse, range: &HeaderValue) -> HttpResponse {
    let asked = range.to_str().ok().and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (StatusCode::OK, Some((first, last)), Some(size)) = (response.status(), asked, size(response.headers())) else {
        return response;
    };
    let reaches = |end: u64| end >= size;
    let is_whole = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(0), Ok(last)) => reaches(last.saturating_add(1)),
        (Ok(0), Err(_)) => last.is_empty(),
        (Err(_), Ok(suffix)) => first.is_empty() && reaches(suffix),
        _ => false,
    };
    if is_whole && let Some(end) = size.checked_sub(1) {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let told = HeaderValue::try_from(format!("bytes 0-{end}/{size}"));
        response.headers_mut().extend(told.ok().map(|told| (CONTENT_RANGE, told)));
    }
    response
}

/// Adds the size to a response that lacks it.
async fn with_size(response: HttpResponse) -> Result<HttpResponse, HttpError> {
    if response.headers().contains_key(CONTENT_LENGTH) || !response.status().is_success() {
        return Ok(response);
    }
    let (mut parts, body) = response.into_parts();
    let (mut stream, mut all) = (body.bytes_stream(), BytesMut::new());
    while let Some(bytes) = stream.next().await {
        all.extend_from_slice(&bytes?);
        if all.len() > MAX_UNSIZED {
            let problem = format!("the server tells no size (Content-Length), and sends more than {MAX_UNSIZED} bytes");
            return Err(HttpError::new(HttpErrorKind::Decode, std::io::Error::other(problem)));
        }
    }
    parts.headers.insert(CONTENT_LENGTH, all.len().into());
    Ok(HttpResponse::from_parts(parts, all.freeze().into()))
}

/// Refuses a response that is a web page. A file may be labelled as one by mistake, so its beginning is checked.
async fn without_page(response: HttpResponse) -> Result<HttpResponse, HttpError> {
    let kind = text(response.headers(), CONTENT_TYPE).unwrap_or_default();
    let is_called_page = ["text/html", "application/xhtml"].iter().any(|page| kind.starts_with(page));
    if !is_called_page || !response.status().is_success() {
        return Ok(response);
    }
    let (parts, mut body) = response.into_parts();
    let first = loop {
        match std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.transpose()? {
            None => break Bytes::new(),
            Some(frame) => match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => break data,
                Err(_) => {}
            },
        }
    };
    let start = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&first).trim_ascii_start();
    if start.starts_with(b"<") {
        let told = "a web page came in place of the file: perhaps a login page, or one that says what is wrong";
        return Ok(answer(StatusCode::NOT_FOUND, Bytes::from_static(told.as_bytes())));
    }
    Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(Rejoined { first: Some(first), rest: body })))
}

/// A body whose first bytes were already read.
#[derive(Debug)]
struct Rejoined {
    first: Option<Bytes>,
    rest: HttpResponseBody,
}

impl Body for Rejoined {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        match self.first.take() {
            Some(first) => Poll::Ready(Some(Ok(Frame::data(first)))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests;
