#!/usr/bin/env bash
# Prune a Megatron checkpoint under TP × PP: one process per tensor-parallel rank and pipeline stage.
#
#   LOAD_DIR, SAVE_DIR           checkpoint to read and to write               (required)
#   TP, PP                       parallel sizes of the run                     (default 1, 1)
#   NPROC_PER_NODE               processes on this machine                     (default TP × PP / NNODES)
#   HIDDEN_SIZE_REMAIN  NUM_ATTENTION_HEADS_REMAIN  NUM_QUERY_GROUPS_REMAIN  FFN_HIDDEN_SIZE_REMAIN
#   NUM_LAYERS_REMAIN            sizes that stay                               (default: all)
#   DROP_LAYERS                  layers that go, 0-based, such as 7,13         (default: none)
#   DROP_ATTENTION, DROP_MLP     layers whose attention, or MLP, goes alone    (default: none)
#   LAYER_SIZES                  JSON file of sizes by layer                   (default: none)
#   PRUNE_TYPE                   balance, global or unbalance                  (default balance)
#   PARAMS, RATIO, MEMORY        a budget instead of sizes, such as 90M, 0.25, 2GiB
#   ALLOCATE, SEARCH             free: sizes by layer within it / shapes to compare (default uniform, 1)
#   METRIC, SEED                 how units are scored                          (default: the best for each axis, 1234)
#   DATA, SCORES                 text to measure on / scores that were kept    (default: the model's own samples)
#   PLAN, SAVE_PLAN              apply a plan / also write the plan here       (default: none)
#   VOCAB_PLAN                   keep the tokens of this plan (of megatron-prune vocab select)
#   SERVE                        take only shapes that can be served so, such as vllm,tp=4,8 (default: any)
#   TARGET_FAMILY                Hugging Face family it will be exported as    (default: its own)
#   GPT_ARGS                     Megatron's own arguments; they must agree with the checkpoint
#   Further arguments are passed on, such as --overwrite, --untie or --uniform.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
require LOAD_DIR "a Megatron checkpoint"
require SAVE_DIR "the Megatron checkpoint to write"
TP="${TP:-1}" PP="${PP:-1}"
NPROC_PER_NODE="${NPROC_PER_NODE:-$((TP * PP / ${NNODES:-1}))}"

PRUNE_ARGS=(--prune-type "${PRUNE_TYPE:-balance}" --seed "${SEED:-1234}")
add() { if [ -n "$2" ]; then PRUNE_ARGS+=("$1" "$2"); fi; }
add --hidden-size-remain "${HIDDEN_SIZE_REMAIN:-}"
add --num-attention-heads-remain "${NUM_ATTENTION_HEADS_REMAIN:-}"
add --num-query-groups-remain "${NUM_QUERY_GROUPS_REMAIN:-}"
add --ffn-hidden-size-remain "${FFN_HIDDEN_SIZE_REMAIN:-}"
add --num-layers-remain "${NUM_LAYERS_REMAIN:-}"
add --drop-layers "${DROP_LAYERS:-}"
add --drop-attention "${DROP_ATTENTION:-}"
add --drop-mlp "${DROP_MLP:-}"
add --layer-sizes "${LAYER_SIZES:-}"
add --params "${PARAMS:-}"
add --ratio "${RATIO:-}"
add --memory "${MEMORY:-}"
add --allocate "${ALLOCATE:-}"
add --search "${SEARCH:-}"
add --metric "${METRIC:-}"
add --scores "${SCORES:-}"
add --plan "${PLAN:-}"
add --vocab-plan "${VOCAB_PLAN:-}"
add --serve "${SERVE:-}"
add --target-family "${TARGET_FAMILY:-}"
# shellcheck disable=SC2206  # several sources are several words
if [ -n "${DATA:-}" ]; then PRUNE_ARGS+=(--data $DATA); fi
add --save-plan "${SAVE_PLAN:-}"

# shellcheck disable=SC2086  # GPT_ARGS is a list of arguments
launch "$ROOT/prune_llama.py" --load "$LOAD_DIR" --save "$SAVE_DIR" \
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${PRUNE_ARGS[@]}" ${GPT_ARGS:-} "$@"
