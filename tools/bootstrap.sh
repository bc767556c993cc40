#!/usr/bin/env bash
# Makes the virtual environment VENV with PYTHON (or the first Python >= 3.11 found), or says in one line what is missing.
# Usage: bootstrap.sh VENV [PYTHON] [CXX]
set -euo pipefail
venv=$1
wanted=${2:-}
cxx=${3:-g++}

fail() {
    echo "install: $*" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

command -v "${cxx%% *}" >/dev/null || fail "no C++ compiler ($cxx) found; install g++ or set CXX"

python="$venv/bin/python"
if [ ! -x "$python" ]; then
    base=
    for candidate in ${wanted:-python3.11 python3.12 python3.13 python3}; do
        if is_recent "$candidate"; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || fail "no Python >= 3.11 found (tried ${wanted:-python3.11 python3.12 python3.13 python3}); install one or set PYTHON"
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$base has no venv module; install it (Debian: apt-get install python3-venv) or set PYTHON"
    "$base" -m venv "$venv"
fi
is_recent "$python" || fail "$venv was made with an older Python; remove the folder and run make install again"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$headers/Python.h" ] || fail "no Python.h in $headers; install Python's headers (Debian: apt-get install python3-dev) or set PYTHON"
