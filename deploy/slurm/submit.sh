#!/usr/bin/env bash
# Submits a job to Slurm: a coordinator, and an array of workers that start after the coordinator.
#
#     submit.sh JOB.toml OUT [RUN]
#
# OUT is the value of --out: a directory shared by all nodes, or a URL. RUN is a directory shared by all nodes for the token,
# the coordinator's address and the logs; the default is beside a local OUT. The same command resumes a job that ended early.
#
#     WORKERS=4              number of workers, one array task each
#     GPUS=1                 GPUs per worker; 0 computes on CPUs
#     COORDINATOR_SBATCH=    more sbatch options for the coordinator, such as '--partition=cpu --time=2-0'
#     WORKER_SBATCH=         more sbatch options for the workers, such as '--partition=gpu --time=4:00:00'
#     ELBO=elbo              the program, on every node
#     SBATCH_*, ELBO_*       as sbatch and elbo read them
set -euo pipefail

fail() { echo "submit.sh: $1" >&2; exit 2; }

[[ $# -eq 2 || $# -eq 3 ]] || fail "usage: submit.sh JOB.toml OUT [RUN]"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -r $1 ]] || fail "$1 can't be read: name the job's TOML file"
job=$(realpath "$1")
case $2 in
    *://*)
        out=$2
        run=${3:-}
        [[ -n $run ]] || fail "with a URL as output, name a directory all nodes share, for the logs: submit.sh $1 $2 RUN"
        ;;
    *)
        out=$(realpath -m "$2")
        run=${3:-$out-slurm}
        ;;
esac
workers=${WORKERS:-4} gpus=${GPUS:-1}
[[ $workers =~ ^[1-9][0-9]*$ ]] || fail "WORKERS=$workers: give a number from 1"
[[ $gpus =~ ^[0-9]+$ ]] || fail "GPUS=$gpus: give a number"
export ELBO=${ELBO:-elbo}
ELBO=$(command -v "$ELBO") || fail "there is no program elbo: put it on PATH, or name it with ELBO=/path/to/elbo"
ELBO=$(realpath "$ELBO")

# The token keeps out everyone else who can reach the port; only the owner can read its file.
mkdir -p "$run"
run=$(realpath "$run")
if [[ ! -s $run/token ]]; then
    (umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$run/token.new" && mv "$run/token.new" "$run/token")
fi
rm -f "$run/ended" "$run/address"

export ELBO_RUN=$run ELBO_OUT=$out ELBO_TOKEN_FILE=$run/token
# Relative paths in the job file keep their meaning: both jobs start in the current directory.
read -ra coordinator_options <<<"${COORDINATOR_SBATCH:-}"
read -ra worker_options <<<"${WORKER_SBATCH:-}"
if [[ $gpus -gt 0 ]]; then
    devices=(--gres="gpu:$gpus")
    export ELBO_DEVICE=${ELBO_DEVICE:-cuda}
else
    devices=()
    export ELBO_DEVICE=cpu
fi
coordinator=$(sbatch --parsable --export=ALL --output="$run/coordinator.log" "${coordinator_options[@]}" \
    "$here/coordinator.sbatch" "$job")
coordinator=${coordinator%%;*}
if ! array=$(sbatch --parsable --export=ALL --output="$run/worker-%a.log" --array="0-$((workers - 1))" \
    --dependency="after:$coordinator" "${devices[@]}" "${worker_options[@]}" "$here/workers.sbatch" "$coordinator"); then
    scancel "$coordinator"
    exit 1
fi
array=${array%%;*}
echo "coordinator: job $coordinator; workers: job $array; logs and address: $run"
echo "progress: $ELBO status $out; to stop: scancel $coordinator $array"
