//! Whole jobs with other models than Stable Diffusion: class-conditional, contrastive, and a contrastive shortlist in front of
//! another model.

#![allow(clippy::unwrap_used, clippy::panic)] // clippy's leave for tests does not reach their helpers

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use elbo_core::class::Classes;
use elbo_models::{ContrastiveModel, LoadOptions};
use elbo_tests::{classes, elbo, json, model, predictions, root, run, run_ok, some_images, stderr};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

fn dit() -> PathBuf {
    fixture("digits-dit/model")
}

fn clip() -> PathBuf {
    fixture("contrastive/clip")
}

/// Runs `elbo label` with flags into a new output.
fn label(images: &Path, model: &Path, flags: &[&str]) -> TempDir {
    let out = TempDir::new().unwrap();
    let mut command = elbo();
    command.arg("label").arg("--images").arg(images).arg("--model").arg(model).arg("--out").arg(out.path());
    run_ok(command.args(flags).args(["--label-from", "parent", "--progress", "none", "--batch", "16"]));
    out
}

/// The message of an `elbo label` that must be refused as bad usage.
fn refusal(model: &Path, flags: &[&str]) -> String {
    let (digits, out) = (some_images(1), TempDir::new().unwrap());
    let mut command = elbo();
    command.arg("label").arg("--images").arg(digits.path()).arg("--model").arg(model);
    let output = run(command.arg("--out").arg(out.path().join("out")).args(flags));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    stderr(&output)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_class_map_joins_several_model_classes_into_one() {
    let (digits, dir) = (some_images(2), TempDir::new().unwrap());
    let map = dir.path().join("map.csv");
    let names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let row = |(label, name): (usize, &&str)| {
        let class = if label < 5 { "small,40" } else { "large,70" };
        // A class of the model is given by label or by its name.
        if label % 2 == 0 { format!("{label},{class}\n") } else { format!("{name},{class}\n") }
    };
    let rows: String = names.iter().enumerate().map(row).collect();
    std::fs::write(&map, format!("model_class,classname,classidx\n{rows}")).unwrap();
    let labels = dir.path().join("labels.csv");
    let keys = predictions(label(digits.path(), &dit(), &["--samples", "2", "--keep", "1"]).path());
    let label_of = |key: &str| {
        let digit = names.iter().position(|name| key.starts_with(name)).unwrap();
        if digit < 5 { "small" } else { "large" }
    };
    let rows: String = keys.iter().map(|row| format!("{},{}\n", row.key, label_of(&row.key))).collect();
    std::fs::write(&labels, format!("key,label\n{rows}")).unwrap();

    let out = TempDir::new().unwrap();
    let mut command = elbo();
    command.arg("label").arg("--images").arg(digits.path()).arg("--model").arg(dit()).arg("--out").arg(out.path());
    command.arg("--class-map").arg(&map).arg("--label-from").arg(&labels);
    run_ok(command.args(["--policy", "exhaustive", "--samples", "20", "--progress", "none"]));
    let rows = predictions(out.path());
    for row in &rows {
        let labelled = row.labelled().unwrap();
        let classes: Vec<_> = labelled.scores.iter().map(|score| score.class.0).collect();
        assert!(classes == [40, 70] || classes == [70, 40], "{classes:?}");
        assert_eq!(labelled.class.0, if labelled.class_name == "small" { 40 } else { 70 });
    }
    let report = json(elbo().arg("report").arg(out.path()).arg("--json"));
    assert!(report["accuracy"]["top1"].as_f64() >= Some(0.9), "{report}");
}

#[test]
fn the_variational_bound_is_a_loss_for_models_with_learned_variance() {
    let digits = some_images(1);
    let flags = |loss| ["--policy", "exhaustive", "--samples", "4", "--noise-scope", "shared", "--loss", loss];
    let outs = ["l2", "vlb", "l2+vlb"].map(|loss| predictions(label(digits.path(), &dit(), &flags(loss)).path()));
    for ((l2, vlb), both) in outs[0].iter().zip(&outs[1]).zip(&outs[2]) {
        for class in 0..10 {
            let [l2, vlb, both] = [l2, vlb, both].map(|row| {
                row.labelled().unwrap().scores.iter().find(|score| score.class.0 == class).unwrap().mean_error
            });
            assert!(vlb > 0.0 && (both / (l2 + vlb) - 1.0).abs() < 1e-5, "{l2} {vlb} {both}");
        }
    }
    let refused = refusal(&model(), &["--classes", &text(&classes()), "--loss", "vlb"]);
    assert!(refused.contains("learned its variance"), "{refused}");
}

#[test]
fn classes_missing_from_a_class_conditional_model_are_refused() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("classes.csv");
    std::fs::write(&file, "prompt,classname,classidx\na,eleven,11\n").unwrap();
    let (digits, out) = (some_images(1), dir.path().join("out"));
    let mut command = elbo();
    command.arg("label").arg("--images").arg(digits.path()).arg("--model").arg(dit()).arg("--classes").arg(&file);
    let output = run(command.arg("--out").arg(&out));
    assert!(stderr(&output).contains("the model has no class 11"), "{}", stderr(&output));
    let refused = refusal(&model(), &["--class-map", &text(&file)]);
    assert!(refused.contains("--class-map is for class-conditional models"), "{refused}");
}

/// 1 - cosine of each image's and each class's embeddings, computed without the pipeline.
fn distances(model: &ContrastiveModel, images: &[PathBuf], classes: &Classes) -> Vec<Vec<f32>> {
    let texts: Vec<String> = classes.prompts.iter().map(|prompt| prompt.text.clone()).collect();
    let texts = model.encode_texts(&texts).unwrap();
    let preprocessing = model.preprocessing();
    let distances = |path: &PathBuf| {
        let pixels = preprocessing.apply(&std::fs::read(path).unwrap()).unwrap();
        let side = preprocessing.size as usize;
        let pixels = Tensor::from_vec(pixels, (1, side, side, 3), &candle_core::Device::Cpu).unwrap();
        let products = model.encode_images(&pixels).unwrap().matmul(&texts.t().unwrap()).unwrap();
        (1.0 - products).unwrap().get(0).unwrap().to_vec1().unwrap()
    };
    images.iter().map(distances).collect()
}

#[test]
fn a_contrastive_model_scores_all_classes_in_one_evaluation() {
    let digits = some_images(1);
    let out = label(digits.path(), &clip(), &["--classes", &text(&classes())]);
    let rows = predictions(out.path());
    let model = ContrastiveModel::load(&clip(), &LoadOptions::default()).unwrap();
    let images: Vec<_> = rows.iter().map(|row| digits.path().join(&row.key)).collect();
    let read = elbo_data::given::classes(&classes(), &[]).unwrap();
    assert_eq!(rows.len(), 10);
    for (row, expected) in rows.iter().zip(distances(&model, &images, &read)) {
        let scores = &row.labelled().unwrap().scores;
        assert_eq!((row.evaluations, scores.len()), (10, 10));
        assert!(scores.is_sorted_by(|a, b| a.mean_error <= b.mean_error));
        for score in scores {
            assert_eq!(score.n, 1);
            assert!((score.mean_error - expected[score.class.0 as usize]).abs() < 1e-5);
        }
    }
    let plan = json(elbo().args(["plan", "--json", "--classes"]).arg(classes()).arg("--model").arg(clip()));
    assert_eq!(plan["evaluations_per_image"], 10);
    let refused = refusal(&clip(), &["--classes", &text(&classes()), "--samples", "5"]);
    assert!(refused.contains("sees an image once"), "{refused}");
}

/// The job's description is larger than a message may be, and so are the results of all images.
#[test]
fn a_hundred_thousand_prompts_stay_within_the_message_limit() {
    const CLASSES: usize = 100_000;
    let (digits, dir) = (some_images(2), TempDir::new().unwrap());
    let file = dir.path().join("classes.csv");
    // The model never sees text beyond its token limit, but that text is part of the job.
    let rest = "of a kind that takes many words to tell from all the others ".repeat(6);
    let rows: String = (0..CLASSES).map(|i| format!("number {i} {rest},class {i},{i}\n")).collect();
    std::fs::write(&file, format!("prompt,classname,classidx\n{rows}")).unwrap();
    assert!(rows.len() > elbo_proto::MAX_MESSAGE_BYTES);
    let out = TempDir::new().unwrap();
    let mut command = elbo();
    command.arg("label").arg("--images").arg(digits.path()).arg("--model").arg(clip()).arg("--out").arg(out.path());
    run_ok(command.arg("--classes").arg(&file).args(["--progress", "none", "--batch", "256"]));
    let rows = predictions(out.path());
    let model = ContrastiveModel::load(&clip(), &LoadOptions::default()).unwrap();
    let images: Vec<_> = rows.iter().map(|row| digits.path().join(&row.key)).collect();
    let some: String = (0..50).map(|i| 1_999 * i).map(|i| format!("number {i} {rest},class {i},{i}\n")).collect();
    let some = Classes::parse(&format!("prompt,classname,classidx\n{some}"), &[]).unwrap();
    assert_eq!(rows.len(), 20);
    for (row, expected) in rows.iter().zip(distances(&model, &images, &some)) {
        let scores = &row.labelled().unwrap().scores;
        assert_eq!((row.evaluations as usize, scores.len()), (CLASSES, CLASSES));
        for (i, expected) in expected.iter().enumerate() {
            let score = scores.iter().find(|score| score.class.0 as usize == 1_999 * i).unwrap();
            assert!(score.n == 1 && (score.mean_error - expected).abs() < 1e-5, "{score:?} and {expected}");
        }
    }
    let verified = json(elbo().args(["verify", "--json"]).arg(out.path()));
    assert_eq!((verified["ok"].as_bool(), verified["quarantined"].as_u64()), (Some(true), Some(0)), "{verified}");
}

#[test]
fn a_shortlist_decides_which_classes_the_diffusion_model_evaluates() {
    let digits = some_images(1);
    let (file, shortlist) = (text(&classes()), format!("{}:4", clip().display()));
    let schedule = ["--classes", &file, "--keep", "2,1", "--samples", "4,8"];
    let flags = [&schedule[..], &["--shortlist", &shortlist]].concat();
    let rows = predictions(label(digits.path(), &model(), &flags).path());
    let contrastive = predictions(label(digits.path(), &clip(), &["--classes", &file]).path());
    let alone = predictions(label(digits.path(), &model(), &schedule).path());
    let mut compared = 0;
    for ((row, contrastive), alone) in rows.iter().zip(&contrastive).zip(&alone) {
        let scores = &row.labelled().unwrap().scores;
        let (listed, others) = scores.split_at(4);
        let picked: Vec<_> = contrastive.labelled().unwrap().scores[..4].iter().map(|score| score.class).collect();
        assert!(listed.iter().all(|score| picked.contains(&score.class) && score.round.0 > 0 && score.n >= 4));
        // Classes outside the shortlist keep the contrastive model's score; those on it get only the diffusion model's.
        for score in others {
            let first = contrastive.labelled().unwrap().scores.iter().find(|s| s.class == score.class).unwrap();
            assert_eq!((score.round.0, score.n, score.mean_error), (0, 1, first.mean_error));
        }
        for score in listed {
            let same = alone.labelled().unwrap().scores.iter().find(|s| s.class == score.class).unwrap();
            if same.n == score.n {
                assert_eq!(score.mean_error, same.mean_error);
                compared += 1;
            }
        }
    }
    assert!(compared >= rows.len(), "{compared}");
    let mut plan = elbo();
    plan.args(["plan", "--json", "--model"]).arg(model()).args(&flags);
    assert_eq!(json(&mut plan)["evaluations_per_image"], 10 + 4 * 4 + 2 * 4);
    let short = format!("{}:1", clip().display());
    let refused = refusal(&model(), &[&schedule[..], &["--shortlist", &short]].concat());
    assert!(refused.contains("--shortlist: a shortlist of 1 "), "{refused}");
    let diffusion = format!("{}:4", model().display());
    let refused = refusal(&model(), &[&schedule[..], &["--shortlist", &diffusion]].concat());
    assert!(refused.contains("needs a CLIP"), "{refused}");
}

#[test]
fn a_race_follows_a_shortlist() {
    let digits = some_images(2);
    let (file, shortlist) = (text(&classes()), format!("{}:4", clip().display()));
    let rows = predictions(label(digits.path(), &model(), &["--classes", &file, "--shortlist", &shortlist]).path());
    let alone = predictions(label(digits.path(), &model(), &["--classes", &file]).path());
    let mut compared = 0;
    for (row, alone) in rows.iter().zip(&alone) {
        // Four prompts race on three slots at first; the others keep the contrastive model's score.
        let (listed, others) = row.scores().split_at(4);
        assert!(listed.iter().all(|score| score.round.0 > 0 && score.n >= 3), "{row:?}");
        assert!(others.iter().all(|score| score.round.0 == 0 && score.n == 1), "{row:?}");
        assert_eq!(row.evaluations, row.scores().iter().map(|score| score.n).sum::<u32>());
        // On the same slots a class has the same errors, whichever other classes race.
        for score in listed {
            let same = alone.scores().iter().find(|s| s.class == score.class).unwrap();
            if same.n == score.n {
                assert_eq!(score.mean_error, same.mean_error);
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "nothing was compared");
}

#[test]
fn inspect_describes_a_model_and_its_problems() {
    for (name, family, prediction, size, latent) in [
        ("digits-dit/model", "DiT", "epsilon", 32, 4),
        ("sd2-v/model", "Stable Diffusion", "v_prediction", 128, 4),
        ("sdxl/model", "Stable Diffusion XL", "epsilon", 128, 4),
        ("sd35/model", "Stable Diffusion 3", "flow", 128, 16),
    ] {
        let seen = json(elbo().arg("inspect").arg(fixture(name)).arg("--json"));
        assert_eq!((seen["ok"].as_bool(), seen["family"].as_str()), (Some(true), Some(family)), "{seen}");
        assert_eq!(seen["notes"], serde_json::json!([]));
        assert_eq!((seen["prediction"].as_str(), seen["native_size"].as_u64()), (Some(prediction), Some(size)));
        assert_eq!(seen["latent"][0].as_u64(), Some(latent));
        let (parameters, f32) = (seen["parameters"].as_u64().unwrap(), seen["memory"]["f32"].as_u64().unwrap());
        assert!(parameters > 10_000 && f32 == 4 * parameters);
    }
    let seen = json(elbo().arg("inspect").arg(clip()).arg("--json"));
    assert_eq!((seen["ok"].as_bool(), seen["family"].as_str()), (Some(true), Some("CLIP")), "{seen}");
    assert!(seen["parameters"].as_u64() > Some(10_000) && seen["native_size"].as_u64() == Some(32), "{seen}");
    let broken = TempDir::new().unwrap();
    elbo_tests::copy_tree(&fixture("digits-dit/model"), broken.path());
    std::fs::remove_file(broken.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    std::fs::remove_file(broken.path().join("scheduler/scheduler_config.json")).unwrap();
    let output = run(elbo().arg("inspect").arg(broken.path()).arg("--json"));
    assert_eq!(output.status.code(), Some(1));
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let problems: Vec<_> = seen["problems"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert!(problems.len() == 2 && problems.iter().any(|p| p.contains("vae/")), "{problems:?}");
}
