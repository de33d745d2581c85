# shellcheck shell=bash
# Sourced by run_tests.sh and the quick start, from the repository root.
#
#   setup_env EXTRAS     make .venv (once) with mmauxq[EXTRAS], editable, and
#                        activate it
#
# PYTHON chooses the interpreter (default python3). Nothing is installed when
# the environment is there already and setup.py is unchanged.

TORCH='torch==2.11.0 torchvision==0.26.0'

# TEXT COMMAND...: run it, with a line now and every 8 seconds, since the
# installers say nothing where there is no terminal.
say_while() {
    local text=$1 status=0 speaker
    shift
    echo "  [$SECONDS s] $text"
    (while sleep 8 && kill -0 $$ 2>/dev/null; do
        echo "  [$SECONDS s] still at it: $text"
    done) &
    speaker=$!
    "$@" || status=$?
    kill "$speaker" 2>/dev/null
    wait "$speaker" 2>/dev/null || true
    return "$status"
}

setup_env() {
    local extras=$1 python=${PYTHON:-python3} venv=.venv stamp
    if ! "$python" -c 'import sys; sys.exit(
            not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        echo "error: $python is not Python 3.10-3.12 (set PYTHON)" >&2
        return 2
    fi
    stamp="$extras $(cksum <setup.py) $(cksum <tools/setup_env.sh) $PWD"
    if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        echo "Setting up $venv for mmauxq[$extras], once: 1 to 3 minutes"
        if [ ! -x "$venv/bin/python" ]; then
            say_while "1 of 4: $venv" "$python" -m venv "$venv" || {
                echo "error: $python -m venv failed (Debian: install" \
                    "python3-venv)" >&2
                return 2
            }
        fi
        # uv is only quicker; pip does the same.
        local -a install=("$venv/bin/python" -m pip install -q)
        if say_while '2 of 4: uv' "${install[@]}" uv 2>/dev/null; then
            install=("$venv/bin/uv" pip install -q
                --python "$venv/bin/python")
        fi
        # shellcheck disable=SC2086
        say_while "3 of 4: $TORCH" \
            "${install[@]}" $TORCH 'setuptools<82' wheel || return 1
        say_while "4 of 4: mmauxq[$extras] and what it needs" \
            "${install[@]}" -e ".[$extras]" || return 1
        echo "$stamp" >"$venv/installed-$extras"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
