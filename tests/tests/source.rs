//! Models from the Hugging Face hub and from URLs, over HTTP: fetched once, resumed, and used without the network.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use elbo_tests::web::{Files, Site, Web};
use elbo_tests::{Process, classes, elbo, job_flags, model, results, run, run_ok, some_images, sorted, stderr};
use tempfile::TempDir;

const COMMIT: &str = "1111111111111111111111111111111111111111";
const OLD: &str = "2222222222222222222222222222222222222222";

/// The digits model, with unrelated files beside it.
fn digits() -> Files {
    let mut files = Files::new();
    for entry in sorted(&model()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() {
            for file in sorted(&entry) {
                let path = format!("{name}/{}", file.file_name().unwrap().to_string_lossy());
                files.insert(path, std::fs::read(file).unwrap());
            }
        } else {
            files.insert(name, std::fs::read(entry).unwrap());
        }
    }
    for unread in ["README.md", "digits.safetensors", "unet/diffusion_pytorch_model.bin", "vae/model.onnx"] {
        files.insert(unread.to_owned(), b"nobody reads this".to_vec());
    }
    files
}

/// A hub with the digits model; an old version of it has 500 timesteps.
fn site() -> Site {
    let mut old = digits();
    let scheduler = old.get_mut("scheduler/scheduler_config.json").unwrap();
    *scheduler = String::from_utf8(scheduler.clone()).unwrap().replace("1000", "500").into_bytes();
    let main = BTreeMap::from([("main".to_owned(), (COMMIT.to_owned(), digits()))]);
    let mut versions = main.clone();
    versions.insert("v1".into(), (OLD.into(), old));
    let models = [("test/digits", versions), ("private/digits", main.clone()), ("plain/digits", main)];
    Site {
        models: models.into_iter().map(|(name, revisions)| (name.to_owned(), revisions)).collect(),
        token: "secret".into(),
        ..Site::default()
    }
}

/// `elbo` with a test hub and separate caches.
fn elbo_with(url: &str, home: &Path) -> Command {
    let mut command = elbo();
    for variable in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
        command.env_remove(variable);
    }
    command.env("HF_ENDPOINT", url).env("HF_HOME", home.join("hf")).env("ELBO_CACHE", home.join("elbo"));
    command.env("ALLOW_HTTP", "true");
    command
}

/// `elbo label` of a few images with a model from a given source.
fn label(url: &str, home: &Path, model: &str, images: &Path, out: &Path) -> Command {
    let mut flags = job_flags(images, out);
    let at = flags.iter().position(|f| f == "--model").unwrap();
    flags[at + 1] = model.to_owned();
    let mut command = elbo_with(url, home);
    command.arg("label").args(flags);
    command
}

/// `elbo plan` of one stage with this many timesteps.
fn plan(url: &str, home: &Path, model: &str, samples: &str) -> Command {
    let mut command = elbo_with(url, home);
    command.args(["plan", "--model", model, "--keep", "1", "--samples", samples, "--classes"]).arg(classes());
    command
}

#[test]
fn a_hub_model_is_fetched_once_and_gives_the_same_bytes_without_the_hub() {
    let (home, images) = (TempDir::new().unwrap(), some_images(1));
    let out = |name: &str| home.path().join(name);
    let web = Web::start(Site { cut: Mutex::new(Some(500_000)), ..site() });
    let (url, name) = (web.url.clone(), "hf://test/digits");
    let first = run_ok(&mut label(&url, home.path(), name, images.path(), &out("first")));
    assert!(
        stderr(&first).contains("fetching unet/diffusion_pytorch_model.safetensors (2.2 MB)"),
        "{}",
        stderr(&first)
    );
    let asked = web.asked();
    assert!(asked.iter().any(|path| path.contains("safetensors from 500000")), "not resumed: {asked:?}");
    for unread in ["README", "digits.safetensors", ".bin", ".onnx"] {
        assert!(!asked.iter().any(|path| path.contains(unread)), "{unread} was fetched");
    }
    let (before, again) = (asked.len(), run_ok(&mut label(&url, home.path(), name, images.path(), &out("first"))));
    assert!(!stderr(&again).contains("fetching"), "{}", stderr(&again));
    assert_eq!(web.asked().len(), before + 1, "only the listing may be requested again");
    drop(web);

    let offline = run_ok(&mut label(&url, home.path(), name, images.path(), &out("offline")));
    assert!(stderr(&offline).contains("using the copy in"), "{}", stderr(&offline));
    run_ok(label(&url, home.path(), name, images.path(), &out("asked")).env("HF_HUB_OFFLINE", "1"));
    let local = model().to_string_lossy().into_owned();
    run_ok(&mut label(&url, home.path(), &local, images.path(), &out("local")));
    for name in ["offline", "asked", "local"] {
        assert_eq!(results(&out("first")), results(&out(name)), "{name}");
    }
    let job = std::fs::read_to_string(out("first").join("job.json")).unwrap();
    assert!(job.contains("\"hf://test/digits\""));
}

#[test]
fn processes_that_start_together_fetch_a_model_once() {
    let (home, images, web) = (TempDir::new().unwrap(), some_images(1), Web::start(site()));
    let out = |i: usize| home.path().join(format!("out-{i}"));
    let start = |i| Process::start(&mut label(&web.url, home.path(), "hf://test/digits", images.path(), &out(i)));
    let mut processes: Vec<Process> = (0..3).map(start).collect();
    for process in &mut processes {
        assert_eq!(process.wait(), Some(0));
    }
    let weights =
        |path: &&String| path.contains("resolve") && path.contains("unet/diffusion_pytorch_model.safetensors");
    assert_eq!(web.asked().iter().filter(weights).count(), 1);
    assert_eq!(results(&out(0)), results(&out(2)));
}

#[test]
fn a_model_is_fetched_at_its_revision_and_a_plan_fetches_only_the_schedule() {
    let (home, web) = (TempDir::new().unwrap(), Web::start(site()));
    run_ok(&mut plan(&web.url, home.path(), "hf://test/digits", "600"));
    for revision in ["v1", OLD] {
        let old = run(&mut plan(&web.url, home.path(), &format!("hf://test/digits@{revision}"), "600"));
        assert!(stderr(&old).contains("the model's 500"), "{}", stderr(&old));
    }
    assert!(!web.asked().iter().any(|path| path.contains("safetensors")));
    let blobs = home.path().join("hf/hub/models--test--digits/blobs");
    assert!(sorted(&blobs).len() >= 3);
}

#[test]
fn a_private_model_needs_the_token_and_an_unknown_model_is_named() {
    let (home, web) = (TempDir::new().unwrap(), Web::start(site()));
    let refused = run(&mut plan(&web.url, home.path(), "hf://private/digits", "10"));
    assert_eq!(refused.status.code(), Some(1));
    for word in ["HF_TOKEN", "private/digits", "licence"] {
        assert!(stderr(&refused).contains(word), "{}", stderr(&refused));
    }
    run_ok(plan(&web.url, home.path(), "hf://private/digits", "10").env("HF_TOKEN", "secret"));
    std::fs::write(home.path().join("hf/token"), "secret\n").unwrap();
    run_ok(&mut plan(&web.url, home.path(), "hf://private/digits", "10"));

    let unknown = run(&mut plan(&web.url, home.path(), "hf://test/nothing", "10"));
    assert!(stderr(&unknown).contains("no model test/nothing at revision main"), "{}", stderr(&unknown));
    let unknown = run(&mut plan(&web.url, home.path(), "hf://test/digits@v9", "10"));
    assert!(stderr(&unknown).contains("revision v9"), "{}", stderr(&unknown));
}

#[test]
fn files_left_by_other_programs_or_a_power_cut_are_not_used_as_a_model() {
    let (home, images, web) = (TempDir::new().unwrap(), some_images(1), Web::start(site()));
    let label = |name: &str| {
        label(
            &web.url,
            &home.path().join(name),
            "hf://test/digits",
            images.path(),
            &home.path().join(format!("{name}-out")),
        )
    };
    run_ok(&mut label("whole"));
    // Files of the right size but full of zeros, such as another program's reserved files or this program's after a power cut.
    let blobs = "hf/hub/models--test--digits/blobs";
    for blob in sorted(&home.path().join("whole").join(blobs)) {
        let (name, zeros) =
            (blob.file_name().unwrap().to_string_lossy().into_owned(), vec![0; std::fs::read(&blob).unwrap().len()]);
        let beside = home.path().join("left").join(blobs);
        let own = beside.with_file_name(".elbo");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(beside.join(format!("{name}.incomplete")), &zeros).unwrap();
        std::fs::write(own.join(format!("{name}.part")), &zeros).unwrap();
    }
    let left = run_ok(&mut label("left"));
    assert!(stderr(&left).contains("another hash than its source names"), "{}", stderr(&left));
    assert_eq!(results(&home.path().join("whole-out")), results(&home.path().join("left-out")));
}

#[test]
fn a_file_that_arrives_damaged_is_fetched_once_more_and_then_refused() {
    let images = some_images(1);
    for file in ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"] {
        let home = TempDir::new().unwrap();
        let web = Web::start(Site { spoilt: vec![file.to_owned()], ..site() });
        let refused =
            run(&mut label(&web.url, home.path(), "hf://test/digits", images.path(), &home.path().join("out")));
        assert_eq!(refused.status.code(), Some(1));
        for word in [file, "twice", "hash", "hf://test/digits"] {
            assert!(stderr(&refused).contains(word), "{}", stderr(&refused));
        }
        assert_eq!(web.asked().iter().filter(|path| path.contains("resolve") && path.ends_with(file)).count(), 2);
        let own = sorted(&home.path().join("hf/hub/models--test--digits/.elbo"));
        assert!(!own.iter().any(|path| path.extension().is_some_and(|e| e == "part")), "{own:?}");
    }
}

#[test]
fn a_truncated_or_changed_cached_file_is_fetched_again_or_refused_offline() {
    let (home, images) = (TempDir::new().unwrap(), some_images(1));
    let out = home.path().join("out");
    let web = Web::start(site());
    let url = web.url.clone();
    let label = || label(&url, home.path(), "hf://test/digits", images.path(), &out);
    run_ok(&mut label());
    let weights = home
        .path()
        .join("hf/hub/models--test--digits/snapshots")
        .join(COMMIT)
        .join("unet/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let mut changed = whole.clone();
    *changed.last_mut().unwrap() ^= 1;
    for bad in [&whole[..whole.len() / 2], &changed] {
        std::fs::write(weights.canonicalize().unwrap(), bad).unwrap();
        let refused = run(label().env("HF_HUB_OFFLINE", "1"));
        assert_eq!(refused.status.code(), Some(1));
        assert!(stderr(&refused).contains("cut off or changed"), "{}", stderr(&refused));
        let mended = run_ok(&mut label());
        assert!(stderr(&mended).contains("fetching unet/diffusion_pytorch_model.safetensors"), "{}", stderr(&mended));
        assert!(std::fs::read(&weights).unwrap() == whole);
        run_ok(label().env("HF_HUB_OFFLINE", "1"));
    }
}

#[test]
fn file_names_that_escape_the_cache_are_refused() {
    let (home, images) = (TempDir::new().unwrap(), some_images(1));
    let mut files = digits();
    let index = String::from_utf8(files["model_index.json"].clone()).unwrap();
    let hostile = index.replacen('{', "{\"a/../../../x\": [\"diffusers\", \"Y\"],", 1);
    files.insert("model_index.json".into(), hostile.into_bytes());
    files.insert("a/../../../x/config.json".into(), b"{}".to_vec());
    let versions = BTreeMap::from([("main".to_owned(), (COMMIT.to_owned(), files))]);
    let web = Web::start(Site { models: BTreeMap::from([("test/hostile".to_owned(), versions)]), ..Site::default() });
    let refused = run(&mut label(&web.url, home.path(), "hf://test/hostile", images.path(), &home.path().join("out")));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("a/../../../x") && stderr(&refused).contains("outside"), "{}", stderr(&refused));
    assert!(!web.asked().iter().any(|path| path.contains("/x/")), "{:?}", web.asked());
}

#[test]
fn a_mirror_is_checked_against_its_hashes_and_missing_hashes_are_reported() {
    let (home, images) = (TempDir::new().unwrap(), some_images(1));
    let served = |files: Files| {
        let versions = BTreeMap::from([("main".to_owned(), (COMMIT.to_owned(), files))]);
        Web::start(Site { models: BTreeMap::from([("plain/digits".to_owned(), versions)]), ..Site::default() })
    };
    let without = served(digits());
    let label = |web: &Web, out: &str| {
        let url = format!("{}/plain/digits", web.url);
        label(&web.url, home.path(), &url, images.path(), &home.path().join(out))
    };
    let told = run_ok(&mut label(&without, "without"));
    assert!(stderr(&told).contains("names no hash"), "{}", stderr(&told));
    let mut files = digits();
    let list = format!("{}  unet/diffusion_pytorch_model.safetensors\n", "0".repeat(64));
    files.insert("SHA256SUMS".into(), list.into_bytes());
    let refused = run(&mut label(&served(files), "with"));
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("another hash"), "{}", stderr(&refused));
}

#[test]
fn a_model_at_a_url_is_fetched_once() {
    let (home, images, web) = (TempDir::new().unwrap(), some_images(1), Web::start(site()));
    let (url, out) = (format!("{}/plain/digits", web.url), home.path().join("out"));
    run_ok(&mut label(&web.url, home.path(), &url, images.path(), &out));
    let again = run_ok(&mut label(&web.url, home.path(), &url, images.path(), &home.path().join("again")));
    assert!(!stderr(&again).contains("fetching"), "{}", stderr(&again));
    assert_eq!(results(&out), results(&home.path().join("again")));
}

#[test]
fn a_list_from_the_web_names_only_files_of_its_own_origin() {
    let (home, images) = (TempDir::new().unwrap(), some_images(1));
    let (files, local) = (TempDir::new().unwrap(), sorted(&sorted(images.path())[0])[0].clone());
    std::fs::copy(&local, files.path().join("here.png")).unwrap();
    std::fs::write(files.path().join("list.txt"), format!("here.png\n{}\n", local.display())).unwrap();
    std::fs::write(files.path().join("list.csv"), "path\nhttp://localhost:9/x.png\n").unwrap();
    let served = Web::serve(files.path());
    let label = |list: &str| {
        let mut flags = job_flags(images.path(), &home.path().join("out"));
        flags[1] = format!("{}/{list}", served.files());
        let labels = flags.iter().position(|flag| flag == "--label-from").unwrap();
        flags.drain(labels..labels + 2);
        let mut command = elbo();
        command.arg("label").args(flags);
        command
    };
    for (list, words) in [
        ("list.txt", ["line 2", local.to_str().unwrap(), "--list-origins file://"]),
        ("list.csv", ["line 2", "http://localhost:9/x.png", "--list-origins http://localhost:9"]),
    ] {
        let refused = run(&mut label(list));
        assert_eq!(refused.status.code(), Some(1));
        assert!(words.iter().all(|word| stderr(&refused).contains(word)), "{}", stderr(&refused));
    }
    assert!(!served.asked().iter().any(|path| path.contains("x.png")));
    run_ok(label("list.txt").env("ELBO_LIST_ORIGINS", "https://cdn.example,file://"));
    let wrong = run(label("list.txt").args(["--list-origins", "cdn.example"]));
    assert_eq!(wrong.status.code(), Some(2));
    // The allowed origins are not part of the job: it resumes without the flag.
    run_ok(&mut label("list.txt"));
}
