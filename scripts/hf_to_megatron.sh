#!/usr/bin/env bash
# Hugging Face → Megatron. One process is enough; more only make it faster (see launch.sh).
#
#   HF_DIR          Hugging Face directory or hub id                  (required)
#   SAVE_DIR        Megatron checkpoint to write                      (required)
#   TP, PP          target tensor- and pipeline-parallel sizes        (default 1, 1)
#   PARAMS_DTYPE    fp32, bf16 or fp16                                (default: as stored)
#   CKPT_FORMAT     torch_dist or torch                               (default torch_dist)
#   VOCAB_DIVISIBLE_BY   padded vocabulary: a multiple of this × TP   (default 128)
#   Further arguments are passed on, such as --overwrite.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require HF_DIR "a Hugging Face directory or hub id"
require SAVE_DIR "the Megatron checkpoint to write"

launch "$ROOT/tools/checkpoint_conversion/hf_to_megatron.py" \
  --load "$HF_DIR" --save "$SAVE_DIR" \
  --target-tensor-parallel-size "${TP:-1}" --target-pipeline-parallel-size "${PP:-1}" \
  ${PARAMS_DTYPE:+--target-params-dtype "$PARAMS_DTYPE"} --ckpt-format "${CKPT_FORMAT:-torch_dist}" \
  --make-vocab-size-divisible-by "${VOCAB_DIVISIBLE_BY:-128}" "$@"
