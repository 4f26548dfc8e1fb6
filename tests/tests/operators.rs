//! The operator's view of a running job: probes, metrics, status, health, reflection, logs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't be set up must fail")]

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use elbo_tests::patience::patience;
use elbo_tests::service::{Service, TOKEN};
use elbo_tests::{
    Process, classes, coordinator_flags, elbo, free_address, images, json, model, run, some_images, stderr,
};
use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// Sends a request to a process's HTTP endpoint; returns the status code and text.
async fn get(address: &str, path: &str) -> Option<(u16, String)> {
    elbo_store::tls::use_ring();
    let answer = reqwest::get(format!("http://{address}{path}")).await.ok()?;
    Some((answer.status().as_u16(), answer.text().await.ok()?))
}

/// The status code of a request with this host name.
async fn code_by_name(address: &str, path: &str, name: &str) -> u16 {
    elbo_store::tls::use_ring();
    let request = reqwest::Client::new().get(format!("http://{address}{path}")).header("host", name);
    request.send().await.unwrap().status().as_u16()
}

async fn wait_for(address: &str, path: &str, reached: impl Fn(u16, &str) -> bool) -> String {
    let end = Instant::now() + patience();
    loop {
        let answer = get(address, path).await;
        if let Some((code, text)) = &answer
            && reached(*code, text)
        {
            return text.clone();
        }
        assert!(Instant::now() < end, "{path}: {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The value of a metric series.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{metrics}")).parse().unwrap()
}

#[tokio::test]
async fn probes_metrics_status_and_page_follow_a_job() {
    let service = Service::new(10);
    let mut coordinator = service.coordinator(&["--http-host", "elbo.example,elbo-coordinator"]);
    let url = format!("http://{}", service.address);
    for path in ["/", "/status", "/metrics", "/readyz"] {
        for name in ["localhost:7601", "ELBO.example", "elbo-coordinator:7601"] {
            assert_eq!(code_by_name(&service.http, path, name).await, 200, "{path} of {name}");
        }
        // A web page whose own name resolves to this address would send this host name.
        assert_eq!(code_by_name(&service.http, path, "evil.example").await, 421, "{path}");
    }
    assert_eq!(code_by_name(&service.http, "/livez", "evil.example").await, 200);
    // Without workers the coordinator is still alive and ready: it can serve workers that join.
    wait_for(&service.http, "/readyz", |code, _| code == 200).await;
    assert_eq!(get(&service.http, "/livez").await.unwrap(), (200, "alive\n".into()));
    let status: Value = serde_json::from_str(&get(&service.http, "/status").await.unwrap().1).unwrap();
    assert_eq!(status["state"], "waiting for workers");
    let of_command = json(elbo().args(["status", "--json", &url]).env("ELBO_TOKEN", TOKEN));
    assert_eq!(status, of_command);

    // A worker that can't reach a coordinator is alive but not ready.
    let (lost_http, lost) = (free_address(), format!("http://{}", free_address()));
    let mut command = service.worker(&lost);
    let _lost = Process::start(command.args(["--http", &lost_http]));
    wait_for(&lost_http, "/livez", |code, _| code == 200).await;
    let (code, reason) = get(&lost_http, "/readyz").await.unwrap();
    assert!(code == 503 && reason.contains("not joined"), "{code} {reason}");

    let worker_http = free_address();
    let mut command = service.worker(&url);
    let mut worker = Process::start(command.args(["--http", &worker_http]));
    wait_for(&worker_http, "/readyz", |code, _| code == 200).await;
    let merged = "elbo_evaluations{state=\"merged\"}";
    let metrics =
        wait_for(&service.http, "/metrics", |_, text| text.contains(merged) && value(text, merged) > 0.0).await;
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    assert!(value(&metrics, "elbo_reports_total{outcome=\"accepted\"}") >= 1.0);
    assert!(value(&metrics, "elbo_leases_granted_total") >= 1.0);
    assert!(value(&metrics, "elbo_storage_seconds_count{use=\"append\"}") >= 1.0);
    assert_eq!(value(&metrics, "elbo_samples{state=\"total\"}"), 100.0);
    assert_eq!(value(&metrics, "elbo_evaluations{state=\"planned\"}"), 11_600.0);
    assert_eq!(value(&metrics, "elbo_stalled{part=\"storage\"}"), 0.0);
    let metrics = wait_for(&worker_http, "/metrics", |_, text| value(text, "elbo_worker_batches_total") > 0.0).await;
    assert!(value(&metrics, "elbo_worker_evaluations_total") > 0.0);
    assert!(value(&metrics, "elbo_worker_images_read_total") > 0.0);
    let page = get(&service.http, "/").await.unwrap().1;
    assert!(page.contains("<progress") && page.contains("workers"), "{page}");
    assert!(!page.contains("http://") && !page.contains(TOKEN), "{page}");
    assert_eq!(get(&service.http, "/nothing").await.unwrap().0, 404);
    assert_eq!((coordinator.wait(), worker.wait()), (Some(0), Some(0)));
}

#[tokio::test]
async fn a_job_replaces_its_pilot_in_status_and_metrics() {
    let (images, files) = (some_images(8), TempDir::new().unwrap());
    let (address, http) = (free_address(), free_address());
    let url = format!("http://{address}");
    let mut coordinator = elbo();
    coordinator.args([
        "coordinator",
        "--label-from",
        "parent",
        "--progress",
        "none",
        "--pilot",
        "20",
        "--shard-size",
        "20",
    ]);
    coordinator.args(["--listen", &address, "--http", &http, "--lease-seconds", "2", "--images"]).arg(images.path());
    coordinator.arg("--classes").arg(classes()).arg("--model").arg(model()).arg("--out").arg(files.path().join("out"));
    let mut coordinator = Process::start(&mut coordinator);
    let worker = || {
        let mut command = elbo();
        Process::start(command.args(["worker", "--threads", "1", "--batch", "16", "--coordinator", &url]))
    };
    let is = |text: &str, samples: u64| {
        let status: Value = serde_json::from_str(text).unwrap();
        // A client that waits for the end must not take the pilot's end for it.
        assert!(status["state"] != "done" || status["samples"] == 80, "{status}");
        status["samples"] == samples && status["state"] != "starting"
    };
    let total = "elbo_samples{state=\"total\"}";
    let shown = async |samples: u64| {
        wait_for(&http, "/status", |code, text| code == 200 && is(text, samples)).await;
        wait_for(&http, "/readyz", |code, _| code == 200).await;
        assert_eq!(value(&get(&http, "/metrics").await.unwrap().1, total), samples as f64);
        let page = get(&http, "/").await.unwrap().1;
        assert!(page.contains(&format!("of {samples}<")), "{page}");
    };
    shown(20).await;
    let mut first = worker();
    wait_for(&http, "/status", |code, text| code == 200 && is(text, 80)).await;
    // No worker runs during these checks.
    first.kill();
    shown(80).await;
    let mut second = worker();
    assert_eq!((coordinator.wait(), second.wait()), (Some(0), Some(0)));
}

#[test]
fn json_logs_name_every_granted_and_acknowledged_unit() {
    let service = Service::new(3);
    let mut command = elbo();
    let flags = coordinator_flags(&images(), &service.out());
    command.arg("coordinator").args(flags).args(["--limit", "40", "--listen", &service.address, "--log", "json"]);
    command.env("ELBO_LOG", "info,elbo::audit=debug").env("ELBO_TOKEN", TOKEN);
    let mut coordinator = service.start(&mut command, "coordinator.log");
    let url = format!("http://{}", service.address);
    let log = |n: usize| format!("worker-{n}.log");
    let mut workers: Vec<_> =
        (0..2).map(|n| service.start(service.worker(&url).env("ELBO_LOG_FORMAT", "json"), &log(n))).collect();
    assert_eq!(coordinator.wait(), Some(0), "{}", service.log());
    assert!(workers.iter_mut().all(|worker| worker.wait() == Some(0)));

    let fingerprint = json(elbo().args(["verify", "--json"]).arg(service.out()))["fingerprint"].clone();
    let short = &fingerprint.as_str().unwrap()[..12];
    // Messages for a user at a terminal are plain text; the log has one JSON object per line.
    let events = |text: &str| -> Vec<Value> {
        text.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (mut acknowledged, mut granted) = (BTreeSet::new(), BTreeMap::new());
    let mut shards = 0;
    for event in events(&service.log()) {
        let fields = &event["fields"];
        if ["elbo::audit", "elbo_coordinator"].iter().any(|ours| event["target"].as_str().unwrap().starts_with(ours)) {
            assert_eq!((&event["span"]["job"], &event["span"]["epoch"]), (&short.into(), &1.into()), "{event}");
        }
        shards += usize::from(fields["message"] == "shard committed");
        let units = fields["units"].as_str().unwrap_or_default().split_whitespace().map(str::to_owned);
        match fields["message"].as_str().unwrap() {
            "granted" => {
                assert!(fields["worker"].is_string() && fields["epoch"] == 1 && fields["lease"].is_u64(), "{event}");
                for unit in units {
                    assert!(!acknowledged.contains(&unit), "{unit} was granted after it was acknowledged");
                    *granted.entry(unit).or_insert(0) += 1;
                }
            }
            "acknowledged" => {
                for unit in units {
                    assert!(granted.contains_key(&unit), "{unit} was never granted");
                    assert!(acknowledged.insert(unit.clone()), "{unit} was acknowledged twice");
                }
            }
            _ => {}
        }
    }
    assert_eq!(shards, 2);
    // 40 images with two rounds, one on 8 slots and one on 20; each round is one unit.
    assert_eq!(acknowledged.len(), 80);
    for n in 0..2 {
        let text = std::fs::read_to_string(service.file(&log(n))).unwrap();
        let events = events(&text);
        let loaded = events.iter().find(|event| event["fields"]["message"] == "ready").unwrap();
        assert!(loaded["span"]["worker"].is_string() && loaded["span"]["job"] == short, "{loaded}");
        assert!(!text.contains(TOKEN));
    }
    assert!(!service.log().contains(TOKEN));
}

#[tokio::test]
async fn health_answers_anyone_but_reflection_needs_the_token() {
    let service = Service::new(1);
    let _coordinator = service.coordinator(&[]);
    let url = format!("http://{}", service.address);
    let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
    for name in ["", "elbo.v1.Coordinator"] {
        let request = HealthCheckRequest { service: name.into() };
        let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
        assert_eq!(health.status, 1, "{name} is not SERVING");
    }
    let ask = |token: Option<&str>| {
        let list = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut request = tonic::Request::new(futures::stream::iter([list]));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = ServerReflectionClient::new(channel.clone());
        async move { client.server_reflection_info(request).await }
    };
    assert_eq!(ask(None).await.unwrap_err().code(), tonic::Code::Unauthenticated);
    let mut answers = ask(Some(TOKEN)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"elbo.v1.Coordinator") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
}

#[test]
fn mistakes_of_operators_are_named() {
    let service = Service::new(1);
    let fails = |command: &mut std::process::Command, code: i32, words: &[&str]| {
        let output = run(command);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let worker = || {
        let mut command = elbo();
        command.args(["worker", "--patience", "1"]).env("ELBO_COORDINATOR", "http://127.0.0.1:9");
        command
    };
    let file = service.file("token");
    for content in ["", " \n\t\n"] {
        std::fs::write(&file, content).unwrap();
        fails(worker().arg("--token-file").arg(&file), 2, &["the token is empty"]);
    }
    std::fs::write(&file, "two words\n").unwrap();
    fails(worker().arg("--token-file").arg(&file), 2, &["spaces", "printable ASCII"]);
    fails(worker().arg("--token-file").arg(service.files.path()), 1, &["reading the token file", "may read"]);
    fails(worker().env("ELBO_TOKEN", ""), 2, &["the token is empty"]);
    fails(worker().env("ELBO_LOG", "elbo=chatty"), 2, &["ELBO_LOG", "not a valid filter"]);
    fails(worker().args(["--log", "xml"]), 2, &["text", "json"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _held = std::net::TcpListener::bind(taken).unwrap();
    fails(worker().args(["--http", &taken.to_string()]), 1, &["choose another address with --http"]);
    fails(&mut worker(), 1, &["has not answered", "check that it runs"]);
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    for (mode, told) in [(0o644, true), (0o640, true), (0o600, false)] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        let message = stderr(&run(worker().arg("--token-file").arg(&file)));
        assert_eq!(message.contains(&format!("chmod 600 {}", file.display())), told, "{mode:o}: {message}");
        assert!(!message.contains(TOKEN), "{message}");
    }
    let mut open = elbo();
    open.args(["coordinator", "--images", "x", "--classes", "x", "--model", "/none", "--out", "x", "--listen"]);
    let message = stderr(&run(open.arg("0.0.0.0:0").env("ELBO_TOKEN", TOKEN)));
    assert!(message.contains("unencrypted") && message.contains("--tls-cert") && !message.contains(TOKEN), "{message}");
    // A warning appears if the token would leave loopback unencrypted; it does not show the token.
    let output = run(worker().args(["--coordinator", "http://0.0.0.0:9"]).env("ELBO_TOKEN", TOKEN));
    assert!(stderr(&output).contains("unencrypted") && !stderr(&output).contains(TOKEN), "{}", stderr(&output));
}

#[tokio::test]
async fn a_job_without_workers_reports_a_stall_after_a_minute_until_a_worker_joins() {
    let service = Service::new(3);
    let mut coordinator = service.coordinator(&[]);
    let stalled = |text: &str| serde_json::from_str::<Value>(text).unwrap()["stalled"].clone();
    let status = wait_for(&service.http, "/status", |_, text| !stalled(text).is_null()).await;
    let sentence = stalled(&status).as_str().unwrap().to_owned();
    assert!(sentence.starts_with("no worker has been there for 60 s: start some"), "{sentence}");
    let metrics = get(&service.http, "/metrics").await.unwrap().1;
    assert_eq!(value(&metrics, "elbo_stalled{part=\"workers\"}"), 1.0);
    assert!(get(&service.http, "/").await.unwrap().1.contains(&sentence));
    assert!(service.log().contains(&sentence), "{}", service.log());
    // The coordinator stays alive: the workers are missing, and restarting the coordinator would not help.
    assert_eq!(get(&service.http, "/livez").await.unwrap().0, 200);
    let mut worker = Process::start(&mut service.worker(&format!("http://{}", service.address)));
    assert_eq!((coordinator.wait(), worker.wait()), (Some(0), Some(0)));
    assert!(service.log().contains("the job makes progress again"), "{}", service.log());
}
