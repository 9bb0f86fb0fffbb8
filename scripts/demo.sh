#!/usr/bin/env bash
# The whole path on a real model: Hugging Face → Megatron shards → pruned under TP → Hugging Face → before/after table.
# Called by `make demo`. Settings (environment, or make demo NAME=value):
#
#   MODEL          any Llama, Mistral, Qwen2/2.5 or Qwen3: a directory or hub id  (default: SmolLM2-135M-Instruct)
#   TEXT           text for the perplexity                                         (default: Python's own documentation)
#   TP             tensor-parallel ranks                                           (default: the largest of 3 2 1 that divides)
#   PRUNE          what to prune, as arguments of the verb prune                    (default: see below)
#   OUT            where everything goes                                           (default: demo)
#
# A stage whose command has not changed since it last succeeded, and whose inputs were not remade, is not run again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
OUT="${OUT:-demo}"
mkdir -p "$OUT"
STARTED=$SECONDS FRESH=0

ranks() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$TP" "$@" 2> >(grep --line-buffered -v 'torch/distributed/run.py' >&2); }
prune_tool() { "$PYTHON" -m megatron_prune "$@"; }

# stage NUMBER TITLE RESULT COMMAND …: run the command unless RESULT stands from an earlier run of the same one.
stage() {
  local number="$1" title="$2" result="$3" stamp
  shift 3
  stamp="$OUT/.$(basename "$result").stamp"
  printf '\n\033[1m%s/7 %s\033[0m\n' "$number" "$title"
  if [ "$FRESH" = 0 ] && [ -e "$result" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$*" ]; then
    echo "    already in $result"
    return
  fi
  FRESH=1
  rm -f "$stamp"
  "$@"
  printf '%s' "$*" >"$stamp"
}

printf '\033[1m1/7 environment\033[0m\n    %s\n' "$("$PYTHON" -c 'import sys, torch, transformers; print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)')"

get_inputs() {
  if [ -z "${MODEL:-}" ]; then "$PYTHON" "$ROOT/scripts/demo_model.py" "$OUT/model"; fi
  "$PYTHON" "$ROOT/scripts/demo_text.py" "$OUT/calibration.txt" "$OUT/held_out.txt"
}
stage 2 "getting the model and the text" "$OUT/held_out.txt" get_inputs "${MODEL:-}"
HF="${MODEL:-$OUT/model}"
TEXT="${TEXT:-$OUT/held_out.txt}"

# TP and the default cut follow from the model's shape: one FFN channel in four, chosen and re-fitted on the calibration text.
read -r TP DEFAULT_PRUNE < <(prune_tool inspect "$HF" --json | "$PYTHON" -c '
import json, sys
facts = json.load(sys.stdin)
tp = int(sys.argv[1] or next(size for size in (3, 2, 1) if size in facts["tensor_parallel_sizes"]))
ffn = facts["shape"]["ffn_hidden_size"]
print(tp, f"--ffn-hidden-size-remain {max(tp, ffn * 3 // 4 // (8 * tp) * (8 * tp))}")' "${TP:-}")
PRUNE="${PRUNE:-$DEFAULT_PRUNE --prune-type global --data $OUT/calibration.txt:1 --nsamples 16}"

stage 3 "converting to Megatron shards for TP $TP" "$OUT/megatron" \
  prune_tool convert --load "$HF" --save "$OUT/megatron" --target-tensor-parallel-size "$TP" --overwrite
verify() { ranks -m megatron_prune verify --load "$OUT/megatron" --hf-dir "$HF" && touch "$OUT/verified"; }
stage 4 "comparing logits under TP $TP with transformers" "$OUT/verified" verify
prune() { ranks -m megatron_prune prune --load "$OUT/megatron" --save "$OUT/pruned" --save-plan "$OUT/plan.json" --overwrite "$@"; }
# shellcheck disable=SC2086  # PRUNE is a list of arguments
stage 5 "pruning under TP $TP: $PRUNE" "$OUT/pruned" prune $PRUNE
stage 6 "converting back to Hugging Face" "$OUT/pruned_hf" \
  prune_tool export --load "$OUT/pruned" --save "$OUT/pruned_hf" --overwrite
measure() {
  for name in megatron pruned; do
    ranks -m megatron_prune evaluate --load "$OUT/$name" --data "$TEXT" --windows 8 --output "$OUT/$name.json"
  done
  prune_tool compare --before "$HF" --after "$OUT/pruned_hf" --before-evaluation "$OUT/megatron.json" \
    --after-evaluation "$OUT/pruned.json" --output "$OUT/table.json" | tee "$OUT/table.txt.partial"
  mv "$OUT/table.txt.partial" "$OUT/table.txt"
}
LAST=$FRESH
stage 7 "perplexity under TP $TP, and a sample of both" "$OUT/table.txt" measure "$TEXT"
if [ "$LAST" = 0 ] && [ "$FRESH" = 0 ]; then cat "$OUT/table.txt"; fi

cat <<END

Done in $((SECONDS - STARTED)) s. The pruned model is a plain Hugging Face directory: $OUT/pruned_hf
One shot, no training, on a few windows of text: it shows the path. More text and the model's own samples do better (docs/measured.md).
END
