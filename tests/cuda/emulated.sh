#!/bin/bash
# Runs the CUDA path on the processor, in parts, all by default (measure if its Python is named); builds what it needs below target/.
#   tests/cuda/emulated.sh [operations] [jobs] [measure] [models]
# operations: each against plain formulas, in f32, f16 and bf16; jobs: whole ones, against the processor's, and with failures
# (tests/cuda/job.py); measure: the scripts that measure a GPU, from beginning to end (tests/cuda/rehearse.py), with the Python
# that ELBO_TORCH_PYTHON names, which has PyTorch and transformers; models: every submodule and error against PyTorch's, which
# takes an hour and more.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- operations jobs ${ELBO_TORCH_PYTHON:+measure} models
libraries=${ELBO_EMULATED:-target/cuda-emulated}
build() { deploy/cuda/build.sh "$@"; }
# Fetches candle, whose own kernels are compiled for the processor too.
build test -p elbo-kernels --no-run
tests/cuda/driver/build.sh "$libraries"
libraries=$(cd "$libraries" && pwd)
# Cargo's runner: only the tests see these libraries.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_LIBRARY_PATH=$libraries ELBO_TEST_DEVICE=cuda:0"
for part in "$@"; do
    case $part in
        operations)
            for dtype in f32 f16 bf16; do
                echo "== operations in $dtype"
                ELBO_TEST_DTYPE=$dtype ELBO_EMULATED_ASYNC=1 build test -p elbo-kernels
            done
            ;;
        jobs)
            echo "== jobs"
            build build --bin elbo
            tests/cuda/job.py "${CARGO_TARGET_DIR:-target/cuda}/x86_64-unknown-linux-gnu/release/elbo" "$libraries"
            ;;
        measure)
            echo "== measure"
            deploy/cuda/build.sh pack
            target=${CARGO_TARGET_DIR:-target/cuda}
            tests/cuda/rehearse.py "$target/carry.tar.xz" "$target/wheels" "$libraries" "${ELBO_TORCH_PYTHON:?a Python with PyTorch}"
            ;;
        models)
            echo "== models"
            build test -p elbo-tests --test parity
            ;;
        *)
            echo "no part $part: operations, jobs, measure or models" >&2
            exit 2
            ;;
    esac
done
