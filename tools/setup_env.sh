# shellcheck shell=bash
# Sourced by run_tests.sh and the quick start, from the repository root.
#
#   setup_env EXTRAS     make .venv (once) with mmauxq[EXTRAS], editable and at
#                        the versions of constraints.txt, and activate it
#
# PYTHON chooses the interpreter (default python3). Nothing is installed when
# the environment is there already and what it is made from is unchanged.

# installing WHAT COMMAND...: run it, and say every 8 seconds how far it is;
# installers say nothing where there is no terminal.
installing() {
    local what=$1 begin=$SECONDS status=0 ticker
    shift
    echo "Installing $what ..."
    while sleep 8 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        echo "  $(du -sm .venv 2>/dev/null | cut -f1) MB in .venv" \
            "after $((SECONDS - begin)) s"
    done &
    ticker=$!
    "$@" || status=$?
    kill "$ticker"
    wait "$ticker" 2>/dev/null || true
    return "$status"
}

setup_env() {
    local extras=$1 python=${PYTHON:-python3} venv=.venv stamp
    if ! "$python" -c 'import sys; sys.exit(
            not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        echo "error: $python is not Python 3.10-3.12 (set PYTHON)" >&2
        return 2
    fi
    stamp="$extras $(cat setup.py constraints.txt tools/setup_env.sh |
        cksum) $PWD"
    if [ "$(cat "$venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        if [ ! -x "$venv/bin/python" ]; then
            echo "Making $venv with $("$python" --version) ..."
            "$python" -m venv "$venv" || {
                echo "error: $python -m venv failed (Debian: install" \
                    "python3-venv)" >&2
                return 2
            }
        fi
        local -a install=("$venv/bin/python" -m pip install -q)
        # uv is only quicker; pip does the same. As pip does by itself, it is
        # told to compile: that takes half a minute, and later every command
        # starts in less than half of the time.
        if installing 'uv, which is quicker than pip' \
            "${install[@]}" uv 2>/dev/null; then
            install=("$venv/bin/uv" pip install -q --compile-bytecode
                --python "$venv/bin/python")
        fi
        installing "mmauxq[$extras] (once; 3 GB are loaded, 5500 MB stay)" \
            "${install[@]}" -c constraints.txt -e ".[$extras]" || return 1
        echo "$stamp" >"$venv/installed-$extras"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
