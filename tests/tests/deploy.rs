//! What is in `deploy/` fits the schemas of the systems it is for, and this program's flags.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::process::Command;

use elbo_tests::{elbo, python, root, run};

#[test]
fn manifests_scripts_and_container_files_are_sound() {
    let mut check = Command::new(python("deploy/requirements.txt"));
    let checked = run(check.arg(root().join("tests/deploy/check.py")).arg(root()).arg(elbo().get_program()));
    let complaints = String::from_utf8(checked.stdout).unwrap();
    assert!(checked.status.success(), "{complaints}{}", elbo_tests::stderr(&checked));
}
