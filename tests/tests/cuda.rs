//! The CUDA kernels, compiled for the CPU and run there, compared with plain formulas in double precision.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::process::Command;

use elbo_tests::root;

/// Number of kernels (one attention kernel per head width), and number of types of each kernel.
const KERNELS: usize = 22;
const TYPES: usize = 3;

/// `tests/cuda/kernels.cpp` says what is compared. This test checks that it compiles, passes and compares every kernel.
#[test]
fn kernels_match_plain_formulas() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("kernels");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compiled = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas"])
        .arg(root().join("tests/cuda/kernels.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap_or_else(|error| panic!("starting {}: {error}; a C++ compiler is needed", compiler.display()));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    assert_eq!(said.lines().filter(|line| line.contains(" cases, ")).count(), KERNELS * TYPES, "{said}");
    println!("{said}");
}
