#!/usr/bin/env bash
# Train a pruned Megatron checkpoint: one process per tensor-parallel rank, pipeline stage and data-parallel copy.
# Started again with the same settings it goes on from its last checkpoint.
#
#   LOAD_DIR, SAVE_DIR           checkpoint to start from, and directory of the run   (required)
#   DATA_PATH                    prefixes of .bin/.idx pairs, each after its weight or all without
#   TRAIN_DATA_PATH, VALID_DATA_PATH, TEST_DATA_PATH                                  (instead of DATA_PATH)
#   TRAIN_ITERS                  steps in all                                         (default 12500)
#   TP, PP, DP                   parallel sizes of the run                            (default 1, 1, 1)
#   NPROC_PER_NODE               processes on this machine                            (default TP × PP × DP / NNODES)
#   SEQ_LENGTH, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE                                   (default the model's, at most 4096; 1; 1024)
#   LR, MIN_LR                   learning rate, at first and at the end               (default 2.5e-5, 1e-5)
#   DTYPE                        bf16, fp16 or fp32                                   (default bf16)
#   TEACHER, TEACHER_LOGITS      distil from this checkpoint / from kept answers      (default: neither)
#   LORA_R                       train adapters of this rank alone                    (default: the model)
#   GPT_ARGS                     Megatron's own arguments; those of the shape must agree with the checkpoint
#   Further arguments are passed on, such as --save-interval 100.
#
#   Several machines, restarts after a lost process (not after bad input): see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require LOAD_DIR "a Megatron checkpoint"
require SAVE_DIR "the directory of the run"
if [ -z "${DATA_PATH:-}${TRAIN_DATA_PATH:-}" ]; then require DATA_PATH "prefix of a .bin/.idx pair"; fi
TP="${TP:-1}" PP="${PP:-1}" DP="${DP:-1}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$((TP * PP * DP / ${NNODES:-1}))}"

RUN_ARGS=(--train-iters "${TRAIN_ITERS:-12500}")
add() { if [ -n "$2" ]; then RUN_ARGS+=("$1" "$2"); fi; }
add --seq-length "${SEQ_LENGTH:-}"
add --micro-batch-size "${MICRO_BATCH_SIZE:-}"
add --global-batch-size "${GLOBAL_BATCH_SIZE:-}"
add --lr "${LR:-}"
add --min-lr "${MIN_LR:-}"
add --teacher "${TEACHER:-}"
add --teacher-logits "${TEACHER_LOGITS:-}"
add --lora-r "${LORA_R:-}"
# shellcheck disable=SC2206  # a blend is several words
{
  if [ -n "${DATA_PATH:-}" ]; then RUN_ARGS+=(--data-path $DATA_PATH); fi
  if [ -n "${TRAIN_DATA_PATH:-}" ]; then RUN_ARGS+=(--train-data-path $TRAIN_DATA_PATH); fi
  if [ -n "${VALID_DATA_PATH:-}" ]; then RUN_ARGS+=(--valid-data-path $VALID_DATA_PATH); fi
  if [ -n "${TEST_DATA_PATH:-}" ]; then RUN_ARGS+=(--test-data-path $TEST_DATA_PATH); fi
}
if [ "${DTYPE:-bf16}" != fp32 ]; then RUN_ARGS+=("--${DTYPE:-bf16}"); fi

# shellcheck disable=SC2086  # GPT_ARGS is several words
launch -m megatron_prune recover --load "$LOAD_DIR" --save "$SAVE_DIR" \
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${RUN_ARGS[@]}" ${GPT_ARGS:-} "$@"
