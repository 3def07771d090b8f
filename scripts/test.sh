#!/usr/bin/env bash
# Environment, linter, tests: a process for each core, each with one thread, so that they neither
# wait for one another nor add numbers in an order that depends on the machine. Further arguments
# go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal "$@"
