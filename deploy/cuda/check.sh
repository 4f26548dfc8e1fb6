#!/bin/bash
# What this program is worth on this machine's GPU, as one Markdown report on standard output: parity with PyTorch's numbers
# in double precision, speed beside PyTorch's, and where the time goes.
#   deploy/cuda/check.sh [CARRY] [PYTHON] > report.md
# CARRY is what `deploy/cuda/build.sh` leaves: target/cuda/carry with `elbo` and the test `parity`, or carry.tar.gz; PYTHON has
# tests/peer/requirements.txt and a PyTorch for CUDA. A part that fails says so, and the others are still run.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=${1:-$root/target/cuda/carry}
if [ -f "$dir" ]; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    tar -xzf "$dir" -C "$unpacked" || exit 2
    dir=$unpacked
fi
dir=$(cd "$dir" && pwd) || exit 2
python=${2:-}
device=${DEVICE:-cuda:0}
models=${MODELS:-sd2-base sd15 dit-xl-2 sdxl sd3-m}
batches=${BATCHES:-8,16,32,64}
failures=0

part() { printf '\n## %s\n\n    %s\n\n' "$1" "${*:2}"; }
# Runs a command and keeps what it says as it says it.
run() {
    local title=$1
    shift
    part "$title" "$@"
    echo '```'
    if ! "$@" 2>&1; then
        echo "FAILED"
        failures=$((failures + 1))
    fi
    echo '```'
}
# CUDA's libraries where PyTorch brings them, in case the system has none.
if [ -n "$python" ]; then
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    export LD_LIBRARY_PATH=$site/nvidia/cu13/lib:$site/nvidia/cudnn/lib:${LD_LIBRARY_PATH:-}
fi

echo "# elbo on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -1)"
run "Machine" nvidia-smi
export ELBO_TEST_DEVICE=$device ELBO_TEST_ROOT=$root
run "Parity: f32 without TF32, f16, bf16, and the same bits in any batch" "$dir/parity" --nocapture --test-threads 1
run "Labels of the digits, f32" "$dir/elbo" demo --device "$device" --out "$(mktemp -d)/demo" --progress none
for model in $models; do
    peer=()
    [ -n "$python" ] && peer=(--peer "$python")
    run "Speed: $model, bf16" "$dir/elbo" bench engine --model "$model" --device "$device" --dtype bf16 \
        --batch "$batches" "${peer[@]}"
    run "Speed with ten prompts of a latent: $model, bf16" "$dir/elbo" bench engine --model "$model" --device "$device" \
        --dtype bf16 --batch "$batches" --prompts 10
done
echo
echo "$failures parts failed."
[ "$failures" -eq 0 ]
