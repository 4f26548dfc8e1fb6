#!/bin/bash
# Builds elbo for NVIDIA GPUs on any Linux machine with Rust, gcc and Python; no GPU, driver or toolkit is needed.
#   deploy/cuda/build.sh                the program and the test `parity`, stripped, in target/cuda/carry, and both in carry.tar.gz
#   deploy/cuda/build.sh COMMAND ...    any other command of cargo's, like: check --workspace --all-targets
# The compiler comes into $ELBO_CUDA_TOOLKIT (target/cuda-toolkit).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
eval "$(deploy/cuda/toolkit.sh "${ELBO_CUDA_TOOLKIT:-target/cuda-toolkit}")"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target/cuda}
# Flags for the compiler would reach build scripts too, if no target were named.
target=x86_64-unknown-linux-gnu
flags=(--release --features cuda --target "$target")
if [ $# -gt 0 ]; then
    exec cargo "$1" "${flags[@]}" "${@:2}"
fi
# What is carried about is compiled in larger pieces, which takes longer and makes it smaller.
export CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
cargo build "${flags[@]}" --bin elbo
parity=$(cargo test "${flags[@]}" --test parity --no-run --message-format json |
    python3 -c '
import json, sys
messages = (json.loads(line) for line in sys.stdin)
print([m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "parity"][-1])')
carry=$CARGO_TARGET_DIR/carry
mkdir -p "$carry"
strip -o "$carry/elbo" "$CARGO_TARGET_DIR/$target/release/elbo"
strip -o "$carry/parity" "$parity"
tar -czf "$carry.tar.gz" -C "$carry" elbo parity
ls -l "$carry" "$carry.tar.gz"
