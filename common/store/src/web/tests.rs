//! Various behaviours of web servers, as the client of a store sees them.

use std::sync::{Arc, Mutex};

use object_store::client::HttpConnector;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, RetryConfig};

use super::*;

const CONTENT: &[u8] = b"0123456789";
const DATE_OF_CHANGE: &str = "Wed, 21 Oct 2015 07:28:00 GMT";

/// A server, and the requests it got.
#[derive(Clone, Debug)]
struct Server {
    answer: fn(&HttpRequest) -> HttpResponse,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(answer: fn(&HttpRequest) -> HttpResponse) -> Self {
        Self { answer, asked: Arc::default() }
    }

    fn store(&self) -> impl ObjectStore {
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let builder = HttpBuilder::new().with_url("http://host/").with_http_connector(self.clone()).with_retry(retry);
        builder.build().unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl HttpConnector for Server {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Lenient(HttpClient::new(self.clone()))))
    }
}

#[async_trait]
impl HttpService for Server {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let range = request.headers().get(RANGE).map_or("", |range| range.to_str().unwrap());
        self.asked.lock().unwrap().push(format!("{} {range}", request.method()).trim().to_owned());
        assert!(!request.headers().contains_key(IF_MATCH), "a weak tag meets no condition");
        Ok((self.answer)(&request))
    }
}

/// The whole content or the requested range, with additional headers.
fn served(request: &HttpRequest, headers: &[(HeaderName, &str)]) -> HttpResponse {
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().unwrap().strip_prefix("bytes="));
    let mut response = match range.map(|range| range.split_once('-').unwrap()) {
        None => answer(StatusCode::OK, Bytes::from_static(CONTENT)),
        Some((first, last)) => {
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            let last = last.min(CONTENT.len() - 1);
            let mut part = answer(StatusCode::PARTIAL_CONTENT, Bytes::from_static(&CONTENT[first..=last]));
            let told = format!("bytes {first}-{last}/{}", CONTENT.len());
            part.headers_mut().insert(CONTENT_RANGE, told.parse().unwrap());
            part.headers_mut().insert(CONTENT_LENGTH, (last + 1 - first).into());
            part
        }
    };
    response.headers_mut().entry(CONTENT_LENGTH).or_insert(CONTENT.len().into());
    for (name, value) in headers {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    if request.method() == Method::HEAD {
        *response.body_mut() = Bytes::new().into();
    }
    response
}

fn refused(status: StatusCode) -> HttpResponse {
    let mut response = answer(status, Bytes::from_static(b"no"));
    response.headers_mut().insert(CONTENT_LENGTH, 2.into());
    response
}

fn key() -> Path {
    Path::from("a.png")
}

async fn read(store: &impl ObjectStore, tag: Option<&str>) -> object_store::Result<Bytes> {
    let options = GetOptions { if_match: tag.map(str::to_owned), ..GetOptions::default() };
    store.get_opts(&key(), options).await?.bytes().await
}

#[tokio::test]
async fn weak_tags_and_tags_of_compressed_responses_are_compared_by_content() {
    let weak = Server::new(|request| served(request, &[(ETAG, "W/\"abc-gzip\"")])).store();
    let tag = weak.head(&key()).await.unwrap().e_tag;
    assert_eq!(tag.as_deref(), Some("\"abc\""));
    for listed in ["\"abc\"", "W/\"abc\"", "\"abc-gzip\"", "W/\"abc;br\"", "abc"] {
        assert_eq!(read(&weak, Some(listed)).await.unwrap(), CONTENT, "{listed}");
    }
    for other in ["\"abd\"", "W/\"ab\"", DATE_OF_CHANGE] {
        let changed = read(&weak, Some(other)).await;
        // There is no date to compare.
        assert_eq!(changed.is_ok(), other == DATE_OF_CHANGE, "{other}");
        assert!(matches!(changed, Ok(_) | Err(object_store::Error::Precondition { .. })));
    }
}

#[tokio::test]
async fn without_tags_a_settled_modification_date_is_the_tag() {
    let now = ("Wed, 21 Oct 2015 07:28:30 GMT", None);
    let later = ("Sun, 06 Nov 2044 08:49:37 GMT", Some(format!("\"{DATE_OF_CHANGE}\"")));
    for (answered, tag) in [now, later] {
        let server = match tag {
            Some(_) => {
                Server::new(|r| served(r, &[(LAST_MODIFIED, DATE_OF_CHANGE), (DATE, "Sun, 06 Nov 2044 08:49:37 GMT")]))
            }
            None => {
                Server::new(|r| served(r, &[(LAST_MODIFIED, DATE_OF_CHANGE), (DATE, "Wed, 21 Oct 2015 07:28:30 GMT")]))
            }
        };
        assert_eq!(server.store().head(&key()).await.unwrap().e_tag, tag, "{answered}");
    }
    let store = Server::new(|request| served(request, &[(LAST_MODIFIED, DATE_OF_CHANGE)])).store();
    assert_eq!(read(&store, Some(&format!("\"{DATE_OF_CHANGE}\""))).await.unwrap(), CONTENT);
    let changed = read(&store, Some("\"Wed, 21 Oct 2015 07:28:01 GMT\"")).await;
    assert!(matches!(changed, Err(object_store::Error::Precondition { .. })));
    // A server with neither can't be checked for changes.
    let silent = Server::new(|request| served(request, &[])).store();
    assert_eq!(silent.head(&key()).await.unwrap().e_tag, None);
    assert_eq!(read(&silent, Some("\"abc\"")).await.unwrap(), CONTENT);
}

#[tokio::test]
async fn if_head_is_refused_the_first_byte_gives_size_and_tag() {
    let servers: [fn(&HttpRequest) -> HttpResponse; 6] = [
        |request| head_is(request, StatusCode::METHOD_NOT_ALLOWED),
        |request| head_is(request, StatusCode::FORBIDDEN),
        |request| head_is(request, StatusCode::NOT_IMPLEMENTED),
        |request| head_is(request, StatusCode::NOT_FOUND),
        // HEAD succeeds, but without a size.
        |request| {
            let mut response = served(request, &[(ETAG, "\"abc\"")]);
            if request.method() == Method::HEAD {
                response.headers_mut().remove(CONTENT_LENGTH);
            }
            response
        },
        // Ranges are not supported either.
        |request| {
            if request.method() == Method::HEAD {
                return refused(StatusCode::METHOD_NOT_ALLOWED);
            }
            let mut plain = request.clone();
            plain.headers_mut().remove(RANGE);
            served(&plain, &[(ETAG, "\"abc\"")])
        },
    ];
    for answer in servers {
        let server = Server::new(answer);
        let meta = server.store().head(&key()).await.unwrap();
        assert_eq!((meta.size, meta.e_tag.as_deref()), (10, Some("\"abc\"")));
        assert_eq!(server.asked(), ["HEAD", "GET bytes=0-0"]);
    }
    let empty = Server::new(|request| match *request.method() {
        Method::HEAD => refused(StatusCode::METHOD_NOT_ALLOWED),
        _ => {
            let mut response = refused(StatusCode::RANGE_NOT_SATISFIABLE);
            response.headers_mut().insert(CONTENT_RANGE, HeaderValue::from_static("bytes */0"));
            response
        }
    });
    assert_eq!(empty.store().head(&key()).await.unwrap().size, 0);
    let missing = Server::new(|_| refused(StatusCode::NOT_FOUND)).store();
    assert!(matches!(missing.head(&key()).await, Err(object_store::Error::NotFound { .. })));
    let denied = Server::new(|_| refused(StatusCode::FORBIDDEN)).store();
    assert!(matches!(denied.head(&key()).await, Err(object_store::Error::PermissionDenied { .. })));
}

fn head_is(request: &HttpRequest, status: StatusCode) -> HttpResponse {
    if request.method() == Method::HEAD { refused(status) } else { served(request, &[(ETAG, "\"abc\"")]) }
}

#[tokio::test]
async fn a_server_without_ranges_is_reported_unless_the_whole_file_was_requested() {
    let server = Server::new(|request| {
        let mut plain = request.clone();
        plain.headers_mut().remove(RANGE);
        served(&plain, &[])
    });
    let store = server.store();
    assert_eq!(store.get_range(&key(), 0..10).await.unwrap(), CONTENT);
    let source = store.get_range(&key(), 2..4).await.unwrap_err();
    let error = crate::StoreError::Object { action: "reading", path: "http://host/a.tar".into(), source };
    assert!(!error.is_transient());
    let error = error.to_string();
    assert!(error.contains("the server sends whole files") && error.contains("as files of their own"), "{error}");
}

#[tokio::test]
async fn an_answer_without_a_size_gets_one() {
    let server = Server::new(|request| {
        let mut response = served(request, &[]);
        response.headers_mut().remove(CONTENT_LENGTH);
        response
    });
    assert_eq!(read(&server.store(), None).await.unwrap(), CONTENT);
    assert_eq!(server.store().get_range(&key(), 2..4).await.unwrap(), &CONTENT[2..4]);
}

#[tokio::test]
async fn a_page_instead_of_a_file_is_refused_and_a_file_labelled_as_a_page_is_accepted() {
    let login = Server::new(|_| {
        let mut response = answer(StatusCode::OK, Bytes::from_static(b"\n<!DOCTYPE html><html>Log in</html>"));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        response.headers_mut().insert(CONTENT_LENGTH, 35.into());
        response
    });
    let store = login.store();
    for error in [read(&store, Some("\"abc\"")).await, store.get_range(&key(), 2..4).await].map(Result::unwrap_err) {
        assert!(matches!(error, object_store::Error::NotFound { .. }), "{error}");
        assert!(error.to_string().contains("a web page came in place of the file"), "{error}");
    }
    let untyped = Server::new(|request| served(request, &[(CONTENT_TYPE, "text/html")])).store();
    assert_eq!(read(&untyped, None).await.unwrap(), CONTENT);
}
