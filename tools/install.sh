#!/usr/bin/env bash
# A virtual environment with the package and what the locks name, every file checked by its hash.
#
#     tools/install.sh .venv requirements.lock
#
# PYTHON        makes the environment, where there is none yet
# WHEELS_ALONE  empty where a package has no wheel for the machine: what builds an sdist has no hash
set -euo pipefail
venv=$1
shift
locks=("${@/#/--requirement=}")
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
checked() { pip install --require-hashes --no-deps ${WHEELS_ALONE---only-binary=:all:} "$@"; }

# Of torch there are many builds, and which one is meant is for pip's settings to say. In a lock pip
# would pass over one that lies in a folder, so it is looked for without, and checked then.
if ! pip show torch >/dev/null 2>&1; then
    found=$(mktemp -d)
    trap 'rm -rf "$found"' EXIT
    pip download --no-deps --constraint constraints.txt --dest "$found" torch
    sed -n '/^torch==/,/[^\\]$/p' "$1" >"$found/pin.txt"
    checked --no-index --find-links "$found" --requirement "$found/pin.txt" || {
        echo "The build of torch must be one that $1 knows, came $(basename "$found"/torch-*)." \
            "Install it unchecked and try again:" \
            "$venv/bin/pip install --no-deps -c constraints.txt torch" >&2
        exit 2
    }
fi
checked "${locks[@]}"
pip install --constraint constraints.txt torch # what a CUDA build asks for besides, if it is one
pip install --no-deps --no-build-isolation --editable .
pip check
