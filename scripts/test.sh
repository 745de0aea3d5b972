#!/usr/bin/env bash
# Runs the checks and the tests in .venv, which it makes first. Arguments go to pytest:
#
#   bash scripts/test.sh                          all but the slow ones
#   bash scripts/test.sh -m slow                  the slow ones
#   bash scripts/test.sh tests/test_model.py -x   one file, up to the first failure
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh

ensure_venv requirements.txt requirements-dev.txt requirements-demo.txt
export HF_HUB_OFFLINE=1
"$python" -m ruff check .
"$python" -m pytest "$@"
