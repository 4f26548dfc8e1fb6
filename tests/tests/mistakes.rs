//! Mistakes get a clear message and the right exit code, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::PathBuf;
use std::process::Command;

use elbo_tests::{
    classes, copy_tree, elbo, images, job_flags, json, model, results, root, run, run_ok, some_images, stderr,
};
use tempfile::TempDir;

struct Case {
    images: PathBuf,
    model: PathBuf,
    classes: PathBuf,
    out: PathBuf,
    flags: Vec<&'static str>,
}

impl Case {
    fn new(outs: &TempDir) -> Self {
        Self { images: images(), model: model(), classes: classes(), out: outs.path().join("out"), flags: vec![] }
    }

    fn command(&self) -> Command {
        let mut command = elbo();
        command.arg("label").arg("--images").arg(&self.images).arg("--model").arg(&self.model);
        command.arg("--classes").arg(&self.classes).arg("--out").arg(&self.out).args(&self.flags);
        command
    }

    /// Runs the command, which must fail with `code` and a message that contains all of `words`.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        let output = run(&mut self.command());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{message}");
        for word in words {
            assert!(message.contains(word), "'{word}' is not in: {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    }
}

#[test]
fn impossible_flags_are_bad_usage() {
    let outs = TempDir::new().unwrap();
    let with = |flags: Vec<&'static str>| Case { flags, ..Case::new(&outs) };
    with(vec!["--keep", "5,1", "--samples", "20"]).fails(2, &["--keep and --samples: 2 stages", "same number"]);
    with(vec!["--keep", "11,1", "--samples", "20,100"])
        .fails(2, &["--keep: a stage can't keep 11 of 10", "use at most 10"]);
    with(vec!["--keep", "1,5", "--samples", "20,100"]).fails(2, &["must not grow"]);
    with(vec!["--keep", "5,1", "--samples", "20,2000"]).fails(2, &["--samples: 2000 timesteps", "use at most 1000"]);
    with(vec!["--policy", "exhaustive", "--keep", "5"]).fails(2, &["--keep has no meaning"]);
    with(vec!["--policy", "exhaustive", "--samples", "5,10"])
        .fails(2, &["--samples: the exhaustive policy", "one number of timesteps"]);
    with(vec!["--preset", "cats"]).fails(2, &["unknown preset 'cats'", "pets"]);
    with(vec!["--loss", "l3"]).fails(2, &["unknown loss 'l3'"]);
    with(vec!["--dtype", "f8"]).fails(2, &["unknown dtype 'f8'", "bf16"]);
    Case { model: "hf://digits".into(), ..Case::new(&outs) }.fails(2, &["hf://owner/name"]);
    with(vec!["--lora", "x.safetensors:nan"]).fails(2, &["FILE:SCALE"]);
    with(vec!["--size", "33"]).fails(2, &["--size 33", "multiple of"]);
    with(vec!["--device", "cuda"]).fails(2, &["--device cuda", "cpu"]);
    with(vec!["--template", "a photo"]).fails(2, &["has no {}"]);
    with(vec!["--max-bad", "lots"]).fails(2, &["share like 5%"]);
    let missing = run(elbo().arg("label"));
    assert_eq!(missing.status.code(), Some(2));
    assert!(stderr(&missing).contains("--out is missing"));
}

#[test]
fn a_model_that_cannot_be_loaded_is_named_and_no_output_is_created() {
    let outs = TempDir::new().unwrap();
    let broken = outs.path().join("model");
    Case { model: "/no/such/model".into(), ..Case::new(&outs) }.fails(1, &["/no/such/model", "diffusers layout"]);
    Case { model: images(), ..Case::new(&outs) }.fails(1, &["model_index.json"]);

    copy_tree(&model(), &broken);
    let case = Case { model: broken.clone(), ..Case::new(&outs) };
    let weights = broken.join("unet/diffusion_pytorch_model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    case.fails(1, &["unet", "diffusion_pytorch_model"]);
    // The weights of another network, the VAE.
    std::fs::copy(model().join("vae/diffusion_pytorch_model.safetensors"), &weights).unwrap();
    case.fails(1, &["unet/diffusion_pytorch_model.safetensors"]);
    std::fs::write(&weights, b"not safetensors").unwrap();
    case.fails(1, &["unet/diffusion_pytorch_model.safetensors"]);
    // Right names but wrong shapes: a configuration with another width.
    std::fs::copy(model().join("unet/diffusion_pytorch_model.safetensors"), &weights).unwrap();
    let config = broken.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"cross_attention_dim\": 32", "\"cross_attention_dim\": 48")).unwrap();
    case.fails(1, &["to_k.weight", "48", "32"]);
    std::fs::write(&config, "{").unwrap();
    case.fails(1, &["unet/config.json"]);
    assert!(!case.out.exists(), "a job that can't run must leave nothing behind");
}

#[test]
fn empty_missing_or_mislabelled_datasets_are_refused() {
    let outs = TempDir::new().unwrap();
    let empty = TempDir::new().unwrap();
    Case { images: "/no/such/images".into(), ..Case::new(&outs) }.fails(1, &["/no/such/images"]);
    Case { images: empty.path().into(), ..Case::new(&outs) }.fails(1, &["no image"]);
    // A label that is not a class.
    let digits = some_images(1);
    std::fs::rename(digits.path().join("zero"), digits.path().join("null")).unwrap();
    Case { images: digits.path().into(), flags: vec!["--label-from", "parent"], ..Case::new(&outs) }
        .fails(1, &["'null'", "not among the classes"]);
}

#[test]
fn wrong_class_files_are_refused_with_the_line() {
    let outs = TempDir::new().unwrap();
    let file = outs.path().join("classes.csv");
    let case = Case { classes: file.clone(), ..Case::new(&outs) };
    case.fails(1, &["classes.csv"]);
    std::fs::write(&file, "").unwrap();
    case.fails(1, &["no class"]);
    std::fs::write(&file, "prompt,classname,classidx\na,cat,x\n").unwrap();
    case.fails(1, &["line 2", "classidx 'x'"]);
}

#[test]
fn indistinguishable_classes_are_refused_before_anything_is_computed() {
    let outs = TempDir::new().unwrap();
    let file = outs.path().join("classes.csv");
    let case = Case {
        classes: file.clone(),
        flags: vec!["--limit", "1", "--policy", "exhaustive", "--samples", "1"],
        ..Case::new(&outs)
    };
    std::fs::write(&file, "label;note\nzero;x\n").unwrap();
    case.fails(1, &["classes.csv: it has no column 'classname'", "names label, note"]);
    let names = Case { classes: outs.path().join("classes.txt"), flags: case.flags.clone(), ..Case::new(&outs) };
    std::fs::write(&names.classes, "missile\nsunglasses\nmissile\n").unwrap();
    names.fails(1, &["classes.txt, line 3", "class 2 is called 'missile', as is class 0"]);
    let long = "digit ".repeat(76);
    std::fs::write(&file, format!("prompt,classname\n{long}zero,zero\n{long}one,one\n")).unwrap();
    case.fails(1, &["of class 'zero' and", "of class 'one' are the same tokens", "the first 75 tokens"]);
    std::fs::write(&file, "prompt,classname\nThe Digit,zero\nthe digit,one\n").unwrap();
    case.fails(1, &["'The Digit' of class 'zero' and", "'the digit' of class 'one'", "differ in their words"]);
    assert!(!case.out.exists(), "a job that can't run must leave nothing behind");
    // Prompts that still differ are computed, with a warning.
    std::fs::write(&file, format!("prompt,classname\nzero {long},zero\none {long},one\n")).unwrap();
    let output = run(&mut case.command());
    let message = stderr(&output);
    assert!(output.status.success() && message.contains("2 of the prompts are longer than the 75 tokens"), "{message}");
}

#[test]
fn an_unwritable_output_is_named() {
    let outs = TempDir::new().unwrap();
    let file = outs.path().join("file");
    std::fs::write(&file, "").unwrap();
    Case { out: file.join("below"), ..Case::new(&outs) }.fails(1, &["creating the directory", "file/below"]);
    Case { out: "ftp://host/x".into(), ..Case::new(&outs) }.fails(1, &["ftp://host/x"]);
}

#[test]
fn noise_files_that_do_not_fit_the_model_are_refused() {
    let outs = TempDir::new().unwrap();
    let case = Case { flags: vec!["--noise", "/no/such/noise.safetensors"], ..Case::new(&outs) };
    case.fails(1, &["/no/such/noise.safetensors"]);
    let vae = Box::leak(
        model().join("vae/diffusion_pytorch_model.safetensors").to_string_lossy().into_owned().into_boxed_str(),
    );
    Case { flags: vec!["--noise", vae], ..Case::new(&outs) }.fails(1, &["tensor 'noise'"]);
}

#[test]
fn unreadable_images_are_quarantined_and_the_rest_is_labelled() {
    let digits = some_images(2);
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    let one = digits.path().join("one");
    std::fs::write(one.join("empty.png"), b"").unwrap();
    std::fs::write(one.join("text.png"), b"this is no image").unwrap();
    let whole = std::fs::read(&elbo_tests::sorted(&digits.path().join("two"))[0]).unwrap();
    std::fs::write(one.join("truncated.png"), &whole[..whole.len() / 2]).unwrap();

    // Three of 23 images are more than a tenth.
    let flags = job_flags(digits.path(), &out);
    let ended = run(elbo().arg("label").args(&flags).args(["--max-bad", "2"]));
    assert_eq!(ended.status.code(), Some(1), "{}", stderr(&ended));
    assert!(stderr(&ended).contains("more than --max-bad 2 allows"), "{}", stderr(&ended));

    run_ok(elbo().arg("label").args(&flags).args(["--max-bad", "3"]));
    let verified = json(elbo().args(["verify", "--json"]).arg(&out));
    assert_eq!(verified["ok"], true);
    assert_eq!((verified["predictions"].as_u64(), verified["quarantined"].as_u64()), (Some(20), Some(3)));
    let report = json(elbo().args(["report", "--json"]).arg(&out));
    assert_eq!((report["labelled"].as_u64(), report["quarantined"].as_u64()), (Some(20), Some(3)));
    assert_eq!(elbo_tests::sorted(&out.join("quarantine")).len(), 1);
}

#[test]
fn an_adapter_is_part_of_the_job() {
    let (images, outs) = (some_images(1), TempDir::new().unwrap());
    let adapter = root().join("tests/fixtures/lora/diffusers.safetensors");
    let label = |out: &str, lora: &[String]| {
        let mut command = elbo();
        command.arg("label").args(job_flags(images.path(), &outs.path().join(out))).args(["--dtype", "bf16"]);
        command.args(lora.iter().flat_map(|lora| ["--lora", lora]));
        command
    };
    let at = |scale: &str| vec![format!("{}{scale}", adapter.display())];
    run_ok(&mut label("with", &at("")));
    run_ok(&mut label("without", &[]));
    assert_ne!(results(&outs.path().join("with")), results(&outs.path().join("without")));
    let refused = run(&mut label("with", &at(":0.5")));
    assert!(stderr(&refused).contains("scale 1 -> 0.5"), "{}", stderr(&refused));
    let refused = run(&mut label("with", &[]));
    assert!(stderr(&refused).contains("lora: 1 adapters -> 0"), "{}", stderr(&refused));
    run_ok(&mut label("with", &at(":1")));
    let missing = run(&mut label("missing", &["no.safetensors".into()]));
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("no.safetensors"), "{}", stderr(&missing));
}

#[test]
fn commands_refuse_a_path_that_is_not_an_output() {
    let empty = TempDir::new().unwrap();
    for command in ["report", "verify", "status"] {
        let output = run(elbo().arg(command).arg(empty.path()));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("job.json"), "{}", stderr(&output));
    }
    let unreachable = run(elbo().args(["status", "http://127.0.0.1:9"]));
    assert!(stderr(&unreachable).contains("no coordinator answers"), "{}", stderr(&unreachable));
}
