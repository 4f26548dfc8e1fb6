//! One corpus in every layout: the same images get the same scores wherever they are stored. And bad images, which must not
//! affect other images.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use elbo_core::prediction::Prediction;
use elbo_output::predictions::decode_quarantine;
use elbo_tests::patience::seconds;
use elbo_tests::web::Web;
use elbo_tests::{
    Process, classes, elbo, job_flags, json, make_pipe, predictions, python, results, root, run, run_ok, some_images,
    sorted, stderr, with,
};
use serde_json::json;
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

/// The predictions without the images' keys and labels.
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
fn shards_and_tables_of_other_programs_score_like_plain_files() {
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
        ("up", at("shards/../hugging-face/*.parquet"), "train-00000.parquet/000000"),
        ("paths", at("paths.parquet"), ""),
    ] {
        let rows = label(&images, &outs.path().join(name));
        assert_eq!(without_keys(&rows), without_keys(&expected), "{name}");
        assert!(rows[0].key.starts_with(first_key), "{name}: {}", rows[0].key);
        // Labels are names or numbers, depending on the corpus; the report knows both.
        let report = json(elbo().args(["report", "--json"]).arg(outs.path().join(name)));
        let files = json(elbo().args(["report", "--json"]).arg(outs.path().join("files")));
        assert_eq!(report["accuracy"], files["accuracy"], "{name}");
    }
}

#[test]
fn paths_with_parent_components_give_the_same_job() {
    let (digits, root) = (some_images(1), TempDir::new().unwrap());
    let here = root.path().join("here");
    std::fs::create_dir_all(here.join("x")).unwrap();
    elbo_tests::copy_tree(digits.path(), &root.path().join("digits"));
    std::os::unix::fs::symlink(elbo_tests::model(), root.path().join("model")).unwrap();
    std::fs::copy(elbo_tests::classes(), root.path().join("classes.csv")).unwrap();
    let job = |to: &dyn Fn(&str) -> String| {
        let flags = job_flags(Path::new(&to("digits")), Path::new(&to("out")));
        let flags = elbo_tests::with(flags, &[("--model", &to("model")), ("--classes", &to("classes.csv"))]);
        let mut command = elbo();
        command.current_dir(&here).arg("label").args(flags);
        command
    };
    run_ok(&mut job(&|name| format!("../{name}")));
    let rows = predictions(&root.path().join("out"));
    assert_eq!(rows.len(), 10);
    assert!(rows.iter().all(|row| row.key.split('/').count() == 2 && !row.key.contains("..")), "{:?}", rows[0].key);
    for same in [&|name: &str| text(root.path().join(name)) as String, &|name: &str| format!("./x/../../{name}")]
        as [&dyn Fn(&str) -> String; 2]
    {
        let said = run_ok(&mut job(same)).stdout;
        assert!(String::from_utf8_lossy(&said).contains("nothing was computed"));
    }
}

#[test]
fn a_server_that_cannot_list_is_refused_with_a_remedy() {
    let digits = some_images(1);
    let served = Web::serve(digits.path());
    let outs = TempDir::new().unwrap();
    let refused = run(elbo().arg("label").args(flags(&served.files(), &outs.path().join("out"))));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("shard-{000..099}.tar"), "{}", stderr(&refused));
    assert!(!outs.path().join("out/job.json").exists());
}

/// Replaces some of the images with broken ones; returns how many are bad.
fn spoil(images: &Path) -> usize {
    let at = |name: &str| images.join(name);
    let good = std::fs::read(elbo_tests::sorted(&at("one"))[0].clone()).unwrap();
    let bomb = b"P6 16000 16000 255 ".to_vec();
    std::fs::write(at("one/a-truncated.png"), &good[..good.len() / 2]).unwrap();
    std::fs::write(at("one/b-empty.png"), b"").unwrap();
    std::fs::write(at("two/c-page.jpg"), b"<!doctype html><html>not found</html>").unwrap();
    std::fs::write(at("two/d-bomb.ppm"), bomb).unwrap();
    std::os::unix::fs::symlink("/no/such/image.png", at("two/e-gone.png")).unwrap();
    // The content decides the file type, not the extension.
    std::fs::write(at("two/f-really-a-png.jpg"), &good).unwrap();
    5
}

#[test]
fn bad_images_are_quarantined_and_tried_again_once_they_are_fixed() {
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

    // Nothing is fixed: the output stays the same.
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
    // The file is not deleted: a late deletion could hit a file of another coordinator.
    let quarantine = std::fs::read(out.join("quarantine/shard-00000.parquet")).unwrap();
    assert!(decode_quarantine(quarantine.into()).unwrap().is_empty());
    // Confidences are not compared: they are learned from all images, and there are more now.
    for (old, new) in before.iter().zip(&after).filter(|(old, _)| old.labelled().is_some()) {
        assert_eq!((&old.key, old.scores(), old.evaluations), (&new.key, new.scores(), new.evaluations));
    }
    let verified = json(elbo().args(["verify", "--json"]).arg(&out));
    assert_eq!((verified["ok"].as_bool(), verified["quarantined"].as_u64()), (Some(true), Some(0)));

    // The same as if the images had been good from the start: scores are a function of pixels and keys.
    let fresh = outs.path().join("fresh");
    run_ok(&mut job(&fresh));
    assert_eq!(predictions(&fresh), after);
}

/// Files that are not images are listed by every command, and refused with `--strict`.
#[test]
fn every_command_reports_what_was_passed_over() {
    let (digits, outs) = (some_images(1), TempDir::new().unwrap());
    for (name, content) in [("one/new.avif", "x"), ("two/.DS_Store", "x"), ("labels.csv", "key,label")] {
        std::fs::write(digits.path().join(name), content).unwrap();
    }
    let (images, out) = (text(digits.path().into()), outs.path().join("out"));
    let said = |text: &str| {
        ["extension .avif: 1 (one/new.avif)", "extension .csv: 1 (labels.csv)", "system: 1 (two/.DS_Store)"]
            .iter()
            .all(|reason| text.contains(reason))
    };
    let strict = run(elbo().arg("label").args(flags(&images, &out)).arg("--strict"));
    assert_eq!(strict.status.code(), Some(1));
    assert!(said(&stderr(&strict)) && stderr(&strict).contains("leave out --strict"), "{}", stderr(&strict));
    assert!(!out.join("job.json").exists());

    let labelled = run_ok(elbo().arg("label").args(flags(&images, &out)));
    assert!(said(&stderr(&labelled)), "{}", stderr(&labelled));
    let passed_over = [
        json!({"reason": "hidden", "count": 1, "examples": ["two/.DS_Store"]}),
        json!({"reason": "extension", "detail": "avif", "count": 1, "examples": ["one/new.avif"]}),
        json!({"reason": "extension", "detail": "csv", "count": 1, "examples": ["labels.csv"]}),
    ];
    let job: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
    assert_eq!(job["manifest"]["passed_over"], json!(passed_over));
    assert_eq!(json(elbo().args(["report", "--json"]).arg(&out))["passed_over"], json!(passed_over));
    assert!(said(&String::from_utf8(run_ok(elbo().arg("report").arg(&out)).stdout).unwrap()));
    // The listing is stored now: the same command with --strict is still refused.
    let again = run(elbo().arg("label").args(flags(&images, &out)).arg("--strict"));
    assert!(again.status.code() == Some(1) && said(&stderr(&again)), "{}", stderr(&again));

    let plan = || {
        let mut plan = elbo();
        plan.args(["plan", "--images", &images, "--keep", "1", "--samples", "2", "--classes"]).arg(classes());
        plan
    };
    assert_eq!(json(plan().arg("--json"))["passed_over"], json!(passed_over));
    assert!(said(&String::from_utf8(run_ok(&mut plan()).stdout).unwrap()));
    assert!(said(&stderr(&run(plan().arg("--strict")))));
}

#[test]
fn too_many_bad_images_end_the_job_and_it_resumes_with_a_higher_limit() {
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
fn files_that_are_not_regular_never_block_a_command() {
    let digits = some_images(1);
    let outs = TempDir::new().unwrap();
    make_pipe(&digits.path().join("one/a.png"));
    let _socket = std::os::unix::net::UnixListener::bind(digits.path().join("one/b.png")).unwrap();
    let out = outs.path().join("passed over");
    let labelled = run_ok(elbo().arg("label").args(job_flags(digits.path(), &out)));
    assert_eq!(predictions(&out).len(), 10);
    for told in ["one/a.png", "a named pipe", "one/b.png", "a socket"] {
        assert!(stderr(&labelled).contains(told), "{}", stderr(&labelled));
    }

    // Paths that the user names must be regular files or directories.
    let list = outs.path().join("list.txt");
    std::fs::write(&list, format!("{}/one/a.png\n", digits.path().display())).unwrap();
    make_pipe(&digits.path().join("shard.tar"));
    make_pipe(&digits.path().join("pipe"));
    let at = |name: &str| text(digits.path().join(name));
    for images in [text(list), at("one/a.png"), at("shard.tar"), at("pipe")] {
        let refused = run(elbo().arg("label").args(flags(&images, &outs.path().join("refused"))));
        assert_eq!(refused.status.code(), Some(1), "{images}");
        assert!(stderr(&refused).contains("is a named pipe"), "{images}: {}", stderr(&refused));
    }

    // A small text file may be read from a pipe.
    let out = outs.path().join("piped");
    let mut command = elbo();
    let values = [("--classes", "/dev/stdin"), ("--label-from", "none")];
    command.arg("label").args(with(job_flags(Path::new(&at("one")), &out), &values)).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &std::fs::read(classes()).unwrap()).unwrap();
    let piped = child.wait_with_output().unwrap();
    assert_eq!((piped.status.code(), predictions(&out).len()), (Some(0), 1), "{}", stderr(&piped));
}

#[test]
fn a_very_slow_image_is_given_up_and_delays_no_other_image_for_long() {
    let digits = some_images(2);
    let slow = sorted(&digits.path().join("seven"))[0].file_name().unwrap().to_string_lossy().into_owned();
    let served = Web::serve(digits.path());
    let list: String = sorted(digits.path())
        .iter()
        .flat_map(|class| sorted(class))
        .map(|image| format!("{}/{}\n", served.files(), text(image.strip_prefix(digits.path()).unwrap().into())))
        .collect();
    let outs = TempDir::new().unwrap();
    let file = outs.path().join("list.txt");
    std::fs::write(&file, list).unwrap();
    *served.site.dribble.lock().unwrap() = Some(format!("seven/{slow}"));
    let out = outs.path().join("out");
    let started = Instant::now();
    run_ok(elbo().arg("label").args(flags(&text(file), &out)).args(["--max-bad", "1"]));
    // No other worker can try the image, so there are two rounds of two attempts, each of half a minute.
    assert!(started.elapsed() < seconds(300), "{:?}", started.elapsed());
    let rows = predictions(&out);
    let errors: Vec<_> = rows.iter().filter_map(|row| Some((row.key.as_str(), row.error()?))).collect();
    assert_eq!((rows.len(), errors.len()), (20, 1), "{errors:?}");
    let (key, error) = errors[0];
    assert!(key.ends_with(&slow) && error.contains("came within 30 s"), "{key}: {error}");
    assert_eq!(served.asked().iter().filter(|path| path.ends_with(&format!("seven/{slow}"))).count(), 5);
}

/// Creates a file with Python.
fn make(script: &str, target: &Path) {
    run_ok(Command::new(python("readers/requirements.txt")).arg("-c").arg(script).arg(target));
}

#[test]
fn small_files_with_large_pictures_stay_within_the_memory_limit() {
    let outs = TempDir::new().unwrap();
    let images = outs.path().join("images");
    std::fs::create_dir(&images).unwrap();
    // 192 MB each when decoded: 3 GB together.
    let picture = images.join("00.png");
    make(
        "import sys, zlib, struct\n\
         side = 8000\n\
         packer = zlib.compressobj(1)\n\
         data = b''.join([packer.compress(bytes(1 + 3 * side)) for _ in range(side)] + [packer.flush()])\n\
         part = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))\n\
         head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)\n\
         open(sys.argv[1], 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + part(b'IHDR', head) + part(b'IDAT', data) + part(b'IEND', b''))",
        &picture,
    );
    for copy in 1..16 {
        std::fs::copy(&picture, images.join(format!("{copy:02}.png"))).unwrap();
    }
    let peak = |images: &Path, out: &str, more: &[&str]| {
        let out = outs.path().join(out);
        let mut command = elbo();
        command.arg("label").args(flags(&text(images.into()), &out)).args(["--decode-memory", "512MiB"]).args(more);
        let peak = Process::start(&mut command).peak_memory();
        let rows = predictions(&out);
        assert!(!rows.is_empty() && rows.iter().all(|row| row.error().is_none()));
        peak
    };
    let pictures = peak(&images, "pictures", &[]);
    assert!(pictures < 1 << 30, "pictures took {} MiB", pictures >> 20);

    // One cell of 0.8 MB, shared by 7,000 rows: 5.6 GB if every row is copied.
    let table = outs.path().join("table.parquet");
    make(
        "import os, sys, zlib, struct, pyarrow as pa, pyarrow.parquet as pq\n\
         side = 512\n\
         data = zlib.compress(b''.join(b'\\0' + os.urandom(3 * side) for _ in range(side)))\n\
         part = lambda kind, body: struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))\n\
         head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)\n\
         png = b'\\x89PNG\\r\\n\\x1a\\n' + part(b'IHDR', head) + part(b'IDAT', data) + part(b'IEND', b'')\n\
         image = pa.DictionaryArray.from_arrays(pa.array([0] * 7000, pa.int32()), pa.array([png], pa.binary()))\n\
         pq.write_table(pa.table({'image': image}), sys.argv[1])",
        &table,
    );
    assert!(std::fs::metadata(&table).unwrap().len() < 2 << 20);
    let rows = peak(&table, "rows", &["--limit", "3"]);
    assert!(rows < 1 << 30, "rows took {} MiB", rows >> 20);
}

#[test]
fn the_advice_of_error_and_report_after_too_many_bad_images_works() {
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
    // No shard is committed: only the ledger knows which samples were given up, and `report` must not change it.
    assert!(!out.join("quarantine").exists());
    for _ in 0..2 {
        let report = json(elbo().args(["report", "--json"]).arg(&out));
        assert!(report["quarantined"].as_u64().unwrap() > 2, "{report}");
        assert_eq!(report["quarantined"], report["quarantined_unwritten"]);
    }
    let text = run_ok(elbo().arg("report").arg(&out)).stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("decode:") && text.contains("--retry-quarantined"), "{text}");
    // Without a change, the same command fails as before.
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
