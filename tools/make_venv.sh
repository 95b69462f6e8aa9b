#!/bin/sh
# Makes the project's virtual environment: make_venv.sh FOLDER [PYTHON]
# Installs what requirements/ pins and the package itself, editable and without its CUDA extension.
set -eu

venv=$1
asked=${2:-}
cd "$(dirname "$0")/.."

# Everything is pinned, so a user's own constraints and install options are left out; where packages
# come from (indexes, proxies, certificates) stays as the user has it.
export PIP_CONSTRAINT=/dev/null PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PIP_TARGET PIP_PREFIX

fit() { # a Python that torch has wheels for; $2: that also has the headers extensions need
  "$1" - "$2" <<'PY' >/dev/null 2>&1
import os, sys, sysconfig, venv
fit = (3, 10) <= sys.version_info[:2] <= (3, 14)
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
sys.exit(not (fit and (headers or sys.argv[1] == "any")))
PY
}

if [ ! -x "$venv/bin/python" ]; then
  python=$asked
  for need in headers any; do
    for candidate in python3 python3.12 python3.13 python3.11 python3.10 python3.14 python; do
      if [ -z "$python" ] && fit "$candidate" "$need"; then python=$candidate; fi
    done
  done
  if [ -z "$python" ]; then
    echo "No Python 3.10 to 3.14 found. Name one: make PYTHON=/path/to/python" >&2
    exit 1
  fi
  echo "Making $venv with $($python --version) ($(command -v "$python"))"
  # Some distributions leave out ensurepip; their pip can then fill the environment from outside.
  if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet pip
  fi
fi

python=$venv/bin/python
echo "Installing requirements (torch with its CUDA libraries is about 5 GB unpacked)"
"$python" -m pip install --quiet -r requirements/build.txt -r requirements/run.txt \
  -r requirements/test.txt
FLASH_ATTN2_CUDA=0 "$python" -m pip install --quiet --no-deps --no-build-isolation -e .

# A GPU and no compiler: nvcc is to be had as wheels.
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' &&
  ! "$python" tools/can_build.py >/dev/null; then
  echo "A GPU but no fitting nvcc: installing nvcc"
  "$python" -m pip install --quiet -r requirements/nvcc.txt
fi
