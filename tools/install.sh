#!/usr/bin/env bash
# Create a virtual environment with the package and the locked distributions, checked by hash.
#
#     tools/install.sh .venv requirements.lock
#
# PYTHON        the interpreter for a new environment
# WHEELS_ALONE  set it to empty if a package has no wheel for the machine; sdists are then built
#               with build tools that are not checked by hash
set -euo pipefail
venv=$1
shift
locks=("${@/#/--requirement=}")
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))'; then
    echo "The pinned versions need Python 3.11.5 or newer; '$python' is $("$python" --version 2>&1)." \
        "Name another interpreter, for example: make install PYTHON=python3.12" >&2
    exit 2
fi
test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
# without bytecode, half the time: Python writes it for the modules that are imported
checked() { pip install --no-compile --require-hashes --no-deps ${WHEELS_ALONE---only-binary=:all:} "$@"; }

# torch has many builds, and pip's settings select one. With a lock file pip ignores builds in a
# folder, so the build is downloaded without the lock file and checked afterwards.
if ! pip show torch >/dev/null 2>&1; then
    found=$(mktemp -d)
    trap 'rm -rf "$found"' EXIT
    pip download --no-deps --constraint constraints.txt --dest "$found" torch
    sed -n '/^torch==/,/[^\\]$/p' "$1" >"$found/pin.txt"
    checked --no-index --find-links "$found" --requirement "$found/pin.txt" || {
        echo "The hash of $(basename "$found"/torch-*) is not in $1." \
            "To use this build of torch, install it unchecked and try again:" \
            "$venv/bin/pip install --no-deps -c constraints.txt torch" >&2
        exit 2
    }
fi
checked "${locks[@]}"
pip install --constraint constraints.txt torch # further requirements of a CUDA build
pip install --no-deps --no-build-isolation --editable .
pip check
