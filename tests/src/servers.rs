//! Object stores on loopback for tests: moto's S3, s3s-fs and Azurite. Their packages are installed below `target/` at first
//! use. The servers end with the test, even if the test is killed.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tempfile::TempDir;

use crate::{free_address, python, root, run_ok};

/// The access key that every test server accepts.
pub const KEY: &str = "AKIATESTTESTTEST";
/// The secret of that key. Tests check that it does not leak.
pub const SECRET: &str = "planted-secret-0123456789";
const BUCKET: &str = "corpus";

/// A bucket or container on a test server, and how `elbo` reaches it.
#[derive(Debug)]
pub struct Bucket {
    /// Its URL, such as `s3://corpus`.
    pub url: String,
    /// The environment variables for reaching it.
    pub variables: Vec<(&'static str, String)>,
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
}

impl Bucket {
    fn new(url: &str, variables: Vec<(&'static str, String)>, store: impl ObjectStore) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { url: url.to_owned(), variables, store: Arc::new(store), runtime }
    }

    /// A bucket of an S3 server.
    fn s3(endpoint: &str) -> Self {
        elbo_store::tls::use_ring();
        let builder = AmazonS3Builder::new().with_bucket_name(BUCKET).with_endpoint(endpoint).with_allow_http(true);
        let store = builder.with_access_key_id(KEY).with_secret_access_key(SECRET).build().expect("a client");
        Self::new(&format!("s3://{BUCKET}"), s3_variables(endpoint), store)
    }

    /// A command with these variables set and all other storage variables removed.
    pub fn on(&self, command: Command) -> Command {
        with_variables(command, &self.variables)
    }

    /// Uploads the files below a directory.
    pub fn upload(&self, directory: &Path, prefix: &str) {
        for file in files(directory) {
            let below = file.strip_prefix(directory).expect("below").to_string_lossy().into_owned();
            let bytes = std::fs::read(&file).expect("reading");
            let key = Key::from(format!("{prefix}/{below}"));
            self.runtime.block_on(self.store.put(&key, bytes.into())).expect("uploading");
        }
    }

    /// The keys below a prefix, without it.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let at = Key::from(prefix);
        let listed = self.store.list(Some(&at)).map_ok(|meta| meta.location.to_string()).try_collect::<Vec<_>>();
        let mut keys = self.runtime.block_on(listed).expect("listing");
        keys.sort();
        keys.into_iter().map(|key| key[prefix.len()..].trim_start_matches('/').to_owned()).collect()
    }

    /// An object's content.
    pub fn get(&self, key: &str) -> Vec<u8> {
        let key = Key::from(key);
        let got = async { self.store.get(&key).await?.bytes().await };
        self.runtime.block_on(got).unwrap_or_else(|e| panic!("{key}: {e}")).to_vec()
    }

    /// Every object below a prefix.
    pub fn download(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let keys = self.keys(prefix);
        keys.into_iter().map(|key| (key.clone(), self.get(&format!("{prefix}/{key}")))).collect()
    }

    /// The predictions, errors and quarantine of an output, as [`crate::results`] returns them for a directory.
    pub fn results(&self, out: &str) -> Vec<(String, Vec<u8>)> {
        let of = |part: &str| {
            let found = self.download(&format!("{out}/{part}")).into_iter();
            found.map(|(key, bytes)| (format!("{part}/{key}"), bytes)).collect::<Vec<_>>()
        };
        ["predictions", "errors", "quarantine"].iter().flat_map(|part| of(part)).collect()
    }
}

/// The variables of an S3 endpoint with the test key.
pub fn s3_variables(endpoint: &str) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
    ]
}

/// A command with only these storage settings, whatever the environment of the tests has.
pub fn with_variables(mut command: Command, variables: &[(&'static str, String)]) -> Command {
    let foreign = |name: &str| ["AWS_", "AZURE_", "GOOGLE_"].iter().any(|prefix| name.starts_with(prefix));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(foreign) {
            command.env_remove(name);
        }
    }
    // Also ignore the profiles of the person who runs the tests.
    command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = crate::sorted(directory).into_iter();
    entries.flat_map(|entry| if entry.is_dir() { files(&entry) } else { vec![entry] }).collect()
}

/// A server process that ends when its standard input closes, at the latest when this process ends.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starting a server"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// moto's S3 server, in memory. It accepts any key.
#[derive(Debug)]
pub struct Moto {
    /// Its endpoint.
    pub endpoint: String,
    _server: Server,
}

impl Moto {
    /// Starts it, with an empty bucket.
    pub fn start() -> Self {
        let mut server =
            Server::start(Command::new(python("servers/requirements.txt")).arg(tests("servers/serve_moto.py")));
        let mut port = String::new();
        let output = server.0.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut port).expect("moto's port");
        let endpoint = format!("http://127.0.0.1:{}", port.trim());
        make_bucket(&endpoint);
        Self { endpoint, _server: server }
    }

    /// Its bucket.
    pub fn bucket(&self) -> Bucket {
        Bucket::s3(&self.endpoint)
    }

    /// Its bucket, reached through another endpoint such as a proxy.
    pub fn bucket_through(&self, endpoint: &str) -> Bucket {
        Bucket { variables: s3_variables(endpoint), ..self.bucket() }
    }
}

fn make_bucket(endpoint: &str) {
    // object_store can't create buckets; moto creates one on any such request.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    elbo_store::tls::use_ring();
    let made = reqwest::Client::new().put(format!("{endpoint}/{BUCKET}")).send();
    let answer = runtime.block_on(made).expect("an answer");
    assert!(answer.status().is_success(), "{answer:?}");
}

/// s3s-fs within this process: S3 over a directory. It checks signatures.
#[derive(Debug)]
pub struct S3sFs {
    /// Its endpoint.
    pub endpoint: String,
    _directory: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl S3sFs {
    /// Starts it with an empty bucket. s3s-fs checks whether an object exists and then writes it, so concurrent puts may all
    /// find no object. With `atomic`, puts run one at a time, which makes conditional puts correct. Without it, all puts that
    /// arrive within the same 50 ms run together, as on a busy server.
    pub fn start(atomic: bool) -> Self {
        let directory = TempDir::new().expect("a directory");
        std::fs::create_dir(directory.path().join(BUCKET)).expect("the bucket");
        let files = s3s_fs::FileSystem::new(directory.path()).expect("its directory");
        let mut builder = s3s::service::S3ServiceBuilder::new(files);
        builder.set_auth(s3s::auth::SimpleAuth::from_single(KEY, SECRET));
        let service = builder.build();
        let (turn, began) = (Arc::new(tokio::sync::Mutex::new(())), Instant::now());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (service, turn) = (service.clone(), Arc::clone(&turn));
                let answer = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                    let (service, turn) = (service.clone(), Arc::clone(&turn));
                    async move {
                        let writes = atomic && request.method() == hyper::Method::PUT;
                        if !atomic && request.method() == hyper::Method::PUT {
                            let since = began.elapsed().as_millis() as u64 % 50;
                            tokio::time::sleep(Duration::from_millis(50 - since)).await;
                        }
                        let _mine = if writes { Some(turn.lock().await) } else { None };
                        hyper::service::Service::call(&service, request).await
                    }
                });
                tokio::spawn(async move {
                    let http = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                    let _ = http.serve_connection(hyper_util::rt::TokioIo::new(stream), answer).await;
                });
            }
        });
        Self { endpoint, _directory: directory, _runtime: runtime }
    }

    /// Its bucket.
    pub fn bucket(&self) -> Bucket {
        Bucket::s3(&self.endpoint)
    }
}

/// Azurite's blob service, in memory.
#[derive(Debug)]
pub struct Azurite {
    endpoint: String,
    _server: Server,
}

/// Azurite's one account.
const ACCOUNT: &str = "devstoreaccount1";
/// Its key, which is public.
pub const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

impl Azurite {
    /// Starts it, with an empty container.
    pub fn start() -> Self {
        let address = free_address();
        let (host, port) = address.split_once(':').expect("host and port");
        let mut command = Command::new("node");
        command.arg(tests("servers/serve_azurite.js")).args([
            azurite().as_os_str(),
            BUCKET.as_ref(),
            AZURITE_KEY.as_ref(),
        ]);
        command.args(["--blobHost", host, "--blobPort", port]);
        command.args(["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]);
        let mut server = Server::start(&mut command);
        let mut ready = String::new();
        let output = server.0.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut ready).expect("Azurite's answer");
        assert_eq!(ready.trim(), "ready", "Azurite does not start");
        Self { endpoint: format!("http://{address}/{ACCOUNT}"), _server: server }
    }

    fn client(&self) -> object_store::azure::MicrosoftAzure {
        elbo_store::tls::use_ring();
        let builder = MicrosoftAzureBuilder::new().with_account(ACCOUNT).with_access_key(AZURITE_KEY);
        let builder = builder.with_endpoint(self.endpoint.clone()).with_allow_http(true).with_container_name(BUCKET);
        builder.build().expect("a client")
    }

    /// Its container, reached by a connection string.
    pub fn bucket(&self) -> Bucket {
        let text = format!("AccountName={ACCOUNT};AccountKey={AZURITE_KEY};BlobEndpoint={}", self.endpoint);
        let variables = vec![("AZURE_STORAGE_CONNECTION_STRING", text), ("AZURE_ALLOW_HTTP", "true".into())];
        Bucket::new(&format!("az://{BUCKET}"), variables, self.client())
    }
}

/// Azurite's program, installed by npm at first use.
fn azurite() -> PathBuf {
    const VERSION: &str = "azurite@3.35.0";
    let prefix = root().join("target/node/azurite");
    let (program, stamp) = (prefix.join("node_modules/azurite/dist/src/blob/main.js"), prefix.join("installed.txt"));
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(VERSION) {
        for needed in ["node", "npm"] {
            let found = Command::new(needed).arg("--version").stdout(Stdio::null()).status();
            assert!(
                found.is_ok_and(|status| status.success()),
                "the test against Azurite needs Node.js: install it, so that `{needed} --version` works"
            );
        }
        let mut install = Command::new("npm");
        install.args(["install", "--no-audit", "--no-fund", "--prefix"]).arg(&prefix).arg(VERSION);
        run_ok(&mut install);
        std::fs::write(&stamp, VERSION).expect("the stamp");
    }
    program
}

fn tests(path: &str) -> PathBuf {
    root().join("tests").join(path)
}
