//! The files in `deploy/` fit their target systems and this program's flags.

use std::process::Command;

use elbo_tests::{elbo, python, root, run, stderr};

#[test]
fn manifests_scripts_and_container_files_are_sound() {
    let mut check = Command::new(python("deploy/requirements.txt"));
    let checked = run(check.arg(root().join("tests/deploy/check.py")).arg(root()).arg(elbo().get_program()));
    let complaints = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{complaints}{}", stderr(&checked));
}
