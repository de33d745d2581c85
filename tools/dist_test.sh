#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
#
# As dist_train.sh, for evaluation.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo 'error: usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS' \
        '[arguments]' >&2
    exit 2
fi
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m mmauxq.engine.dist_launch "$3" \
    "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
