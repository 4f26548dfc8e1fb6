#!/usr/bin/env bash
# Compiles the CPU's kernels for 64-bit ARM, and runs their tests there with NEON, on an emulated processor.
#   tests/aarch64/run.sh
# Installs what it needs, if it can: Rust's target, Debian's cross compiler and qemu-user. Without Rust's target nothing is
# tested, and it says so.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=aarch64-unknown-linux-gnu
if ! rustup target add "$target"; then
    echo "Rust's $target can't be installed here: the kernels are not compiled for it"
    exit 0
fi
export CARGO_TARGET_DIR=target/aarch64
if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64-static >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)
    if ! { $sudo apt-get -qq update && $sudo apt-get -qq install -y --no-install-recommends "${packages[@]}"; } >/dev/null; then
        echo "without a cross compiler and qemu-user, the kernels are only compiled"
        exec cargo check --release -p elbo-kernels --target "$target"
    fi
fi
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
cargo test --release -p elbo-kernels --lib --target "$target"
