#!/bin/bash
# Measures this program on this machine's GPU, in nine minutes at most: whether its results are right, how fast each part is,
# what limits it, and how it compares with PyTorch on the same chip.
#   [OUT=DIR] deploy/cuda/measure.sh [--device cuda:0] [--carry FILE|DIR] [--wheels DIR] [--libraries DIR[:DIR..]] [--seconds 560]
# Needs the files that `deploy/cuda/build.sh` writes to target/cuda: the programs (carry.tar.xz), and what the PyTorch scripts
# need besides PyTorch (wheels/). Writes report.md (for BENCHMARKS.md), log.txt and more to OUT (target/cuda/measured). Each
# step has its own time limit, and its findings are in the report as soon as it ends. See `deploy/cuda/README.md`.
exec "${PYTHON:-python3}" -u "$(dirname "${BASH_SOURCE[0]}")/measure/measure.py" "$@"
