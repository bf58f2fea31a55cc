#!/usr/bin/env bash
# Makes .venv with Python 3.12 and the pinned packages. Needs any Python 3; brings its own uv if there is none.
# Usage: scripts/install.sh [EXTRAS], e.g. scripts/install.sh dev,metaworld
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extras=${1:-dev}

find_uv() {
  if (cd / && uv --version) >/dev/null 2>&1; then
    (cd / && command -v uv)
  elif [ -x "$root/.uv/bin/uv" ]; then
    echo "$root/.uv/bin/uv"
  else
    # Outside the project: a version manager may otherwise insist on the very Python that uv is to find.
    (cd / && python3 -m pip install --quiet --disable-pip-version-check --target "$root/.uv" uv) >&2
    echo "$root/.uv/bin/uv"
  fi
}

uv=$(find_uv)
cd "$root"
[ -x .venv/bin/python ] || "$uv" venv --quiet --python "$(cat .python-version)" .venv
echo "Installing the pinned packages into .venv (about 6 GB on the first run)"
"$uv" pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[$extras]"
