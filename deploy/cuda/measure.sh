#!/bin/bash
# What this program is worth on this machine's GPU, in nine minutes at most: whether it is right, how fast each part of it is,
# what limits it, and how far it is from PyTorch on the same chip.
#   [OUT=DIR] deploy/cuda/measure.sh [--device cuda:0] [--carry FILE|DIR] [--wheels DIR] [--libraries DIR[:DIR..]] [--seconds 560]
# Takes what `deploy/cuda/build.sh` leaves in target/cuda: the programs (carry.tar.xz), and what PyTorch's side needs beside
# PyTorch (wheels/). Leaves report.md, which is made for BENCHMARKS.md, log.txt and more in OUT (target/cuda/measured). Each step
# has a limit of its own, and what it found is in the report as soon as it ends. `deploy/cuda/README.md` has more.
exec "${PYTHON:-python3}" -u "$(dirname "${BASH_SOURCE[0]}")/measure/measure.py" "$@"
