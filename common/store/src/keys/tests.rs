//! Listing pages, as the clients of three stores read them.

use futures::TryStreamExt;
use http::StatusCode;
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;

use super::*;

/// Keys in XML: valid paths, invalid ones, and a directory.
const PATHS: [&str; 4] = ["a.png", "b &amp; c/d.png", "e%2F.png", "z.png"];
const OTHERS: [(&str, &str); 8] = [
    ("a//b.png", "a//b.png"),
    ("a/./b.png", "a/./b.png"),
    ("a/../b.png", "a/../b.png"),
    ("/lead.png", "/lead.png"),
    ("trail.png/", "trail.png/"),
    ("a&#x1;b.png", "a\\u{1}b.png"),
    ("a&#10;b&lt;.png", "a\\nb<.png"),
    ("a\u{1b}[2Jb.png", "a\\u{1b}[2Jb.png"),
];

/// Answers every request with the same page.
#[derive(Clone, Debug)]
struct Pages {
    page: String,
    skipped: Arc<Skipped>,
}

impl HttpConnector for Pages {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let (client, skipped) = (HttpClient::new(self.clone()), Arc::clone(&self.skipped));
        Ok(HttpClient::new(Filter { client, skipped }))
    }
}

#[async_trait]
impl HttpService for Pages {
    async fn call(&self, _: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut response = HttpResponse::new(self.page.clone().into());
        *response.status_mut() = StatusCode::OK;
        Ok(response)
    }
}

fn page(of_one: impl Fn(&str, u64) -> String, around: [&str; 2]) -> Pages {
    let others = OTHERS.iter().map(|(key, _)| of_one(key, 1));
    let paths = PATHS.iter().map(|key| of_one(key, 0));
    // Valid and invalid keys alternate.
    let mut objects: Vec<_> = others.chain([of_one("directory/", 0), of_one("/", 0)]).collect();
    paths.enumerate().for_each(|(i, path)| objects.insert(3 * i, path));
    let page = format!("<?xml version=\"1.0\"?>{}{}{}", around[0], objects.concat(), around[1]);
    Pages { page, skipped: Arc::default() }
}

async fn check(store: impl ObjectStore, skipped: &Skipped) {
    // A repeated key is counted once.
    for _ in 0..2 {
        let listed: Vec<_> = store.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap();
        assert_eq!(listed, PATHS.map(|key| key.replace("&amp;", "&")));
    }
    let SkippedKeys { count, examples } = skipped.so_far();
    assert_eq!(count, OTHERS.len() as u64);
    assert_eq!(examples, OTHERS[..EXAMPLES].iter().map(|(_, shown)| *shown).collect::<Vec<_>>());
    assert_eq!(OTHERS.map(|(raw, _)| shown(&unescape(raw).unwrap())), OTHERS.map(|(_, shown)| shown.to_owned()));
}

fn of_s3(key: &str, size: u64) -> String {
    let key =
        format!("<Key>{key}</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag>");
    format!("<Contents>{key}<Size>{size}</Size><Owner><ID>1</ID><DisplayName>a//b</DisplayName></Owner></Contents>")
}

#[tokio::test]
async fn keys_that_are_not_paths_are_left_out_of_s3_and_google_listings() {
    let pages = page(of_s3, ["<ListBucketResult><Name>bucket//</Name>", "</ListBucketResult>"]);
    let s3 = AmazonS3Builder::new().with_bucket_name("bucket").with_region("r").with_skip_signature(true);
    check(s3.with_http_connector(pages.clone()).build().unwrap(), &pages.skipped).await;
    let pages = Pages { skipped: Arc::default(), ..pages };
    let google = GoogleCloudStorageBuilder::new().with_bucket_name("bucket").with_skip_signature(true);
    check(google.with_http_connector(pages.clone()).build().unwrap(), &pages.skipped).await;
}

#[tokio::test]
async fn keys_that_are_not_paths_are_left_out_of_azure_listings() {
    let of_one = |key: &str, size: u64| {
        let date = "<Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT</Last-Modified><Etag>x</Etag><Content-Type>image/png</Content-Type>";
        let properties = format!("<Properties>{date}<Content-Length>{size}</Content-Length></Properties>");
        format!("<Blob><Name>{key}</Name>{properties}</Blob>")
    };
    let pages = page(of_one, ["<EnumerationResults><Blobs>", "</Blobs><NextMarker/></EnumerationResults>"]);
    let azure = MicrosoftAzureBuilder::new().with_account("account").with_container_name("container");
    let azure = azure.with_skip_signature(true).with_http_connector(pages.clone());
    check(azure.build().unwrap(), &pages.skipped).await;
    let encoded = "<Blobs><Blob><Name Encoded=\"true\">a%EF%BF%BF.png</Name></Blob></Blobs>";
    let mut told = Vec::new();
    assert_eq!(without_other_keys(encoded, |key| told.push(key.to_owned())).as_deref(), Some("<Blobs></Blobs>"));
    assert_eq!(told, ["a%EF%BF%BF.png"]);
}

#[test]
fn a_page_that_is_not_a_listing_is_unchanged() {
    for page in
        ["", "<Contents><Key>a//b</Key>", "<Contents><Key>a</Other></Contents>", "text", "<a><Key>a//b</Key></a>"]
    {
        assert_eq!(without_other_keys(page, |key| panic!("{key}")), None, "{page}");
    }
}

#[test]
fn only_a_few_of_many_keys_are_reported() {
    let skipped = Skipped::default();
    (0..1_000).for_each(|i| skipped.note(&format!("a//{i}")));
    let SkippedKeys { count, examples } = skipped.so_far();
    assert_eq!((count, examples.len()), (1_000, EXAMPLES));
}
