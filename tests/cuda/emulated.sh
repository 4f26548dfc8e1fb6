#!/bin/bash
# Runs the CUDA path on the processor: operations in f32, f16 and bf16, then whole models against PyTorch's numbers.
#   tests/cuda/emulated.sh [operations|models]     both by default; builds what it needs below target/
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}
libraries=${ELBO_EMULATED:-target/cuda-emulated}
if [ "$what" != models ]; then
    deploy/cuda/build.sh test -p elbo-kernels --no-run
fi
# candle's own kernels are compiled from the sources that cargo has fetched by now.
tests/cuda/driver/build.sh "$libraries"
libraries=$(cd "$libraries" && pwd)
# Cargo's runner: only the tests see these libraries.
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_LIBRARY_PATH=$libraries ELBO_TEST_DEVICE=cuda:0"
if [ "$what" != models ]; then
    for dtype in f32 f16 bf16; do
        echo "== operations in $dtype"
        ELBO_TEST_DTYPE=$dtype ELBO_EMULATED_ASYNC=1 deploy/cuda/build.sh test -p elbo-kernels
    done
fi
if [ "$what" != operations ]; then
    echo "== models"
    deploy/cuda/build.sh test -p elbo-tests --test parity
fi
