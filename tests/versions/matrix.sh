#!/usr/bin/env bash
# Merge adapters that older versions of PEFT write, and compare with their own merges:
#   tests/versions/matrix.sh VERSION...
# PEFT alone is installed, without its dependencies, into a folder of each version; the tests run in
# the environment of the project, and make the adapters in a process that imports PEFT from there.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
python=${PYTHON:-.venv/bin/python}

folders=()
for version in "$@"; do
    folder=$PWD/.venv-versions/peft/$version
    [[ -d $folder/peft ]] || "$python" -m pip install -q --disable-pip-version-check --no-deps \
        --target "$folder" "peft==$version"
    folders+=("$folder")
done
QCORE_PEFT=$(IFS=:; echo "${folders[*]}") "$python" -m pytest tests/merging/test_adapter_matrix.py
