#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB CONFIG [GPUS] [arguments of train.py]
#
# GPUS (default 8) is the number of all processes. From the environment:
# GPUS_PER_NODE (default: GPUS, at most 8), CPUS_PER_TASK (5), SRUN_ARGS.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo 'error: usage: tools/slurm_train.sh PARTITION JOB CONFIG [GPUS]' \
        '[arguments]' >&2
    exit 2
fi
partition=$1 job=$2 config=$3
shift 3
gpus=8
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    gpus=$1
    shift
fi
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS must be a positive integer, not '$gpus'" >&2
    exit 2
fi
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
read -r -a srun_args <<<"${SRUN_ARGS:-}"
exec srun -p "$partition" --job-name="$job" --gres="gpu:$per_node" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$tools/train.py" "$config" --launcher slurm "$@"
