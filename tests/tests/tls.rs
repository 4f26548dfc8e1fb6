//! TLS and mutual TLS between real processes: both work, and every mistake is named with its remedy.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use elbo_tests::link::{Link, State};
use elbo_tests::patience::wait_until;
use elbo_tests::service::{Service, TOKEN};
use elbo_tests::{Process, elbo, json, run, stderr};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// A certificate authority; all its files are in one directory.
struct Authority {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pem: PathBuf,
}

/// The file of a certificate and the file of its key.
struct Pair(PathBuf, PathBuf);

impl Authority {
    fn new(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = directory.join(format!("{name}.pem"));
        std::fs::write(&pem, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory: directory.to_owned(), issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, name: &str, hosts: &[&str], until: i32) -> Pair {
        let mut params = CertificateParams::new(hosts.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(until, 1, 1));
        let key = KeyPair::generate().unwrap();
        let pair = Pair(self.directory.join(format!("{name}.crt")), self.directory.join(format!("{name}.key")));
        std::fs::write(&pair.0, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        std::fs::write(&pair.1, key.serialize_pem()).unwrap();
        pair
    }
}

impl Pair {
    fn flags(&self) -> [&str; 4] {
        ["--tls-cert", self.0.to_str().unwrap(), "--tls-key", self.1.to_str().unwrap()]
    }
}

fn status(url: &str, flags: &[&str]) -> Command {
    let mut command = elbo();
    command.args(["status", "--json", url]).args(flags).env("ELBO_TOKEN", TOKEN);
    command
}

/// Asserts that the command fails with `code` and a message that contains all of `words`.
#[track_caller]
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let output = run(command);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {message}");
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
    assert!(!message.contains(TOKEN), "the token is shown: {message}");
}

#[test]
fn a_job_over_mutual_tls_works_and_refused_processes_are_told_why() {
    let service = Service::new(2);
    let (ours, other) =
        (Authority::new(service.files.path(), "authority"), Authority::new(service.files.path(), "other"));
    let server = ours.issue("server", &["127.0.0.1", "localhost"], 2090);
    let (client, stranger) = (ours.issue("client", &["worker"], 2090), other.issue("stranger", &["worker"], 2090));
    let late = ours.issue("late", &["worker"], 2021);
    let ca = ["--tls-ca", ours.pem.to_str().unwrap()];
    let client_ca = ["--tls-client-ca", ours.pem.to_str().unwrap()];
    let mut coordinator = service.coordinator(&[&server.flags()[..], &client_ca].concat());

    let url = format!("https://{}", service.address);
    let plain = format!("http://{}", service.address);
    fails(&mut status(&plain, &[]), 1, &["it speaks TLS", "https://"]);
    fails(&mut service.worker(&plain), 1, &["it speaks TLS", "https://"]);
    fails(&mut status(&url, &client.flags()), 1, &["--tls-ca"]);
    let wrong_ca = ["--tls-ca", other.pem.to_str().unwrap()];
    fails(&mut status(&url, &[&wrong_ca[..], &client.flags()].concat()), 1, &["not signed by", "--tls-ca"]);
    fails(&mut status(&url, &ca), 1, &["wants a certificate", "--tls-cert"]);
    fails(service.worker(&url).args(ca), 1, &["wants a certificate", "--tls-cert"]);
    for pair in [&stranger, &late] {
        let flags = [&ca[..], &pair.flags()].concat();
        fails(&mut status(&url, &flags), 1, &["does not accept this worker's certificate", "--tls-client-ca"]);
    }
    let good = [&ca[..], &client.flags()].concat();
    fails(status(&url, &good).env("ELBO_TOKEN", "guessed"), 1, &["the token is wrong"]);
    let waiting = json(&mut status(&url, &good));
    assert_eq!(waiting["state"], "waiting for workers");

    let by_name = format!("https://localhost:{}", service.address.rsplit(':').next().unwrap());
    let mut first = Process::start(service.worker(&url).args(&good));
    let mut second = Process::start(
        service
            .worker(&by_name)
            .env("ELBO_TLS_CA", &ours.pem)
            .env("ELBO_TLS_CERT", &client.0)
            .env("ELBO_TLS_KEY", &client.1),
    );
    assert_eq!(coordinator.wait(), Some(0), "{}", service.log());
    assert_eq!((first.wait(), second.wait()), (Some(0), Some(0)));
    service.check_results();
}

#[test]
fn expired_certificates_wrong_names_and_ports_without_tls_have_different_errors() {
    let files = TempDir::new().unwrap();
    let ours = Authority::new(files.path(), "authority");
    let ca = ["--tls-ca", ours.pem.to_str().unwrap()];
    for (pair, expected) in [
        (ours.issue("expired", &["127.0.0.1"], 2021), "has expired"),
        (ours.issue("elsewhere", &["elsewhere.example"], 2090), "not for the name '127.0.0.1'"),
    ] {
        let service = Service::new(1);
        let _coordinator = service.coordinator(&pair.flags());
        fails(service.worker(&format!("https://{}", service.address)).args(ca), 1, &[expected]);
    }
    let service = Service::new(1);
    let _coordinator = service.coordinator(&[]);
    fails(service.worker(&format!("https://{}", service.address)).args(ca), 1, &["it speaks no TLS", "http://"]);
}

#[test]
fn replaced_certificate_files_are_used_without_a_restart() {
    let service = Service::new(10);
    let ours = Authority::new(service.files.path(), "authority");
    let server = ours.issue("server", &["127.0.0.1"], 2021);
    let trusted = service.file("trusted.pem");
    std::fs::copy(&ours.pem, &trusted).unwrap();
    let ca = ["--tls-ca", trusted.to_str().unwrap()];
    let url = format!("https://{}", service.address);
    let mut coordinator = service.coordinator(&server.flags());
    fails(&mut status(&url, &ca), 1, &["has expired"]);
    ours.issue("server", &["127.0.0.1"], 2090);
    assert_eq!(json(&mut status(&url, &ca))["state"], "waiting for workers");
    // A half-written certificate file.
    std::fs::write(&server.0, "-----BEGIN CERTIFICATE-----\nMII").unwrap();
    assert_eq!(json(&mut status(&url, &ca))["state"], "waiting for workers");
    assert!(service.log().contains("the old ones stay in use"), "{}", service.log());
    ours.issue("server", &["127.0.0.1"], 2090);

    let link = Link::start(&service.address);
    let mut worker = Process::start(service.worker(&format!("https://{}", link.address)).args(ca));
    wait_until(|| service.log(), || json(&mut status(&url, &ca))["evaluations"] != 0);
    // From now on both ends only know another authority, and have to reconnect.
    let next = Authority::new(service.files.path(), "next");
    next.issue("server", &["127.0.0.1"], 2090);
    std::fs::copy(&next.pem, &trusted).unwrap();
    link.set(State::Cut);
    std::thread::sleep(Duration::from_millis(300));
    link.set(State::Up);
    assert_eq!(coordinator.wait(), Some(0), "{}", service.log());
    assert_eq!(worker.wait(), Some(0));
    service.check_results();
}

#[test]
fn invalid_certificate_and_key_files_are_named() {
    let files = TempDir::new().unwrap();
    let ours = Authority::new(files.path(), "authority");
    let (one, two) = (ours.issue("one", &["localhost"], 2090), ours.issue("two", &["localhost"], 2090));
    let garbled = files.path().join("garbled.pem");
    std::fs::write(&garbled, "-----BEGIN CERTIFICATE-----\n%%%%\n-----END CERTIFICATE-----\n").unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let coordinator = |cert: &Path, key: &Path, more: &[&str]| {
        let mut command = elbo();
        command.args(["coordinator", "--images", "x", "--classes", "x", "--model", "x", "--out", "x"]);
        command.args(["--tls-cert", &text(cert), "--tls-key", &text(key)]).args(more);
        command
    };
    fails(&mut coordinator(&files.path().join("none"), &one.1, &[]), 1, &["reading", "none", "--tls-cert"]);
    fails(&mut coordinator(&garbled, &one.1, &[]), 1, &["garbled.pem holds no usable certificate", "--tls-cert"]);
    fails(&mut coordinator(&one.1, &one.1, &[]), 1, &["one.key holds no usable certificate"]);
    fails(&mut coordinator(&one.0, &one.0, &[]), 1, &["one.crt holds no usable private key", "--tls-key"]);
    fails(&mut coordinator(&one.0, &two.1, &[]), 1, &["two.key is not that of the certificate in", "one.crt"]);
    let more = ["--tls-client-ca", &text(&one.1)];
    fails(&mut coordinator(&one.0, &one.1, &more), 1, &["holds no usable certificate", "--tls-client-ca"]);
    let cert = text(&one.0);
    fails(elbo().args(["worker", "--coordinator", "https://127.0.0.1:9", "--tls-cert", &cert]), 2, &["--tls-key"]);
    let ca = ["--tls-ca", &text(&ours.pem)];
    fails(elbo().args(["worker", "--coordinator", "http://127.0.0.1:9"]).args(ca), 2, &["use https://"]);
}
