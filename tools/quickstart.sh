#!/usr/bin/env bash
# Set everything up in .venv and run the main job on scikit-learn's digits:
#   bash tools/quickstart.sh [--seeds 0 1 2 3 4] [--epochs 20] [--out DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh
setup_env openmmlab,compare,digits
# The network is so small that a second thread only costs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python tools/quickstart.py "$@"
