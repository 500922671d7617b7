#!/usr/bin/env bash
# Sets up the environment and runs the tests; arguments go to pytest: bash tests/run.sh -k reshard
set -euo pipefail
EXTRAS=test source "$(dirname "${BASH_SOURCE[0]}")/../examples/common.sh"

cd "$REPO"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two processes, each with ranks of its own; on GPUs one.
workers=2
[[ ${MEGATRON_VILA_TEST_GPU:-} != 1 ]] || workers=0
exec "$PYTHON" -m pytest -n "$workers" --dist loadfile "$@"
