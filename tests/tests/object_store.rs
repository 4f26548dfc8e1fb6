//! Whole jobs on object storage with real processes: images, model, output and ledger on moto's S3, s3s-fs and Azurite.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use elbo_output::predictions::{decode_errors, decode_predictions};
use elbo_tests::patience::{seconds, wait_until};
use elbo_tests::proxy::{Fault, Proxy};
use elbo_tests::servers::{AZURITE_KEY, Azurite, Bucket, KEY, Moto, S3sFs, SECRET, s3_variables, with_variables};
use elbo_tests::web::{Site, Web};
use elbo_tests::{
    Process, coordinator_flags, elbo, free_address, job_flags, json, model, results, run, run_ok, some_images, stderr,
    with,
};
use sha1::{Digest, Sha1};
use tempfile::TempDir;

type Files = Vec<(String, Vec<u8>)>;

/// The rows of predictions and errors without the fingerprint in their metadata: it covers the images' entity tags, which
/// differ between stores.
fn rows(files: &Files) -> Vec<String> {
    let row = |(name, bytes): &(String, Vec<u8>)| {
        let bytes = bytes.clone().into();
        if name.starts_with("errors") {
            format!("{name}: {:?}", decode_errors(bytes).unwrap())
        } else {
            format!("{name}: {:?}", decode_predictions(bytes).unwrap())
        }
    };
    files.iter().map(row).collect()
}

/// The bytes of the first output on a bucket; all later outputs there must have the same.
fn first_of(bucket: &Bucket, found: &Files) -> Files {
    static FIRST: Mutex<BTreeMap<String, Files>> = Mutex::new(BTreeMap::new());
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    first.entry(format!("{:?}", bucket.variables)).or_insert_with(|| found.clone()).clone()
}

/// One moto server for all tests here; it ends with this process.
fn moto() -> &'static Moto {
    static MOTO: OnceLock<Moto> = OnceLock::new();
    MOTO.get_or_init(|| {
        let moto = Moto::start();
        corpus(&moto.bucket());
        moto
    })
}

static IMAGES: LazyLock<TempDir> = LazyLock::new(|| some_images(3));

/// Uploads images and model to a bucket.
fn corpus(bucket: &Bucket) {
    bucket.upload(IMAGES.path(), "images");
    bucket.upload(&model(), "model");
}

/// The results of the job in a local directory.
static EXPECTED: LazyLock<Files> = LazyLock::new(|| {
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    run_ok(
        elbo().arg("label").args(with(job_flags(IMAGES.path(), &out), &[("--shard-size", "10")])).arg("--write-errors"),
    );
    let expected = results(&out);
    // Three shards with predictions and errors.
    assert_eq!(expected.len(), 6);
    expected
});

/// The job on a bucket, its output under `out`.
struct Job<'a> {
    bucket: &'a Bucket,
    out: &'a str,
    cache: TempDir,
}

impl<'a> Job<'a> {
    fn new(bucket: &'a Bucket, out: &'a str) -> Self {
        Self { bucket, out, cache: TempDir::new().unwrap() }
    }

    fn url(&self) -> String {
        format!("{}/{}", self.bucket.url, self.out)
    }

    fn flags(&self, of: fn(&Path, &Path) -> Vec<String>) -> Vec<String> {
        let images = PathBuf::from(format!("{}/images", self.bucket.url));
        let model = format!("{}/model", self.bucket.url);
        with(of(&images, Path::new(&self.url())), &[("--model", &model), ("--shard-size", "10")])
    }

    fn command(&self) -> Command {
        let mut command = self.bucket.on(elbo());
        command.env("ELBO_CACHE", self.cache.path());
        command
    }

    fn label(&self) -> Command {
        let mut command = self.command();
        command.arg("label").args(self.flags(job_flags)).args(["--workers", "2", "--write-errors"]);
        command
    }

    /// Checks the bytes of an output and the commands that read it.
    fn check(&self) {
        let found = self.bucket.results(self.out);
        assert!(rows(&found) == rows(&EXPECTED), "{}: the rows differ from those in a directory", self.url());
        assert!(found == first_of(self.bucket, &found), "{}: the bytes differ from another output's", self.url());
        let ask = |command: &str| json(self.command().args([command, "--json"]).arg(self.url()));
        let verified = ask("verify");
        assert_eq!((verified["ok"].as_bool(), verified["predictions"].as_u64()), (Some(true), Some(30)));
        assert_eq!(ask("report")["evaluations_recomputed"], 0);
        assert_eq!(ask("status")["state"], "done");
        assert!(self.bucket.keys(&format!("{}/preflight", self.out)).is_empty());
        for (key, bytes) in self.bucket.download(self.out) {
            assert_clean(&key, &bytes);
        }
    }
}

/// Asserts that no secret is in written files or messages.
#[track_caller]
fn assert_clean(what: &str, bytes: &[u8]) {
    for secret in [SECRET, AZURITE_KEY, "hush"] {
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{what} contains a secret");
    }
}

/// Runs the whole job in one process, and with a coordinator and two workers.
fn whole_job(bucket: &Bucket) {
    let one = Job::new(bucket, "one");
    // With the most detailed logs.
    let said = run_ok(one.label().env("ELBO_LOG", "trace,h2=info,hyper=info"));
    assert!(said.stderr.len() > 10_000);
    assert_clean("the log", &said.stderr);
    assert_clean("the report", &said.stdout);
    one.check();

    let cluster = Job::new(bucket, "cluster");
    let address = free_address();
    let mut command = cluster.command();
    command.arg("coordinator").args(cluster.flags(coordinator_flags)).args(["--write-errors", "--listen", &address]);
    let mut coordinator = Process::start(&mut command);
    let worker = || {
        let mut command = cluster.command();
        command.args(["worker", "--threads", "1", "--batch", "16", "--coordinator", &format!("http://{address}")]);
        Process::start(&mut command)
    };
    let mut workers = [worker(), worker()];
    assert_eq!(coordinator.wait(), Some(0));
    for worker in &mut workers {
        assert_eq!(worker.wait(), Some(0));
    }
    cluster.check();
}

#[test]
fn the_whole_job_on_moto() {
    whole_job(&moto().bucket());
}

#[test]
fn the_whole_job_on_s3s_fs() {
    let server = S3sFs::start(true);
    corpus(&server.bucket());
    whole_job(&server.bucket());
}

#[test]
fn the_whole_job_on_azurite() {
    let server = Azurite::start();
    corpus(&server.bucket());
    whole_job(&server.bucket());
}

#[test]
fn a_killed_job_resumes_on_s3() {
    let bucket = moto().bucket();
    let job = Job::new(&bucket, "killed");
    // The first process dies soon after the ledger is created, the second once a shard is committed.
    for (begun, dies_after) in [("ledger/wal", 300), ("predictions", 0)] {
        let mut process = Process::start(&mut job.label());
        let has_come = || {
            assert!(process.is_running(), "{begun} never comes");
            !bucket.keys(&format!("killed/{begun}")).is_empty()
        };
        wait_until(|| format!("{begun} never comes"), has_come);
        std::thread::sleep(Duration::from_millis(dies_after));
        process.kill();
    }
    assert!(!String::from_utf8_lossy(&bucket.get("killed/job.json")).contains("\"done\""), "it was killed too late");
    run_ok(&mut job.label());
    job.check();
}

#[test]
fn occasional_network_failures_change_no_byte() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in [1, 2] {
        let proxy = Proxy::start(&moto().endpoint, seed, 12);
        let bucket = moto().bucket_through(&proxy.endpoint);
        let out = format!("faults-{seed}");
        run_ok(&mut Job::new(&bucket, &out).label());
        seen.extend(proxy.injected());
        Job::new(&moto().bucket(), &out).check();
    }
    let all =
        [Fault::SlowDown, Fault::Internal, Fault::Refused, Fault::LostReply, Fault::Lied, Fault::CutOff, Fault::Delay];
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), all, "every fault must have occurred");
}

/// Runs a command that must soon fail with code 1, with a message that contains all of `words` and no secret.
#[track_caller]
fn fails(command: &mut Command, within: u64, words: &[&str]) {
    let started = Instant::now();
    let output = run(command);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(started.elapsed() < seconds(within), "after {:?}: {message}", started.elapsed());
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
    assert_clean("the message", &output.stderr);
    assert!(!message.contains("panicked"), "{message}");
}

/// `elbo label` of local images with an output at another location.
fn label_to(out: &str, variables: &[(&'static str, String)]) -> Command {
    let mut command = with_variables(elbo(), variables);
    command.arg("label").args(job_flags(IMAGES.path(), Path::new(out)));
    command
}

#[test]
fn a_store_whose_conditional_puts_are_not_atomic_is_refused_before_anything_is_computed() {
    let server = S3sFs::start(false);
    let bucket = server.bucket();
    let words = ["s3://corpus/out can't hold a job", "not checked atomically", "two coordinators", "Give --out on"];
    fails(&mut label_to("s3://corpus/out", &bucket.variables), 20, &words);
    assert!(bucket.keys("out").is_empty(), "it must leave nothing behind");
    let mut variables = moto().bucket().variables;
    variables.push(("AWS_CONDITIONAL_PUT", "disabled".into()));
    fails(&mut label_to("s3://corpus/none", &variables), 20, &["no conditional puts"]);
}

#[test]
fn wrong_buckets_and_keys_are_reported_soon() {
    let variables = moto().bucket().variables;
    let no_bucket = ["s3://nosuchbucket/out", "no such bucket"];
    fails(&mut label_to("s3://nosuchbucket/out", &variables), 20, &no_bucket);
    fails(with_variables(elbo(), &variables).args(["report", "s3://nosuchbucket/out"]), 20, &no_bucket);
    fails(
        with_variables(elbo(), &variables).args(["report", "s3://corpus/none"]),
        20,
        &["s3://corpus/none", "job.json"],
    );

    let server = S3sFs::start(true);
    let mut wrong_key = server.bucket().variables;
    wrong_key.retain(|(name, _)| *name != "AWS_SECRET_ACCESS_KEY");
    wrong_key.push(("AWS_SECRET_ACCESS_KEY", "hush".into()));
    fails(&mut label_to("s3://corpus/out", &wrong_key), 20, &["s3://corpus/out", "refuses these credentials"]);

    // No server listens on the discard port.
    let nowhere = s3_variables("http://127.0.0.1:9");
    let words = ["trying again for up to 1", "s3://corpus/out", "check the endpoint"];
    fails(&mut label_to("s3://corpus/out", &nowhere), 45, &words);
    let plain: Vec<_> = nowhere.into_iter().filter(|(name, _)| *name != "AWS_ALLOW_HTTP").collect();
    fails(
        &mut label_to("s3://corpus/out", &plain),
        20,
        &["http://127.0.0.1:9 is not encrypted", "AWS_ALLOW_HTTP=true"],
    );
    let no_keys = [("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9".to_owned())];
    fails(&mut label_to("s3://corpus/out", &no_keys), 45, &["no credentials were found", "AWS_PROFILE"]);
}

#[test]
fn credentials_in_urls_appear_in_no_message() {
    let variables = moto().bucket().variables;
    fails(&mut label_to("s3://id:hush@corpus/out", &variables), 20, &["s3://corpus/out", "environment"]);
    fails(&mut label_to("s3://corpus/out?X-Amz-Signature=hush", &variables), 20, &["environment"]);
    let mut list = with_variables(elbo(), &variables);
    let images = Path::new("http://user:hush@127.0.0.1:9/list.txt?sig=hush");
    list.arg("label").args(job_flags(images, &TempDir::new().unwrap().path().join("out")));
    fails(&mut list, 90, &["http://127.0.0.1:9/list.txt"]);
}

#[test]
fn keys_and_endpoint_come_from_a_profile() {
    let files = TempDir::new().unwrap();
    let (keys, config) = (files.path().join("credentials"), files.path().join("config"));
    std::fs::write(&keys, format!("[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")).unwrap();
    std::fs::write(&config, format!("[profile lab]\nregion = eu-west-1\nendpoint_url = {}\n", moto().endpoint))
        .unwrap();
    let command = |arguments: &[&str]| {
        let mut command = with_variables(elbo(), &[("AWS_ALLOW_HTTP", "true".into()), ("AWS_PROFILE", "lab".into())]);
        command.env("AWS_SHARED_CREDENTIALS_FILE", &keys).env("AWS_CONFIG_FILE", &config).args(arguments);
        command
    };
    let flags = job_flags(IMAGES.path(), Path::new("s3://corpus/profile"));
    let flags = with(flags, &[("--keep", "1"), ("--samples", "1")]);
    let mut label = command(&["label"]);
    assert_clean("the log", &run_ok(label.args(flags).env("ELBO_LOG", "debug")).stderr);
    assert_eq!(json(&mut command(&["verify", "--json", "s3://corpus/profile"]))["ok"], true);
    fails(command(&["verify", "s3://corpus/profile"]).env("AWS_PROFILE", "nobody"), 20, &["'nobody'", "list-profiles"]);
}

/// A command with a profile in `home`.
fn with_profile(profile: &str, home: &Path, variables: &[(&'static str, String)]) -> Command {
    let mut command = with_variables(elbo(), variables);
    command.env("HOME", home).env_remove("AWS_CONFIG_FILE").env_remove("AWS_SHARED_CREDENTIALS_FILE");
    command.env("AWS_ALLOW_HTTP", "true").env("AWS_PROFILE", profile);
    command
}

/// Labels and verifies with a profile in `home`. No key appears in the most detailed log.
fn label_as(profile: &str, home: &Path, variables: &[(&'static str, String)]) {
    let out = format!("s3://corpus/as-{profile}");
    let flags = job_flags(IMAGES.path(), Path::new(&out));
    let flags = with(flags, &[("--keep", "1"), ("--samples", "1")]);
    let mut label = with_profile(profile, home, variables);
    label.arg("label").args(flags).env("ELBO_LOG", "trace,h2=info,hyper=info");
    assert_clean("the log", &run_ok(&mut label).stderr);
    let mut verify = with_profile(profile, home, variables);
    assert_eq!(json(verify.args(["verify", "--json", &out]))["ok"], true);
}

#[test]
fn keys_from_another_program_are_kept_until_they_are_about_to_expire() {
    let (server, home) = (S3sFs::start(true), TempDir::new().unwrap());
    std::fs::create_dir(home.path().join(".aws")).unwrap();
    let program = |name: &str, lasts: &str| {
        let path = home.path().join(name);
        let keys = format!(
            r#"{{"Version": 1, "AccessKeyId": "{KEY}", "SecretAccessKey": "{SECRET}", "Expiration": "'$(date -u -d '{lasts}' +%FT%TZ)'"}}"#
        );
        std::fs::write(&path, format!("echo called >> {}.calls\necho '{keys}'\n", path.display())).unwrap();
        format!("[profile {name}]\ncredential_process = sh {}\nregion = eu-west-1\n", path.display())
    };
    let config = program("steady", "1 hour") + &program("brief", "now");
    std::fs::write(home.path().join(".aws/config"), config).unwrap();
    let calls = |name: &str| {
        label_as(name, home.path(), &[("AWS_ENDPOINT_URL", server.endpoint.clone())]);
        std::fs::read_to_string(home.path().join(format!("{name}.calls"))).unwrap().lines().count()
    };
    // `label` and `verify` fetch them once each.
    assert_eq!(calls("steady"), 2);
    // Keys that have expired serve only the request that fetched them.
    assert!(calls("brief") > 4);
}

#[test]
fn a_role_is_taken_with_the_keys_of_another_profile() {
    let home = TempDir::new().unwrap();
    std::fs::create_dir(home.path().join(".aws")).unwrap();
    let config = format!(
        "[profile base]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n[profile role]\nrole_arn = arn:aws:iam::123456789012:role/labels\nsource_profile = base\nregion = eu-west-1\n[profile orphan]\nrole_arn = arn:aws:iam::123456789012:role/labels\nsource_profile = nobody\n"
    );
    std::fs::write(home.path().join(".aws/config"), config).unwrap();
    label_as("role", home.path(), &[("AWS_ENDPOINT_URL", moto().endpoint.clone())]);

    let fails_as = |profile: &str, words: &[&str]| {
        // A server that knows the keys of `base` alone; moto gives those of the role.
        let server = S3sFs::start(true);
        let variables = [("AWS_ENDPOINT_URL", server.endpoint), ("AWS_ENDPOINT_URL_STS", moto().endpoint.clone())];
        fails(with_profile(profile, home.path(), &variables).args(["verify", "s3://corpus/as-role"]), 20, words);
    };
    fails_as("role", &["refuses these credentials"]);
    fails_as("orphan", &["the AWS profile 'orphan' can't be used", "nobody", "--profile orphan"]);
}

#[test]
fn keys_are_fetched_with_the_token_of_a_single_sign_on() {
    let (server, home) = (S3sFs::start(true), TempDir::new().unwrap());
    let keys = serde_json::json!({ "roleCredentials": {
        "accessKeyId": KEY, "secretAccessKey": SECRET, "sessionToken": "planted", "expiration": 4_000_000_000_000_u64,
    }});
    let portal = [("federation/credentials".to_owned(), keys.to_string().into_bytes())];
    let portal = [("main".to_owned(), ("commit".to_owned(), portal.into()))];
    let portal = Web::start(Site { models: [("plain/".to_owned(), portal.into())].into(), ..Site::default() });
    let cache = home.path().join(".aws/sso/cache");
    std::fs::create_dir_all(&cache).unwrap();
    let config = "[sso-session corp]\nsso_start_url = https://corp.awsapps.com/start\nsso_region = eu-west-1\n[profile sso]\nsso_session = corp\nsso_account_id = 123456789012\nsso_role_name = labels\nregion = eu-west-1\n";
    std::fs::write(home.path().join(".aws/config"), config).unwrap();
    // The name is the SHA-1 of the session's.
    let name = Sha1::digest(b"corp").iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let token = serde_json::json!({ "accessToken": "signed-in", "expiresAt": "2100-01-01T00:00:00Z" });
    std::fs::write(cache.join(format!("{name}.json")), token.to_string()).unwrap();
    let variables = [("AWS_ENDPOINT_URL", server.endpoint), ("AWS_ENDPOINT_URL_SSO", portal.url.clone())];
    label_as("sso", home.path(), &variables);
    let asked = portal.asked();
    // `label` and `verify`, once each.
    assert!(asked.len() == 2 && asked.iter().all(|path| path.contains("account_id=123456789012")), "{asked:?}");
}
