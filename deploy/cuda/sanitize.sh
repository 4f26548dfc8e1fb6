#!/bin/bash
# Checks what only a real GPU can show, in four minutes at most: wrong memory accesses and races (compute-sanitizer), layers of
# full size compared with PyTorch, and batches of more values than 32 bits can count.
#   [OUT=DIR] deploy/cuda/sanitize.sh [--device cuda:0] [--carry FILE|DIR] [--wheels DIR] [--libraries DIR[:DIR..]] [--seconds 240]
# Needs and writes the same files as `measure.sh`, in OUT (target/cuda/sanitized).
exec "${PYTHON:-python3}" -u "$(dirname "${BASH_SOURCE[0]}")/measure/sanitize.py" "$@"
