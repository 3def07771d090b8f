#!/usr/bin/env bash
# Makes the virtual environment .venv and installs requirements.txt into it; a second call reuses
# it. Sourced by the other scripts: afterwards $PYTHON is the environment's Python, and the working
# folder is the repository's root.
#
#   VENV=/some/dir     put the environment elsewhere
#   PYTHON=python3.12  make it with this Python (3.10 to 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
works() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }

# an environment that was interrupted while it was made has a Python but no pip
if [ -e "$VENV" ] && ! { works "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }; then
    if [ ! -f "$VENV/pyvenv.cfg" ]; then
        echo "error: VENV=$VENV exists and is no virtual environment; name another folder" >&2
        exit 1
    fi
    echo "$VENV is incomplete or of another Python; making it anew ..."
    rm -rf "$VENV"
fi

if [ ! -x "$VENV/bin/python" ]; then
    if [ -n "${PYTHON:-}" ] && ! works "$PYTHON"; then
        echo "error: PYTHON=$PYTHON does not run, or is not Python 3.10 to 3.12" >&2
        exit 1
    fi
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if command -v "$candidate" >/dev/null && works "$candidate"; then
            found="$candidate"
            break
        fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.10 to 3.12 found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
        exit 1
    fi
    echo "Making $VENV with $("$found" --version) ..."
    if ! "$found" -m venv "$VENV"; then
        rm -rf "$VENV"
        echo "error: $found cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
fi
PYTHON="$VENV/bin/python"

# The stamp is written last: an installation that was interrupted is done again.
stamp="$VENV/requirements.installed"
if ! cmp -s requirements.txt "$stamp"; then
    echo "Installing requirements.txt (torch with its GPU libraries: some 5 GB, a few minutes) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
fi
