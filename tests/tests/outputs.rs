//! Uses of an output: keep fewer scores, report, export.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use elbo_core::ids::{ClassIndex, Round, SampleId, ShardId};
use elbo_core::prediction::{Labelled, Outcome, Prediction, Score};
use elbo_output::layout;
use elbo_output::predictions::encode_predictions;
use elbo_tests::{Process, elbo, job_flags, json, predictions, run, run_ok, some_images, stderr, with};
use serde_json::Value;
use tempfile::TempDir;

fn label(images: &Path, out: &Path, more: &[&str]) -> std::process::Command {
    let mut command = elbo();
    command.arg("label").args(job_flags(images, out)).args(more);
    command
}

#[test]
fn a_job_that_keeps_fewer_scores_predicts_the_same_but_is_a_different_job() {
    let images = some_images(3);
    let outs = TempDir::new().unwrap();
    let (all, three) = (outs.path().join("all"), outs.path().join("three"));
    run_ok(&mut label(images.path(), &all, &[]));
    run_ok(&mut label(images.path(), &three, &["--top-k", "3"]));

    let mut expected = predictions(&all);
    assert!(expected.iter().all(|row| row.scores().len() == 10));
    for row in &mut expected {
        if let Outcome::Labelled(labelled) = &mut row.outcome {
            labelled.scores.truncate(3);
        }
    }
    assert_eq!(predictions(&three), expected);

    let report = |out: &Path| json(elbo().arg("report").arg(out).arg("--json"));
    let (full, cut) = (report(&all), report(&three));
    assert!(full["accuracy"]["top5"].as_f64() >= full["accuracy"]["top1"].as_f64());
    assert!(cut["accuracy"].as_object().unwrap()["top5"].is_null(), "{cut}");
    assert_eq!(cut["accuracy"]["top1"], full["accuracy"]["top1"]);
    assert_eq!(json(elbo().arg("verify").arg(&three).arg("--json"))["ok"], true);
    let status = json(elbo().arg("status").arg(&three).arg("--json"));
    assert_eq!((status["samples_done"].as_u64(), status["evaluations"].as_u64()), (Some(30), Some(30 * 116)));
    assert_eq!(status["shards"]["done"], 2);

    let refused = run(&mut label(images.path(), &three, &["--top-k", "4"]));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("top_k: 3 -> 4"), "{}", stderr(&refused));
    let refused = run(&mut label(images.path(), &three, &[]));
    assert!(stderr(&refused).contains("top_k: 3 -> the default"), "{}", stderr(&refused));
    assert_eq!(run(&mut label(images.path(), &three, &["--top-k", "0"])).status.code(), Some(2));
}

#[test]
fn an_output_is_reported_and_exported() {
    let images = some_images(2);
    std::fs::write(images.path().join("one/broken.png"), b"no image").unwrap();
    std::fs::write(images.path().join("two/empty.png"), b"").unwrap();
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    run_ok(&mut label(images.path(), &out, &["--max-bad", "2"]));

    let report = String::from_utf8(run_ok(elbo().arg("report").arg(&out)).stdout).unwrap();
    for part in [
        "22 samples: 20 labelled, 2 quarantined",
        "2320 evaluations, 116.0 a labelled image; 0 computed more than once",
        "s an image (",
        "accuracy over 20 samples with a known label",
        "mean per class",
        "confusion (rows: label",
        "most uncertain samples",
        "quarantined because of",
        "such as one/broken.png",
    ] {
        assert!(report.contains(part), "{part} is not in\n{report}");
    }
    assert!(report.lines().all(|line| line.chars().count() <= 80), "{report}");

    let csv = outs.path().join("labels.csv");
    let export = |format: &str, to: &Path, more: &[&str]| {
        let mut command = elbo();
        command.arg("export").arg(&out).args(["--format", format, "--to"]).arg(to).args(more);
        command
    };
    run_ok(&mut export("csv", &csv, &["--scores", "2"]));
    let text = std::fs::read_to_string(&csv).unwrap();
    let rows = predictions(&out);
    assert_eq!(text.lines().count(), 1 + rows.len());
    let columns = "key,label,predicted_class,predicted_index,confidence,margin,evaluations,status,error";
    assert_eq!(text.lines().next().unwrap(), format!("{columns},class_1,error_1,class_2,error_2"));
    let first = rows[0].labelled().unwrap();
    let line: Vec<_> = text.lines().nth(1).unwrap().split(',').collect();
    let (key, error) = (rows[0].key.as_str(), first.scores[1].mean_error.to_string());
    assert_eq!((line[0], line[2], line[12]), (key, first.class_name.as_str(), error.as_str()));

    let refused = run(&mut export("csv", &csv, &[]));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("--force"), "{}", stderr(&refused));
    run_ok(&mut export("csv", &csv, &["--force"]));
    assert!(std::fs::read_to_string(&csv).unwrap().contains("class_5,error_5"));

    // One file beside each image.
    run_ok(&mut export("json", images.path(), &[]));
    for row in &rows {
        let file = images.path().join(&row.key).with_extension("json");
        let object: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(
            (object["key"].as_str(), object["sample_id"].as_u64()),
            (Some(row.key.as_str()), Some(row.sample.0))
        );
        assert_eq!(object["predicted_class"].as_str(), row.labelled().map(|l| l.class_name.as_str()));
        assert_eq!(object["scores"].as_array().unwrap().len(), row.scores().len());
    }
    let bad: Value = serde_json::from_slice(&std::fs::read(images.path().join("one/broken.json")).unwrap()).unwrap();
    assert!(bad["status"] == "quarantined" && bad["error"].as_str().unwrap().contains("decode"), "{bad}");
}

/// A pipe whose reader is closed.
fn gone() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// A full disk.
fn full() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn a_closed_pipe_disturbs_no_command_and_a_full_disk_is_reported() {
    let images = some_images(1);
    let outs = TempDir::new().unwrap();
    // A job continues even if its progress and summary can't be written.
    for (name, stderr_of) in [("gone", gone as fn() -> Stdio), ("full", full)] {
        let out = outs.path().join(name);
        let mut command = elbo();
        command.arg("label").args(with(job_flags(images.path(), &out), &[("--progress", "json")]));
        let ended = run(command.args(["--http", "127.0.0.1:0"]).stdout(gone()).stderr(stderr_of()));
        assert_eq!(ended.status.code(), Some(0), "{name}");
        assert_eq!(json(elbo().args(["verify", "--json"]).arg(&out))["ok"], true);
    }
    let out = outs.path().join("gone").to_string_lossy().into_owned();
    let csv = outs.path().join("labels.csv").to_string_lossy().into_owned();
    let (model, classes) = (elbo_tests::model(), elbo_tests::classes());
    let (model, classes) = (model.to_string_lossy(), classes.to_string_lossy());
    for arguments in [
        vec!["report", &out],
        vec!["report", &out, "--json"],
        vec!["verify", &out],
        vec!["verify", &out, "--json"],
        vec!["status", &out],
        vec!["status", &out, "--json"],
        vec!["plan", "--preset", "pets", "--classes", &classes],
        vec!["plan", "--preset", "pets", "--classes", &classes, "--json"],
        vec!["inspect", &model],
        vec!["inspect", &model, "--json"],
        vec!["export", &out, "--format", "csv", "--to", &csv, "--force"],
        vec!["bench", "policy", "--synthetic", "37", "--images", "5", "--preset", "pets"],
        vec!["--help"],
        vec!["label", "--help"],
        vec!["--version"],
    ] {
        let ended = run(elbo().args(&arguments).stdout(gone()));
        assert_eq!(ended.status.code(), Some(0), "{arguments:?}: {}", stderr(&ended));
        assert_eq!(stderr(&ended), "", "{arguments:?}");
        let ended = run(elbo().args(&arguments).stdout(full()));
        assert_eq!(ended.status.code(), Some(1), "{arguments:?}: {}", stderr(&ended));
        assert!(stderr(&ended).starts_with("error: writing to stdout: No space left"), "{}", stderr(&ended));
    }
    // A command keeps its exit code if its message can't be written.
    std::fs::remove_file(Path::new(&out).join("predictions/shard-00000.parquet")).unwrap();
    for nobody in [gone, full] {
        for (arguments, code) in
            [(vec!["verify", &*out], 1), (vec!["report", "/no/such/output"], 1), (vec!["label"], 2)]
        {
            let ended = run(elbo().args(&arguments).stdout(nobody()).stderr(nobody()));
            assert_eq!(ended.status.code(), Some(code), "{arguments:?}");
        }
    }
}

#[test]
fn an_export_that_omits_an_image_writes_the_rest_and_fails() {
    let (out, to) = (thousand_classes(1), TempDir::new().unwrap());
    let shard = out.path().join(layout::predictions(ShardId(0)).as_ref());
    let mut rows = predictions(out.path());
    rows[3].key = "s.tar/../../../up\u{1b}[31m.jpg".into();
    std::fs::write(&shard, encode_predictions(&rows, &[]).unwrap()).unwrap();
    let into = to.path().join("deep/json");
    let ended = run(elbo().arg("export").arg(out.path()).args(["--format", "json", "--to"]).arg(&into));
    let (told, said) = (String::from_utf8_lossy(&ended.stdout), stderr(&ended));
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(told.starts_with("exported 499 images to ") && told.contains("(499 files)"), "{told}");
    assert!(said.contains("s.tar/../../../up") && !said.contains('\u{1b}'), "{said}");
    assert!(said.contains("1 of 500 images were left out"), "{said}");
    assert_eq!(elbo_tests::sorted(&into.join("photos")).len(), 499);
    assert_eq!(elbo_tests::sorted(to.path()).len(), 1);
    assert_eq!(elbo_tests::sorted(&to.path().join("deep")).len(), 1);
}

/// The output of a finished job with a thousand classes: `shards` files with the same 500 samples.
fn thousand_classes(shards: u32) -> TempDir {
    let out = TempDir::new().unwrap();
    let names: Vec<_> = (0..1000).map(|i| (i, format!("class number {i}, with a name as ImageNet has them"))).collect();
    let samples = 500 * u64::from(shards);
    let job = serde_json::json!({
        "state": "done", "fingerprint": "f", "model_files": {}, "noise_file": null,
        "spec": {
            "images": "i", "model": "m", "classes": {"names": names, "prompts": []},
            "policy": {"name": "exhaustive", "samples": 1, "trials": 1}, "loss": "l2", "dtype": "f32", "size": null,
            "seed": 0, "noise_scope": "sample", "noise": null, "write_errors": false, "label_from": null,
            "limit": null, "shard_size": 500,
        },
        "manifest": {"samples": samples, "digest": "d", "captions": {"0": samples}}, "versions": {"elbo": "0", "protocol": 1},
        "totals": null, "timings": null,
    });
    std::fs::write(out.path().join("job.json"), job.to_string()).unwrap();
    let row = |id: u64| {
        let class = |rank: u64| ClassIndex(((id * 7 + rank * 13) % 1000) as i32);
        let score = |rank: u64| Score {
            class: class(rank),
            mean_error: 0.1 + (rank * 1_000_003 + id) as f32 / 1e9,
            std_error: Some((rank * 31 + id) as f32 / 7e6),
            n: 25,
            round: Round(u16::from(rank < 5)),
        };
        let labelled = Labelled {
            class: class(0),
            class_name: names[class(0).0 as usize].1.clone(),
            confidence: None,
            margin: Some(id as f32),
            scores: (0..1000).map(score).collect(),
        };
        Prediction {
            sample: SampleId(id),
            key: format!("photos/{id:06}.jpg"),
            // For one sample in five the label is third-best, for another one in five it is not among the best five.
            label: Some(names[class([0, 0, 0, 2, 7][id as usize % 5]).0 as usize].1.clone()),
            evaluations: 25_000,
            outcome: Outcome::Labelled(labelled),
        }
    };
    let bytes = encode_predictions(&(0..500).map(row).collect::<Vec<_>>(), &[]).unwrap();
    std::fs::create_dir(out.path().join(layout::PREDICTIONS)).unwrap();
    let path = |shard| out.path().join(layout::predictions(ShardId(shard)).as_ref());
    std::fs::write(path(0), &bytes).unwrap();
    (1..shards).for_each(|shard| std::fs::hard_link(path(0), path(shard)).unwrap());
    out
}

/// The peak memory of a command in MiB.
fn peak(command: &mut std::process::Command) -> u64 {
    let mut process = Process::start(command);
    let status = format!("/proc/{}/status", process.0.id());
    let mut peak = 0;
    while process.is_running() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or_default() / 1024);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(process.wait(), Some(0));
    peak
}

#[test]
fn reading_an_output_with_a_thousand_classes_takes_bounded_memory() {
    let (small, large) = (thousand_classes(24), thousand_classes(96));
    let report = json(elbo().arg("report").arg(large.path()).arg("--json"));
    assert_eq!(report["labelled"], 48_000);
    assert_eq!((report["accuracy"]["top1"].as_f64(), report["accuracy"]["top5"].as_f64()), (Some(0.6), Some(0.8)));
    let text = String::from_utf8(run_ok(elbo().arg("report").arg(large.path())).stdout).unwrap();
    assert!(text.contains("most frequent confusions") && text.lines().count() < 80, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");

    let to = TempDir::new().unwrap();
    for (at, command) in ["report", "status", "export"].into_iter().enumerate() {
        let of = |out: &TempDir, name: &str| {
            let mut elbo = elbo();
            elbo.arg(command).arg(out.path());
            if command == "export" {
                elbo.args(["--format", "csv", "--to"]).arg(to.path().join(format!("{name}{at}.csv")));
            }
            peak(&mut elbo)
        };
        let (few, many) = (of(&small, "small"), of(&large, "large"));
        // Holding the additional rows in memory would take 800 MiB.
        assert!(many < few + 100, "{command}: {few} MiB for 24 shards, {many} MiB for 96");
    }
}
