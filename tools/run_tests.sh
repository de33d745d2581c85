#!/usr/bin/env bash
# Set everything up in .venv and run the tests: bash tools/run_tests.sh
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh
setup_env openmmlab,tests
# The tests start hundreds of processes; without bytecode each would compile
# mmpretrain anew.
unset PYTHONDONTWRITEBYTECODE
# One thread per worker: the tests are small and there are two workers.
export OMP_NUM_THREADS=1
# A worker that has none left takes half of those that the other has not begun.
exec python -m pytest -n 2 --dist worksteal "$@"
