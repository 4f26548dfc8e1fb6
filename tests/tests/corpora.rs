//! One corpus in every layout: the same images get the same scores, wherever they lie. And bad ones, which cost nobody else.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::{Path, PathBuf};
use std::process::Command;

use elbo_common::predictions::Prediction;
use elbo_tests::web::Web;
use elbo_tests::{elbo, job_flags, json, predictions, python, results, root, run, run_ok, some_images, stderr};
use tempfile::TempDir;

/// The usual job, with labels from the corpus and noise that does not depend on keys.
fn flags(images: &str, out: &Path) -> Vec<String> {
    let mut flags = job_flags(Path::new(images), out);
    let labels = flags.iter().position(|flag| flag == "--label-from").unwrap();
    flags.drain(labels..labels + 2);
    flags.extend(["--noise-scope".into(), "shared".into()]);
    flags
}

fn label(images: &str, out: &Path) -> Vec<Prediction> {
    run_ok(elbo().arg("label").args(flags(images, out)));
    assert_eq!(json(elbo().args(["verify", "--json"]).arg(out))["ok"], true);
    predictions(out)
}

/// What is said of the images, without what they are called.
fn without_keys(rows: &[Prediction]) -> Vec<Prediction> {
    rows.iter().map(|row| Prediction { key: String::new(), label: None, ..row.clone() }).collect()
}

fn corpora(images: &Path) -> TempDir {
    let made = TempDir::new().unwrap();
    let mut make = Command::new(python("readers/requirements.txt"));
    let home = made.path().join("hugging-face-home");
    make.env("HF_HOME", home).env("HF_HUB_OFFLINE", "1").arg(root().join("tests/corpora/make.py"));
    run_ok(make.arg(images).arg(made.path()));
    made
}

fn text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn shards_and_tables_of_other_programs_score_as_the_files_do() {
    let digits = some_images(2);
    let made = corpora(digits.path());
    let outs = TempDir::new().unwrap();
    let at = |name: &str| text(made.path().join(name));
    let mut by_parent = flags(&text(digits.path().into()), &outs.path().join("files"));
    by_parent.extend(["--label-from".into(), "parent".into()]);
    run_ok(elbo().arg("label").args(by_parent));
    let expected = predictions(&outs.path().join("files"));
    assert_eq!(expected.len(), 20);
    assert!(expected.iter().all(|row| row.labelled().is_some()));

    let served = Web::serve(made.path());
    for (name, images, first_key) in [
        ("shards", at("shards"), "digits-0.tar/eight/0028.png"),
        ("pattern", at("shards/digits-{0..2}.tar"), "digits-0.tar/eight/0028.png"),
        ("http", format!("{}/shards/digits-{{0..2}}.tar", served.files()), "digits-0.tar/eight/0028.png"),
        ("tables", at("hugging-face/*.parquet"), "train-00000.parquet/000000"),
        (
            "http-table",
            format!("{}/hugging-face/train-0000{{0..2}}.parquet", served.files()),
            "train-00000.parquet/000000",
        ),
        ("paths", at("paths.parquet"), ""),
    ] {
        let rows = label(&images, &outs.path().join(name));
        assert_eq!(without_keys(&rows), without_keys(&expected), "{name}");
        assert!(rows[0].key.starts_with(first_key), "{name}: {}", rows[0].key);
        // Labels are names or numbers, as the corpus has them; the report knows both.
        let report = json(elbo().args(["report", "--json"]).arg(outs.path().join(name)));
        let files = json(elbo().args(["report", "--json"]).arg(outs.path().join("files")));
        assert_eq!(report["accuracy"], files["accuracy"], "{name}");
    }
}

#[test]
fn a_server_that_can_not_list_says_what_to_give_instead() {
    let digits = some_images(1);
    let served = Web::serve(digits.path());
    let outs = TempDir::new().unwrap();
    let refused = run(elbo().arg("label").args(flags(&served.files(), &outs.path().join("out"))));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("shard-{000..099}.tar"), "{}", stderr(&refused));
    assert!(!outs.path().join("out/job.json").exists());
}

/// Replaces some of the images by what goes wrong with images; how many.
fn spoil(images: &Path) -> usize {
    let at = |name: &str| images.join(name);
    let good = std::fs::read(elbo_tests::sorted(&at("one"))[0].clone()).unwrap();
    let bomb = b"P6 16000 16000 255 ".to_vec();
    std::fs::write(at("one/a-truncated.png"), &good[..good.len() / 2]).unwrap();
    std::fs::write(at("one/b-empty.png"), b"").unwrap();
    std::fs::write(at("two/c-page.jpg"), b"<!doctype html><html>not found</html>").unwrap();
    std::fs::write(at("two/d-bomb.ppm"), bomb).unwrap();
    std::os::unix::fs::symlink("/no/such/image.png", at("two/e-gone.png")).unwrap();
    // No extension tells what a file is.
    std::fs::write(at("two/f-really-a-png.jpg"), &good).unwrap();
    5
}

#[test]
fn bad_images_are_quarantined_and_tried_again_when_they_are_mended() {
    let digits = some_images(2);
    let good = some_images(2);
    let bad = spoil(digits.path());
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    let job = |out: &Path| {
        let mut command = elbo();
        command.arg("label").args(job_flags(digits.path(), out)).args(["--max-bad", "50%"]);
        command
    };
    run_ok(&mut job(&out));
    let verified = json(elbo().args(["verify", "--json"]).arg(&out));
    assert_eq!((verified["ok"].as_bool(), verified["quarantined"].as_u64()), (Some(true), Some(bad as u64)));
    assert_eq!((verified["manifest"].as_u64(), verified["predictions"].as_u64()), (Some(26), Some(21)));
    let before = predictions(&out);
    let errors: Vec<_> = before.iter().filter_map(|row| Some((row.key.as_str(), row.error()?))).collect();
    for ((key, error), (name, part)) in errors.iter().zip([
        ("one/a-truncated.png", "decode:"),
        ("one/b-empty.png", "empty"),
        ("two/c-page.jpg", "decode:"),
        ("two/d-bomb.ppm", "decode:"),
        ("two/e-gone.png", "read:"),
    ]) {
        assert!(*key == name && error.contains(part), "{key}: {error}");
    }

    // Nothing is mended: the same again, and no other row moves.
    let bytes = results(&out);
    run_ok(job(&out).arg("--retry-quarantined"));
    assert!(results(&out) == bytes);

    let one = elbo_tests::sorted(&good.path().join("one"))[0].clone();
    for name in ["one/a-truncated.png", "one/b-empty.png", "two/c-page.jpg", "two/d-bomb.ppm", "two/e-gone.png"] {
        let path = digits.path().join(name);
        std::fs::remove_file(&path).unwrap();
        std::fs::copy(&one, &path).unwrap();
    }
    run_ok(job(&out).arg("--retry-quarantined"));
    let after = predictions(&out);
    assert!(after.iter().all(|row| row.labelled().is_some()));
    assert!(!out.join("quarantine").join("shard-00000.parquet").exists());
    // How sure they are is learned from all of them, and there are more now.
    for (old, new) in before.iter().zip(&after).filter(|(old, _)| old.labelled().is_some()) {
        assert_eq!((&old.key, old.scores(), old.evaluations), (&new.key, new.scores(), new.evaluations));
    }
    let verified = json(elbo().args(["verify", "--json"]).arg(&out));
    assert_eq!((verified["ok"].as_bool(), verified["quarantined"].as_u64()), (Some(true), Some(0)));

    // As if they had been good from the start: scores are a function of pixels and keys.
    let fresh = outs.path().join("fresh");
    run_ok(&mut job(&fresh));
    assert_eq!(predictions(&fresh), after);
}

#[test]
fn too_many_bad_images_end_the_job_which_resumes_with_more_patience() {
    let digits = some_images(2);
    spoil(digits.path());
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    let stopped = run(elbo().arg("label").args(job_flags(digits.path(), &out)).args(["--max-bad", "2"]));
    assert_eq!(stopped.status.code(), Some(1));
    assert!(stderr(&stopped).contains("raise --max-bad"), "{}", stderr(&stopped));
    run_ok(elbo().arg("label").args(job_flags(digits.path(), &out)).args(["--max-bad", "5"]));
    assert_eq!(json(elbo().args(["verify", "--json"]).arg(&out))["quarantined"], 5);
}

#[test]
fn what_the_error_and_the_report_advise_after_too_many_bad_images_works() {
    let digits = some_images(2);
    let good = some_images(2);
    spoil(digits.path());
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    let job = || {
        let mut command = elbo();
        command.arg("label").args(job_flags(digits.path(), &out)).args(["--max-bad", "2"]);
        command
    };
    let stopped = run(&mut job());
    assert_eq!(stopped.status.code(), Some(1));
    assert!(stderr(&stopped).contains(&format!("`elbo report {}`", out.display())), "{}", stderr(&stopped));
    assert!(stderr(&stopped).contains("--retry-quarantined"), "{}", stderr(&stopped));
    // No shard is committed: the ledger alone knows what was given up, and is left as it is.
    assert!(!out.join("quarantine").exists());
    for _ in 0..2 {
        let report = json(elbo().args(["report", "--json"]).arg(&out));
        assert!(report["quarantined"].as_u64().unwrap() > 2, "{report}");
        assert_eq!(report["quarantined"], report["quarantined_unwritten"]);
    }
    let text = run_ok(elbo().arg("report").arg(&out)).stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("decode:") && text.contains("--retry-quarantined"), "{text}");
    // Without any change the same command ends as before.
    assert_eq!(run(&mut job()).status.code(), Some(1));

    let one = elbo_tests::sorted(&good.path().join("one"))[0].clone();
    for name in ["one/a-truncated.png", "one/b-empty.png", "two/c-page.jpg", "two/d-bomb.ppm", "two/e-gone.png"] {
        let path = digits.path().join(name);
        std::fs::remove_file(&path).unwrap();
        std::fs::copy(&one, &path).unwrap();
    }
    run_ok(job().arg("--retry-quarantined"));
    let verified = json(elbo().args(["verify", "--json"]).arg(&out));
    assert_eq!((verified["ok"].as_bool(), verified["quarantined"].as_u64()), (Some(true), Some(0)), "{verified}");
    let report = json(elbo().args(["report", "--json"]).arg(&out));
    assert_eq!((report["quarantined"].as_u64(), report.get("quarantined_unwritten")), (Some(0), None));
}
