#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [arguments of train.py]
#
# One process per GPU; without any GPU, GPUS processes on the CPU (gloo).
# The batch size in the config is per process. Several machines: set NNODES,
# NODE_RANK, MASTER_ADDR and PORT alike on each.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo 'error: usage: tools/dist_train.sh CONFIG GPUS [arguments]' >&2
    exit 2
fi
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m mmauxq.engine.dist_launch "$2" \
    "$tools/train.py" "$1" --launcher pytorch "${@:3}"
