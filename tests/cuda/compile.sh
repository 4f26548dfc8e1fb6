#!/bin/sh
# Compiles every kernel for all supported GPUs: cubins for sm_80, sm_90 and sm_100, and PTX of compute_80 for others. Fails if
# a kernel does not compile, causes a warning, or keeps registers in memory (spills, or a stack frame). Prints the registers
# and static shared bytes of each kernel. Uses nvcc from $NVCC, else from PATH, and works in a temporary directory.
set -eu

kernels=$(cd "$(dirname "$0")/../../worker/kernels/cuda" && pwd)
nvcc=${NVCC:-nvcc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for source in "$kernels"/*.cu; do
    name=$(basename "$source" .cu)
    "$nvcc" -std=c++17 -O3 -Werror all-warnings -arch=compute_80 -ptx -o "$work/$name.ptx" "$source"
    for arch in sm_80 sm_90 sm_100; do
        # The log says why a compilation failed.
        "$nvcc" -std=c++17 -O3 -Werror all-warnings -arch=$arch -cubin -Xptxas -v -o "$work/$name.cubin" "$source" \
            2>"$work/log" || { cat "$work/log"; exit 1; }
        awk -v arch=$arch '
            /Compiling entry function/ { split($0, quoted, "\047"); kernel = quoted[2]; kernels++ }
            /bytes stack frame/ {
                frame = $1; spilled = 0
                for (i = 1; i < NF; i++) if ($(i + 1) == "bytes" && $(i + 2) == "spill") spilled += $i
            }
            / Used [0-9]+ registers/ {
                registers = 0; shared = 0
                for (i = 1; i < NF; i++) {
                    if ($i == "Used") registers = $(i + 1)
                    if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) shared = $i
                }
                printf "%-7s %-24s %3d registers %6d shared bytes\n", arch, kernel, registers, shared
                if (frame > 0 || spilled > 0) {
                    printf "%s spills: %d bytes of stack, %d bytes spilled\n", kernel, frame, spilled
                    failed = 1
                }
                used++
            }
            END {
                if (kernels == 0 || used != kernels) { print "ptxas did not report every kernel"; failed = 1 }
                exit failed
            }' "$work/log"
    done
done
