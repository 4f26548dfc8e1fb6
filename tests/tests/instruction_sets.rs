//! A job gives the same bytes with every instruction set that this processor has.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::Path;

use elbo_kernels::InstructionSet;
use elbo_tests::{elbo, images, job_flags, run, run_ok, sorted, stderr, with};
use tempfile::TempDir;

/// The bytes of all predictions and errors.
fn tables(out: &Path) -> Vec<Vec<u8>> {
    let files = ["predictions", "errors"].into_iter().flat_map(|directory| sorted(&out.join(directory)));
    let files: Vec<_> = files.map(|file| std::fs::read(file).unwrap()).collect();
    assert!(files.len() >= 2);
    files
}

fn hardware(out: &Path) -> serde_json::Value {
    let job: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("job.json")).unwrap()).unwrap();
    job["hardware"].clone()
}

#[test]
fn every_instruction_set_gives_the_same_bytes() {
    let dir = TempDir::new().unwrap();
    let label = |out: &Path, set: &str, more: &[&str]| {
        let flags = with(job_flags(&images(), out), &[("--keep", "1"), ("--samples", "2")]);
        let mut command = elbo();
        command.arg("label").args(flags).args(["--limit", "6", "--write-errors", "--threads", "1"]).args(more);
        run_ok(command.env("ELBO_SIMD", set));
    };
    let usual = dir.path().join("usual");
    label(&usual, "", &[]);
    let best = InstructionSet::in_use().unwrap().name();
    assert_eq!(hardware(&usual), serde_json::json!([best]));
    let available = InstructionSet::available();
    for set in InstructionSet::ALL {
        if !available.contains(&set) {
            println!("{set} can't be tested on this processor");
            continue;
        }
        let out = dir.path().join(set.name());
        label(&out, set.name(), &[]);
        assert!(tables(&out) == tables(&usual), "{set}");
        assert_eq!(hardware(&out), serde_json::json!([set.name()]));
    }

    // A shard that another kind of processor computes again is the same, and the job says that there were two.
    let before = tables(&usual);
    label(&usual, "scalar", &["--recompute", "0"]);
    assert!(tables(&usual) == before);
    let mut both = [best, "scalar"];
    both.sort_unstable();
    assert_eq!(hardware(&usual), serde_json::json!(both));
}

#[test]
fn an_instruction_set_that_can_not_be_used_is_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let missing = InstructionSet::ALL.into_iter().find(|set| !set.is_available()).unwrap();
    for (name, words) in [("sse9", ["'sse9'", "avx512"]), (missing.name(), ["lacks", "scalar"])] {
        let flags = job_flags(&images(), &dir.path().join("out"));
        let output = run(elbo().arg("label").args(flags).env("ELBO_SIMD", name));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert!(!dir.path().join("out").exists());
    }
}
