//! Groups of classes: a race evaluates the groups first.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use elbo_tests::{classes, elbo, json, model, predictions, results, run, run_ok, some_images, stderr};
use tempfile::TempDir;

/// Each group has the name of one of its digits, so that the model understands its prompt.
const GROUPS: &str = "eight\n  three\n  five\n  six\nnine\n  four\n  seven\nzero\n  two\none\n";

fn label(images: &Path, out: &Path, flags: &[&str]) -> Command {
    let mut command = elbo();
    command.args(["label", "--label-from", "parent", "--batch", "16", "--progress", "none", "--images"]).arg(images);
    command.args(["--shard-size", "10", "--template", "a photo of the digit {}", "--classes"]).arg(classes());
    command.arg("--model").arg(model()).arg("--out").arg(out).args(flags);
    command
}

#[test]
fn a_race_among_groups_ends_with_a_class_of_a_surviving_group() {
    let (images, outs) = (some_images(4), TempDir::new().unwrap());
    let tree = outs.path().join("tree.txt");
    std::fs::write(&tree, GROUPS).unwrap();
    let grouped = ["--hierarchy", tree.to_str().unwrap()];
    let out = outs.path().join("out");
    run_ok(label(images.path(), &out, &grouped).args(["--audit", "50%", "--samples", "5,20", "--write-errors"]));
    let group_of: BTreeMap<i32, i32> =
        [(8, 8), (3, 8), (5, 8), (6, 8), (9, 9), (4, 9), (7, 9), (0, 0), (2, 0), (1, 1)].into();
    let rows = predictions(&out);
    for row in &rows {
        let scored: Vec<i32> = row.scores().iter().map(|score| score.class.0).collect();
        let best = group_of[&scored[0]];
        // All classes of the best class's group were scored; the group's own prompt is not the score of a class.
        assert!(group_of.iter().all(|(class, group)| *group != best || scored.contains(class)), "{row:?}");
        assert!(scored.len() < 10 || row.evaluations >= 8 * 4, "{row:?}");
        // At least two slots for the groups and every prompt that is in no group.
        assert!(row.evaluations >= 2 * 4, "{row:?}");
    }
    assert!(rows.iter().any(|row| row.scores().len() < 8), "every image opened all groups");
    let report = json(elbo().args(["report", "--json"]).arg(&out));
    // The reference scores all ten classes, whichever groups survived: five slots for ten, fifteen more for five.
    assert_eq!(report["audit"]["reference_evaluations"], 5.0 * 10.0 + 15.0 * 5.0);
    assert!(report["accuracy"]["top1"].as_f64().unwrap() > 0.5, "{report}");

    // A class that raced beside groups and was evaluated again has one row per slot.
    let mut errors = BTreeMap::new();
    for shard in 0..4 {
        let bytes = std::fs::read(out.join(format!("errors/shard-{shard:05}.parquet"))).unwrap();
        for row in elbo_output::predictions::decode_errors(bytes.into()).unwrap() {
            *errors.entry((row.sample, row.prompt, row.noise)).or_insert(0) += 1;
        }
    }
    assert!(!errors.is_empty() && errors.values().all(|count| *count == 1));

    let plan = json(elbo().args(["plan", "--json", "--classes"]).arg(classes()).args(grouped));
    // First the four prompts that are in no group, on eight slots; then ten classes.
    assert_eq!(plan["rounds"][0], serde_json::json!({"slots": 8, "prompts": 4, "evaluations": 32}));
    assert_eq!(plan["prompts"], 10);
    let mut piloted = elbo();
    piloted.args(["plan", "--json", "--pilot", "30", "--classes"]).arg(classes()).args(grouped);
    assert_eq!(json(&mut piloted)["evaluations_pilot"], 30 * 100 * 10);

    let again = outs.path().join("again");
    let mut three = label(images.path(), &again, &grouped);
    run_ok(three.args(["--audit", "50%", "--samples", "5,20", "--write-errors", "--workers", "3"]));
    assert!(results(&again) == results(&out));
}

#[test]
fn an_invalid_hierarchy_is_refused_with_a_remedy() {
    let (images, outs) = (some_images(1), TempDir::new().unwrap());
    let refused = |text: &str, flags: &[&str]| {
        // An outline has no header, but a table needs one.
        let tree = outs.path().join(if text == GROUPS { "tree.txt" } else { "tree.csv" });
        std::fs::write(&tree, text).unwrap();
        let output = run(label(images.path(), &outs.path().join("out"), flags).arg("--hierarchy").arg(&tree));
        assert!(!output.status.success());
        stderr(&output)
    };
    assert!(refused("class,parent\nzero,round\neight,round\ncircle,round\n", &[]).contains("'circle' is not a class"));
    assert!(refused("class,parent\nzero,round\nround,zero\neight,round\n", &[]).contains("contains itself"));
    assert!(refused(GROUPS, &["--policy", "exhaustive"]).contains("--hierarchy: a hierarchy is for a race"));
    assert!(!outs.path().join("out").join("job.json").exists());
}
