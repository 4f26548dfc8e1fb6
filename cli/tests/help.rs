//! Checks the help of every command. Also makes `cargo test` build it for the tests in `tests/`.

use std::process::Command;

#[test]
fn every_command_has_a_help_text() {
    for command in ["demo", "label", "coordinator", "worker", "status", "report", "verify", "plan", "inspect", "bench"]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_elbo")).args([command, "--help"]).output().unwrap();
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("Usage: elbo {command}")));
    }
    let nothing = Command::new(env!("CARGO_BIN_EXE_elbo")).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2));
}
