#!/usr/bin/env bash
# Megatron → Hugging Face. One process is enough; more only make it faster (see launch.sh).
#
#   LOAD_DIR        Megatron checkpoint                                        (required)
#   SAVE_DIR        Hugging Face directory to write                            (required)
#   HF_DIR          where config.json and tokenizer come from                  (default: kept in the checkpoint)
#   PARAMS_DTYPE    fp32, bf16 or fp16                                         (default: that of the original model)
#   TARGET_FAMILY   write as another family, such as mistral                   (default: the original one)
#   MAX_SHARD_SIZE  split weight files larger than this                        (default 5GB)
#   Further arguments are passed on, such as --overwrite.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require LOAD_DIR "a Megatron checkpoint"
require SAVE_DIR "the Hugging Face directory to write"

launch "$ROOT/tools/checkpoint_conversion/megatron_to_hf.py" \
  --load "$LOAD_DIR" --save "$SAVE_DIR" --max-shard-size "${MAX_SHARD_SIZE:-5GB}" \
  ${HF_DIR:+--hf-dir "$HF_DIR"} ${PARAMS_DTYPE:+--target-params-dtype "$PARAMS_DTYPE"} \
  ${TARGET_FAMILY:+--target-family "$TARGET_FAMILY"} "$@"
