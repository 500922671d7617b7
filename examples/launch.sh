# shellcheck shell=bash
# Sourced by the training scripts: finds the Python environment and defines launch and train_stage.
#
#   source examples/launch.sh
#   launch CONFIG key=value ...
#   train_stage 5 key=value ...
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

# train_stage STAGE key=value ...: the body of the stage scripts. Variables:
#   DATA        LLaVA-format JSON or JSONL file of the samples; several: a.json,b.json
#   TOKENIZER   folder of the Hugging Face tokenizer of the LLM
#   MODEL       longvila-1.5b, longvila-7b (default) or llama3-longvila-8b
#   MEDIA       folder of the files that DATA names (default: the folder of DATA)
#   CHECKPOINT  weights to start from, a run's folder or one of its steps (default: the stage before; stage 1: random ones)
#   CONTEXT     stages 4 and 5: tokens of a row of stage 4 (default 262144); rotary base, steps and batch follow from it
#   OUTPUT      folder of the run (default: runs/MODEL-stageN)
train_stage() {
  local stage=$1 model=${MODEL:-longvila-7b} context=${CONTEXT:-262144}
  local presets=${LAUNCH_DIR%/*}/megatron_vila/config/presets before="" output=runs/$model-stage$stage settings=()
  shift
  : "${DATA:?set DATA to the LLaVA-format JSON or JSONL file of the samples; several: a.json,b.json}"
  : "${TOKENIZER:?set TOKENIZER to the folder of the Hugging Face tokenizer of the LLM}"
  if ((stage >= 4)) && [[ ! -f $presets/rope/$context.yaml ]]; then
    echo "CONTEXT=$context has no known rotary base; use one of" \
      "$(cd "$presets/rope" && printf '%s\n' *.yaml | sort -n | sed 's/\.yaml//' | paste -sd ' ')" >&2
    return 1
  fi
  case $stage in
    1) settings=(checkpoint.save_every=100) ;;
    2) settings=(checkpoint.save_every=500) before=stage1 ;;
    3) settings=(checkpoint.save_every=200) before=stage2 ;;
    4) settings=(checkpoint.save_every=20 "include=[contexts/$context]") before=stage3 output+=-$context ;;
    # the published longvila-7b has another pair of base and factor, the preset's: to continue from it, override both
    5) settings=(checkpoint.save_every=50 "include=[rope/$context]") before=stage4-$context ;;
  esac
  launch "$model-stage$stage" \
    data.train="[$DATA]" \
    data.media_dir="${MEDIA:-}" \
    data.tokenizer="$TOKENIZER" \
    checkpoint.load="${CHECKPOINT:-${before:+runs/$model-$before}}" \
    train.output="${OUTPUT:-$output}" \
    "${settings[@]}" \
    "$@"
}
