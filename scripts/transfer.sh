#!/usr/bin/env bash
# Rewrite a Megatron checkpoint for another TP × PP, format or dtype; also makes equal shards from unequal ones.
#
#   LOAD_DIR, SAVE_DIR   checkpoint to read and to write                       (required)
#   TP, PP               target tensor- and pipeline-parallel sizes            (default 1, 1)
#   PARAMS_DTYPE         fp32, bf16 or fp16                                    (default: as stored)
#   CKPT_FORMAT          torch_dist or torch                                   (default: that of the source)
#   Further arguments are passed on, such as --overwrite.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require LOAD_DIR "a Megatron checkpoint"
require SAVE_DIR "the Megatron checkpoint to write"

launch "$ROOT/tools/checkpoint_conversion/transfer.py" \
  --load "$LOAD_DIR" --save "$SAVE_DIR" \
  --target-tensor-parallel-size "${TP:-1}" --target-pipeline-parallel-size "${PP:-1}" \
  ${PARAMS_DTYPE:+--target-params-dtype "$PARAMS_DTYPE"} ${CKPT_FORMAT:+--ckpt-format "$CKPT_FORMAT"} "$@"
