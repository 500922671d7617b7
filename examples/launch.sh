# shellcheck shell=bash
# Sourced by the training scripts: finds the Python environment and defines launch.
#
#   source examples/launch.sh
#   launch CONFIG key=value ...
#
# One node needs no setting. On several nodes run the same script on each with:
#   NNODES       number of nodes
#   NODE_RANK    number of this node, from 0
#   MASTER_ADDR  host name or address of node 0
#   MASTER_PORT  a free port there (default 29500)
# GPUS_PER_NODE is what nvidia-smi counts, or 8.

LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}

# a prepared environment or container is used as it is: nothing is installed on a compute node
if python3 -c 'import importlib.util as u; u.find_spec("torch").name, u.find_spec("megatron.core").name' 2>/dev/null; then
  export PYTHONPATH="${LAUNCH_DIR%/*}${PYTHONPATH:+:$PYTHONPATH}"
else
  source "$LAUNCH_DIR/common.sh"
fi
GPUS_PER_NODE=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
((GPUS_PER_NODE > 0)) || GPUS_PER_NODE=8

# launch CONFIG key=value ...: takes the place of this shell, so that a batch system's signals reach the program that saves on
# them. --dry-run starts no rank. Exit status: 0 finished, 75 stopped and saved, 2 bad input (docs/launching.md).
launch() {
  exec python3 -m megatron_vila.launch \
    --nnodes "$NNODES" \
    --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" \
    --master-port "$MASTER_PORT" \
    --nproc-per-node "$GPUS_PER_NODE" \
    "$@"
}

# rotary_base CONTEXT: the base that the released scripts train a context of so many tokens with
rotary_base() {
  case $1 in
    131072) echo 15300000.0 ;;
    262144) echo 207112184.0 ;;
    524288) echo 1062356830.0 ;;
    1048576) echo 3580165449.0 ;;
    *)
      echo "CONTEXT=$1 has no known rotary base; use 131072, 262144, 524288 or 1048576" >&2
      return 1
      ;;
  esac
}
