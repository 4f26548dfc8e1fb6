#!/bin/bash
# Builds elbo for NVIDIA GPUs on any Linux machine with Rust, gcc and Python; no GPU, driver or toolkit is needed.
#   deploy/cuda/build.sh                puts the program and the test `parity`, stripped, into target/cuda/carry, and both into
#                                       carry.tar.xz; into target/cuda/wheels, what deploy/cuda/measure.sh needs besides PyTorch
#   deploy/cuda/build.sh pack           the same, reusing an earlier build without COMMAND, or `build` and `test --test parity`
#   deploy/cuda/build.sh COMMAND ...    any other cargo command, such as: check --workspace --all-targets
# The compiler is installed into $ELBO_CUDA_TOOLKIT (target/cuda-toolkit).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
eval "$(deploy/cuda/toolkit.sh "${ELBO_CUDA_TOOLKIT:-target/cuda-toolkit}")"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target/cuda}
# Without an explicit target, compiler flags would apply to build scripts too.
target=x86_64-unknown-linux-gnu
flags=(--release --features cuda --target "$target")
if [ $# -gt 0 ] && [ "$1" != pack ]; then
    exec cargo "$1" "${flags[@]}" "${@:2}"
fi
# The programs to carry are built with one codegen unit, which takes longer but makes them smaller.
[ "${1:-}" = pack ] || export CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
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
# One dictionary for both, since they share their kernels.
tar -cf - -C "$carry" elbo parity | xz -9 --lzma2=preset=9,dict=128MiB > "$carry.tar.xz"
wheels=$CARGO_TARGET_DIR/wheels
# Remove old wheels: two versions of one package would make the installation fail.
rm -rf "$wheels" && mkdir -p "$wheels"
# Wheels for the Python of the measured machine, not for this one's.
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$wheels" --requirement deploy/cuda/wheels.txt
ls -l "$carry" "$carry.tar.xz" "$wheels"
python3 - "$carry.tar.xz" "$wheels" <<'END'
import subprocess, sys
from pathlib import Path
tracked = [Path(line) for line in subprocess.run(["git", "ls-files"], capture_output=True, text=True).stdout.splitlines()]
size = lambda paths: sum(path.stat().st_size for path in paths if path.is_file())
mib = lambda size: f"{size / 2**20:.1f} MiB"
tree, programs, wheels = size(tracked), size([Path(sys.argv[1])]), size(Path(sys.argv[2]).iterdir())
left = 64 * 2**20 - tree - programs - wheels
print(f"to carry: the tree {mib(tree)}, programs {mib(programs)}, wheels {mib(wheels)}; {mib(left)} of 64 MiB left")
sys.exit(left < 0)
END
