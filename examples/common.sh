# shellcheck shell=bash
# Sourced by the other scripts: finds or makes the Python environment, installs the package into it once, and puts it on PATH.
#
#   source examples/common.sh
#
# The environment is, in this order:
#   1. the active virtual environment (VIRTUAL_ENV) or conda environment (CONDA_PREFIX, not its "base");
#   2. a container's Python that has its own torch (NVIDIA's PyTorch images), or torch and megatron.core;
#   3. .venv in the repository, made with Python 3.11 or later.
# In 1 and 2 what is installed already stays; only what is missing is added. Where nothing is missing nothing is installed, and the
# package is used from this checkout. A second call finds its mark and is instant; an installation that was interrupted leaves no
# mark and is taken up again.
#
# WITH_GPU=1 or 0: ask for the GPU packages too (default: if nvidia-smi finds a GPU).
# EXTRAS: further extras of setup.py that must be there, such as test (installed they are in any case).

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
# where this is set, each of the many processes compiles all of torch anew: seconds each time
unset PYTHONDONTWRITEBYTECODE

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

gpu_count() {
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

WITH_GPU=${WITH_GPU:-$(($(gpu_count) > 0))}

is_supported_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_module() { # PYTHON MODULE: without importing it, but for the package that holds it
  "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$2" >/dev/null 2>&1
}

container_python() { # prints the Python of a container that brings its own torch; fails where there is none
  local python
  python=$(command -v python3) || return 1
  has_module "$python" torch || return 1
  [[ -n ${NVIDIA_PYTORCH_VERSION:-} ]] || has_module "$python" megatron.core || return 1
  echo "$python"
}

base_python() {
  local name
  for name in python3 python3.12 python3.11 python; do
    if is_supported_python "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

make_venv() {
  local venv=$REPO/.venv base
  # an installation that broke off may leave packages that look complete and are not
  if [[ -e $venv/.installing ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    base=$(base_python) || fail "Python 3.11 or later is needed; found: $(python3 --version 2>&1 || echo none). Install it" \
      "(Debian, Ubuntu: apt install python3.12 python3.12-venv; conda: conda create -n vila python=3.12) and run this again."
    say "making .venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" ||
      fail "$base -m venv failed; on Debian and Ubuntu install the package python3-venv and run this again."
  fi
}

usable_gpus() { # how many GPUs torch can use; asks it only where there are any
  local count
  count=$(gpu_count)
  if ((count > 0)); then
    count=$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
  fi
  echo "$count"
}

choose_processes() { # sets PROCESSES, which train a small model, and the threads of each
  local gpus threads
  gpus=$(usable_gpus)
  PROCESSES=2
  if ((gpus >= 2)); then
    echo "two processes on two GPUs (NCCL), which share each video by ulysses=2"
  elif ((gpus == 1)); then
    echo "one process on one GPU"
    PROCESSES=1
  else
    echo "two processes on the CPU (gloo), which share each video by ulysses=2"
    (($(gpu_count) == 0)) || echo "note: nvidia-smi finds a GPU, but this torch cannot use it"
    export CUDA_VISIBLE_DEVICES=""
  fi
  threads=$(($(nproc) / PROCESSES))
  export OMP_NUM_THREADS=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
}

is_complete() { # whether the environment holds all that is asked for
  local wanted=(${EXTRAS:-})
  ((!WITH_GPU)) || wanted+=(gpu)
  "$PYTHON" "$REPO/tools/environment.py" missing "${wanted[@]}" >/dev/null
}

install_package() { # CONSTRAINTS: install with these pins
  "$PYTHON" "$REPO/tools/environment.py" install "$1" test || return 1
  if ((WITH_GPU)) && ! "$PYTHON" "$REPO/tools/environment.py" install "$1" test,gpu; then
    echo "note: flash-attn-4 could not be installed; attention runs on cuDNN or torch's FlashAttention-2 instead."
  fi
}

set_up() {
  local own_venv=0 prefix pins mark stamp merged
  if [[ -n ${VIRTUAL_ENV:-} && $VIRTUAL_ENV != "$REPO/.venv" ]]; then
    PYTHON=$VIRTUAL_ENV/bin/python
  elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
    PYTHON=$CONDA_PREFIX/bin/python
  elif PYTHON=$(container_python); then
    :
  else
    own_venv=1
    make_venv
    PYTHON=$REPO/.venv/bin/python
  fi
  is_supported_python "$PYTHON" ||
    fail "$PYTHON is $("$PYTHON" --version 2>&1), Python 3.11 or later is needed. Deactivate this environment, or make one" \
      "with a later Python, and run this again."

  pins=$REPO/constraints.txt
  if "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    pins=$REPO/constraints-py312.txt
  fi
  if ((!own_venv)) && is_complete; then
    export PYTHON PATH="${PYTHON%/*}:$PATH" PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    return
  fi
  prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
  mark=$prefix/.megatron_vila-installed
  stamp="$REPO gpu=$WITH_GPU $(cat "$REPO/setup.py" "$REPO/pyproject.toml" "$pins" | cksum)"
  if [[ ! -e $mark || $(<"$mark") != "$stamp" ]]; then
    say "installing megatron_vila into $prefix (the first time: two minutes or more, most of it for torch)"
    rm -f "$mark"
    if ((own_venv)); then
      touch "$prefix/.installing"
      install_package "$pins" || fail "the installation failed; see pip's message above."
    else
      merged=$(mktemp)
      "$PYTHON" "$REPO/tools/environment.py" pins "$pins" >"$merged"
      install_package "$merged" ||
        fail "the installation into the active environment failed; see pip's message above. What is installed there was to" \
          "stay: update the packages that pip names, or deactivate the environment to let this script make .venv."
      rm -f "$merged"
    fi
    "$PYTHON" "$REPO/tools/environment.py" check ||
      fail "the installation into $prefix is not usable; see the message above."
    printf '%s\n' "$stamp" >"$mark"
    rm -f "$prefix/.installing"
  fi
  export PYTHON PATH="${PYTHON%/*}:$PATH"
}

# several nodes may start at once on a shared file system: one installs, the others wait
if command -v flock >/dev/null 2>&1 && { true >>"$REPO/.setup.lock"; } 2>/dev/null; then
  exec {SETUP_LOCK}>>"$REPO/.setup.lock"
  flock "$SETUP_LOCK"
  set_up
  exec {SETUP_LOCK}>&-
else
  set_up
fi
