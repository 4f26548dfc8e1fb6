//! Lists of images, captions per image, pairs as in Winoground, and several prompts per class.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

use std::path::{Path, PathBuf};

use elbo_core::ids::ClassIndex;
use elbo_core::prediction::Prediction;
use elbo_output::predictions::decode_errors;
use elbo_tests::{classes, elbo, images, json, model, predictions, results, run, run_ok, some_images, sorted, stderr};
use serde_json::Value;
use tempfile::TempDir;

const THREE: &str = "a photo of the digit three";
const EIGHT: &str = "a photo of the digit eight";

/// A list of pairs of a three and an eight, with paths relative to the list.
fn pairs(dir: &Path, count: usize) -> PathBuf {
    let (threes, eights) = (sorted(&images().join("three")), sorted(&images().join("eight")));
    let mut rows = String::from("path,label,caption_0,caption_1,pair\n");
    for (i, (three, eight)) in threes.iter().zip(&eights).take(count).enumerate() {
        for (name, image, label) in [("three", three, THREE), ("eight", eight, "1")] {
            let file = format!("{name}-{i}.png");
            std::fs::copy(image, dir.join(&file)).unwrap();
            rows.push_str(&format!("{file},{label},{THREE},{EIGHT},pair {i}\n"));
        }
    }
    let list = dir.join("pairs.csv");
    std::fs::write(&list, rows).unwrap();
    list
}

fn label(list: &Path, flags: &[&str]) -> TempDir {
    let out = TempDir::new().unwrap();
    let mut command = elbo();
    command.arg("label").arg("--images").arg(list).arg("--model").arg(model()).arg("--out").arg(out.path());
    run_ok(command.args(flags).args(["--progress", "none", "--batch", "16"]));
    out
}

fn error_of(row: &Prediction, caption: i32) -> f32 {
    let scores = &row.labelled().unwrap().scores;
    scores.iter().find(|score| score.class == ClassIndex(caption)).unwrap().mean_error
}

#[test]
fn pairs_are_scored_as_in_winoground() {
    let dir = TempDir::new().unwrap();
    let list = pairs(dir.path(), 6);
    let out = label(&list, &["--candidates", "caption_0,caption_1", "--samples", "20", "--write-errors"]);
    let rows = predictions(out.path());
    assert_eq!(rows.len(), 12);
    let find = |key: String| rows.iter().find(|row| row.key == key).unwrap();
    let mut right = [0.0; 3];
    for i in 0..6 {
        let (three, eight) = (find(format!("three-{i}.png")), find(format!("eight-{i}.png")));
        let text = error_of(three, 0) < error_of(three, 1) && error_of(eight, 1) < error_of(eight, 0);
        let image = error_of(three, 0) < error_of(eight, 0) && error_of(eight, 1) < error_of(three, 1);
        for (count, right) in right.iter_mut().zip([text, image, text && image]) {
            *count += f64::from(u8::from(right));
        }
    }
    for row in &rows {
        let labelled = row.labelled().unwrap();
        assert_eq!((row.evaluations, labelled.scores.len()), (40, 2));
        assert_eq!(labelled.class_name, [THREE, EIGHT][labelled.class.0 as usize]);
    }
    let report = json(elbo().arg("report").arg(out.path()).arg("--json"));
    assert_eq!(report["pairs"]["n"], 6);
    for (name, count) in ["text", "image", "group"].into_iter().zip(right) {
        let p = count / 6.0;
        let score = &report["pairs"][name];
        assert_eq!(score["score"].as_f64(), Some(p), "{name}: {report}");
        // The Wilson interval.
        let square = 1.959_963_985f64.powi(2) / 6.0;
        let (centre, spread) = (p + square / 2.0, (square * p * (1.0 - p) + square * square / 4.0).sqrt());
        for (of, expected) in [("low", centre - spread), ("high", centre + spread), ("interval", spread)] {
            let expected = expected / (1.0 + square);
            assert!((score[of].as_f64().unwrap() - expected).abs() < 1e-7, "{name} {of}: {report}");
        }
    }
    assert!(report["pairs"]["text"]["score"].as_f64() >= Some(0.8), "{report}");
    let top1 = rows.iter().filter(|row| row.labelled().unwrap().class.0 == i32::from(row.key.starts_with("eight")));
    assert_eq!(report["accuracy"]["top1"].as_f64(), Some(top1.count() as f64 / 12.0));

    // These scores do not depend on whether an image is confident enough to get a class.
    let unsure =
        ["--candidates", "caption_0,caption_1", "--samples", "20", "--write-errors", "--abstain-below", "0.99"];
    let unsure = json(elbo().args(["report", "--json"]).arg(label(&list, &unsure).path()));
    assert!(unsure["uncertain"].as_u64() > Some(0), "{unsure}");
    assert_eq!(unsure["pairs"], report["pairs"]);

    // Both images of a pair share their noise. Listed alone, each draws its own noise and gets other scores.
    let apart = std::fs::read_to_string(&list).unwrap().replace(",pair 0\n", ",\n");
    std::fs::write(&list, apart).unwrap();
    let other = label(&list, &["--candidates", "caption_0,caption_1", "--samples", "20"]);
    let others = predictions(other.path());
    let changed: Vec<_> =
        rows.iter().zip(&others).filter(|(a, b)| a.scores() != b.scores()).map(|(a, _)| a.key.as_str()).collect();
    assert_eq!(changed, ["three-0.png", "eight-0.png"]);
}

#[test]
fn captions_may_be_a_json_array_of_any_length() {
    let dir = TempDir::new().unwrap();
    let image = sorted(&images().join("three")).remove(0);
    let mut writer = String::from("path,texts,label\n");
    for (name, texts, label) in [
        ("a.png", format!(r#"["{EIGHT}", "{THREE}", "a photo of the digit one"]"#), "1"),
        ("b.png", format!(r#"["{THREE}"]"#), THREE),
    ] {
        std::fs::copy(&image, dir.path().join(name)).unwrap();
        writer.push_str(&format!("{name},\"{}\",{label}\n", texts.replace('"', "\"\"")));
    }
    let list = dir.path().join("list.csv");
    std::fs::write(&list, writer).unwrap();
    let out = label(&list, &["--candidates", "texts", "--samples", "8"]);
    let rows = predictions(out.path());
    assert_eq!(rows.iter().map(|row| row.evaluations).collect::<Vec<_>>(), [24, 8]);
    assert_eq!(rows[0].labelled().unwrap().class_name, THREE);
    let mut plan = elbo();
    plan.args(["plan", "--json", "--candidates", "texts", "--samples", "8", "--images"]).arg(&list);
    assert_eq!(json(&mut plan)["evaluations_total"], 32);
    let report = json(elbo().arg("report").arg(out.path()).arg("--json"));
    assert_eq!((report["accuracy"]["top1"].as_f64(), report["pairs"].is_null()), (Some(1.0), true), "{report}");
}

#[test]
fn an_image_whose_captions_have_the_same_tokens_is_quarantined_with_both_named() {
    let dir = TempDir::new().unwrap();
    let image = sorted(&images().join("three")).remove(0);
    let mut list = String::from("path\tc0\tc1\n");
    for (name, second) in [("a.png", "A PHOTO of the digit three"), ("b.png", EIGHT)] {
        std::fs::copy(&image, dir.path().join(name)).unwrap();
        list.push_str(&format!("{name}\t{THREE}\t{second}\n"));
    }
    let file = dir.path().join("list.tsv");
    std::fs::write(&file, list).unwrap();
    let rows = predictions(label(&file, &["--candidates", "c0,c1", "--samples", "8", "--max-bad", "1"]).path());
    let error = rows[0].error().unwrap();
    assert!(error.contains("caption 0 'a photo of the digit three' and caption 1 'A PHOTO of"), "{error}");
    assert_eq!(rows[1].labelled().unwrap().class_name, THREE);
}

#[test]
fn captions_give_the_same_bytes_however_samples_are_grouped_into_blocks() {
    let dir = TempDir::new().unwrap();
    let list = pairs(dir.path(), 5);
    let flags = ["--candidates", "caption_0,caption_1", "--samples", "12", "--shard-size", "4", "--write-errors"];
    // One worker gets whole shards as blocks; three workers share them.
    let (one, three) = (label(&list, &flags), label(&list, &[&flags[..], &["--workers", "3"]].concat()));
    assert_eq!(results(one.path()).len(), 6);
    assert!(results(one.path()) == results(three.path()));
}

#[test]
fn the_reference_policy_keeps_all_of_few_captions_and_mixed_pairs_stay_unscored() {
    let dir = TempDir::new().unwrap();
    let list = pairs(dir.path(), 1);
    let image = sorted(&images().join("two")).remove(0);
    let mut rows = std::fs::read_to_string(&list).unwrap().replace(",pair\n", ",pair,caption_2\n");
    rows = rows.replace(",pair 0\n", ",pair 0,\n");
    rows.push_str(&format!("{},2,{THREE},{EIGHT},,a photo of the digit two\n", image.display()));
    std::fs::write(&list, rows).unwrap();
    let flags = ["--candidates", "caption_0,caption_1,caption_2", "--policy", "reference", "--trials", "1"];
    let evaluations = |out: &TempDir| predictions(out.path()).iter().map(|row| row.evaluations).collect::<Vec<_>>();

    // Four slots for all captions, then four more for two of them.
    let kept = label(&list, &[&flags[..], &["--keep", "2,1", "--samples", "4,8"]].concat());
    assert_eq!(evaluations(&kept), [16, 16, 20]);
    let report = json(elbo().arg("report").arg(kept.path()).arg("--json"));
    assert_eq!((report["pairs"]["n"].as_u64(), report["pairs"]["incomplete"].as_u64()), (Some(1), Some(0)));

    // A pair whose captions were scored on different slots is named, not silently scored.
    let left = label(&list, &[&flags[..], &["--keep", "1,1", "--samples", "4,8"]].concat());
    assert_eq!(evaluations(&left), [12, 12, 16]);
    let report = json(elbo().arg("report").arg(left.path()).arg("--json"));
    assert_eq!((report["pairs"]["n"].as_u64(), report["pairs"]["incomplete"].as_u64()), (Some(0), Some(1)));
    let text = run_ok(elbo().arg("report").arg(left.path())).stdout;
    assert!(String::from_utf8_lossy(&text).contains("pair 0: its captions were not scored on the same slots"));
}

#[test]
fn a_list_of_paths_is_labelled_like_its_directory() {
    let digits = some_images(1);
    let mut keys: Vec<String> = Vec::new();
    for class in sorted(digits.path()) {
        for image in sorted(&class) {
            keys.push(image.strip_prefix(digits.path()).unwrap().to_string_lossy().into_owned());
        }
    }
    let list = digits.path().join("list.txt");
    std::fs::write(&list, keys.join("\n")).unwrap();
    let flags = ["--classes".to_owned(), classes().to_string_lossy().into_owned()];
    let flags = [&flags[0], &flags[1], "--samples", "4", "--policy", "exhaustive"];
    let (listed, whole) = (label(&list, &flags), label(digits.path(), &flags));
    assert_eq!(predictions(listed.path()), predictions(whole.path()));
}

#[test]
fn unusable_lists_are_refused_with_the_line_and_reason() {
    let dir = TempDir::new().unwrap();
    std::fs::copy(sorted(&images().join("one")).remove(0), dir.path().join("a.png")).unwrap();
    let refused = |name: &str, content: &str, flags: &[&str]| {
        let (list, out) = (dir.path().join(name), TempDir::new().unwrap());
        std::fs::write(&list, content).unwrap();
        let mut command = elbo();
        command.arg("label").arg("--images").arg(&list).arg("--model").arg(model()).args(flags);
        let output = run(command.arg("--out").arg(out.path().join("out")).args(["--progress", "none"]));
        assert!(!output.status.success());
        stderr(&output)
    };
    let file = classes().to_string_lossy().into_owned();
    let plain = ["--classes", &file];
    for (name, content, flags, expected) in [
        ("l.txt", "a.png\na.png\n", &plain[..], ["line 2", "a.png"]),
        ("l.txt", "a.png\nmissing.png\n", &plain, ["line 2", "missing.png"]),
        ("l.csv", "file,label\na.png,one\n", &plain, ["path", "column"]),
        ("l.csv", "path,texts\na.png,[1\n", &["--candidates", "texts"], ["line 2", "JSON"]),
        ("l.csv", "path,texts\na.png,[]\n", &["--candidates", "texts"], ["line 2", "caption"]),
        ("l.csv", "path,texts\na.png,[]\n", &["--candidates", "other"], ["other", "column"]),
        ("l.csv", "path,texts\na.png,[]\n", &["--candidates", "texts", "--classes", &file], ["--classes", "exclude"]),
    ] {
        let message = refused(name, content, flags);
        assert!(expected.iter().all(|part| message.contains(part)), "{content:?}: {message}");
    }
}

#[test]
fn a_class_gets_the_mean_or_the_best_error_of_its_prompts() {
    let (digits, dir) = (some_images(1), TempDir::new().unwrap());
    let file = dir.path().join("classes.csv");
    let names = ["zero", "one", "two", "three"];
    let rows: String = (0..4)
        .flat_map(|i| ["a photo of the digit", "the number"].map(|start| format!("{start} {},{0},{i}\n", names[i])))
        .collect();
    std::fs::write(&file, format!("prompt,classname,classidx\n{rows}")).unwrap();
    let classes = file.to_string_lossy().into_owned();
    let job = |more: &[&str]| label(digits.path(), &[&["--classes", &classes, "--write-errors"], more].concat());
    let exhaustive = ["--policy", "exhaustive", "--samples", "8"];
    let (max, mean) = (job(&exhaustive), job(&[&exhaustive[..], &["--prompt-ensemble", "mean"]].concat()));
    let errors = decode_errors(std::fs::read(max.path().join("errors/shard-00000.parquet")).unwrap().into()).unwrap();
    let of_prompt = |row: &Prediction, prompt: u32| {
        let own = errors.iter().filter(|e| e.sample == row.sample && e.prompt.0 == prompt);
        own.map(|e| f64::from(e.error)).sum::<f64>() / 8.0
    };
    for (max, mean) in predictions(max.path()).iter().zip(&predictions(mean.path())) {
        for class in 0..4 {
            let (a, b) = (of_prompt(max, 2 * class), of_prompt(max, 2 * class + 1));
            assert!((f64::from(error_of(max, class as i32)) / a.min(b) - 1.0).abs() < 1e-6);
            assert!((f64::from(error_of(mean, class as i32)) / ((a + b) / 2.0) - 1.0).abs() < 1e-6);
        }
    }
    // With the mean, --keep counts classes, whose prompts are kept together.
    let kept = job(&["--prompt-ensemble", "mean", "--keep", "2,1", "--samples", "4,8"]);
    for row in predictions(kept.path()) {
        let rounds: Vec<_> = row.labelled().unwrap().scores.iter().map(|score| score.round.0).collect();
        assert_eq!((rounds, row.evaluations), (vec![1, 1, 0, 0], 8 * 4 + 4 * 4));
    }
    let plan = |more: &[&str]| -> Value {
        let mut command = elbo();
        json(command.args(["plan", "--json", "--classes", &classes]).args(more))
    };
    let seen = plan(&["--prompt-ensemble", "mean", "--keep", "2,1", "--samples", "4,8"]);
    assert_eq!(seen["evaluations_per_image"], 8 * 4 + 4 * 4);
}
