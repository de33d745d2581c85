# shellcheck shell=bash
# Sourced by run_tests.sh and the quick start, from the repository root.
#
#   setup_env EXTRAS     make .venv (once) with mmauxq[EXTRAS], editable, and
#                        activate it
#
# PYTHON chooses the interpreter (default python3). Nothing is installed when
# the environment is there already and setup.py is unchanged.

TORCH='torch==2.11.0 torchvision==0.26.0'

setup_env() {
    local extras=$1 python=${PYTHON:-python3} venv=.venv stamp
    if ! "$python" -c 'import sys; sys.exit(
            not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        echo "error: $python is not Python 3.10-3.12 (set PYTHON)" >&2
        return 2
    fi
    stamp="$extras $(cksum <setup.py) $(cksum <tools/setup_env.sh) $PWD"
    if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        echo "Setting up $venv for mmauxq[$extras] ..."
        if [ ! -x "$venv/bin/python" ]; then
            "$python" -m venv "$venv" || {
                echo "error: $python -m venv failed (Debian: install" \
                    "python3-venv)" >&2
                return 2
            }
        fi
        # uv is only quicker; pip does the same.
        local -a install=("$venv/bin/python" -m pip install -q)
        if "${install[@]}" uv 2>/dev/null; then
            install=("$venv/bin/uv" pip install -q
                --python "$venv/bin/python")
        fi
        # shellcheck disable=SC2086
        "${install[@]}" $TORCH 'setuptools<82' wheel || return 1
        "${install[@]}" -e ".[$extras]" || return 1
        echo "$stamp" >"$venv/installed-$extras"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
