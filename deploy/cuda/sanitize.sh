#!/bin/bash
# Looks for what only a real GPU shows, in four minutes at most: wrong memory accesses and races (compute-sanitizer), layers of
# full size beside PyTorch's, and batches of more values than 32 bits count.
#   [OUT=DIR] deploy/cuda/sanitize.sh [--device cuda:0] [--carry FILE|DIR] [--wheels DIR] [--libraries DIR[:DIR..]] [--seconds 240]
# Takes and leaves what `measure.sh` does, in OUT (target/cuda/sanitized).
exec "${PYTHON:-python3}" -u "$(dirname "${BASH_SOURCE[0]}")/measure/sanitize.py" "$@"
