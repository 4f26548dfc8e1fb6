#!/bin/bash
# Runs the CUDA code path on the processor and builds what it needs below target/. By default it runs all parts (measure only
# if its Python is given):
#   tests/cuda/emulated.sh [operations] [jobs] [measure] [models]
# operations  compares each operation with plain formulas, in f32, f16 and bf16
# jobs        compares whole jobs with the same jobs on the processor, and runs them with failures (tests/cuda/job.py)
# measure     runs the scripts that measure a GPU from beginning to end (tests/cuda/rehearse.py); ELBO_TORCH_PYTHON names a Python
#             with PyTorch and transformers
# models      compares every submodule and error with PyTorch; takes more than an hour
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- operations jobs ${ELBO_TORCH_PYTHON:+measure} models
libraries=${ELBO_EMULATED:-target/cuda-emulated}
build() { deploy/cuda/build.sh "$@"; }
# Fetches candle, since its own kernels are also compiled for the processor.
build test -p elbo-kernels --no-run
tests/cuda/driver/build.sh "$libraries"
libraries=$(cd "$libraries" && pwd)
# Set through cargo's runner, so that only the tests see these libraries.
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
            echo "unknown part $part: use operations, jobs, measure or models" >&2
            exit 2
            ;;
    esac
done
