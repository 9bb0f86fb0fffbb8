"""Good commands over all verbs: words, of which ``{name}`` are materials that may be damaged and ``OUT`` is written."""

from __future__ import annotations

OUT = "OUT"

QUICK = [
    "inspect {hf}",
    "inspect {m} --weights --json",
    "inspect {legacy}",
    "convert --load-dir {hf} --save-dir OUT",
    "export --load-dir {m} --save-dir OUT",
    "export --load-dir {legacy} --save-dir OUT",
    "transfer --load-dir {m} --save-dir OUT --target-tensor-parallel-size 2",
    "prune --load {m} --save OUT --plan {plan.json}",
    "prune --load {m} --save OUT --metric magnitude --ffn-hidden-size-remain 32",
    "prune-hf --model-name-or-path {hf} --output-path OUT --metric magnitude --prune-config-path {sizes.json}",
    "vocab select --load-dir {hf} --counts {counts} --remain-vocab-size 300 --save-plan OUT",
    "vocab trim --load-dir {hf} --plan {vocab_plan.json} --save-dir OUT",
    "vocab count --tokenizer {hf} --input {text.txt} --output OUT --workers 1",
    "vocab remap --input {pair} --map {trimmed} --output-prefix OUT",
    "estimate {hf}",
    "estimate {m} --ffn-hidden-size-remain 32",
]
"""A second each."""

SLOW = [
    "prune --load {m} --save OUT --scores {scores} --metric fisher --ffn-hidden-size-remain 32 --no-refit",
    "prune --load {m} --save OUT --data {samples.safetensors}:1 --nsamples 4 --seq-length 16 --ffn-hidden-size-remain 32",
    "prune-hf --model-name-or-path {hf} --output-path OUT --plan {plan.json} --data {text.txt}:1 --nsamples 4 --seq-length 16",
    "score --load {m} --save OUT --data {lines.jsonl}:1 --nsamples 4 --seq-length 16 --metrics activation",
    "sample --load {m} --save OUT.safetensors --nsamples 2 --seq-length 16",
    "preprocess --input {lines.jsonl} --tokenizer {hf} --output-prefix OUT --workers 1",
    "evaluate --load-dir {m} --data {text.txt} --seq-length 16 --windows 2 --output OUT",
    "verify --load-dir {m} --hf-dir {hf} --seq-length 16",
    "compare --before {hf} --after {hf} --before-evaluation {evaluation.json} --max-new-tokens 2 --output OUT",
    "teach --load {m} --save OUT --data-path {pair} --split 80,20,0 --train-iters 2 --global-batch-size 2 --seq-length 16 "
    "--eval-iters 1 --top-k 4",
    "recover --load {m} --save OUT --data-path {pair} --split 80,20,0 --train-iters 1 --global-batch-size 2 --seq-length 16 "
    "--eval-iters 1",
    "recover --load {m} --save OUT --data-path {pair} --split 80,20,0 --train-iters 2 --global-batch-size 2 --seq-length 16 "
    "--eval-iters 1 --teacher-logits {teacher}",
]
"""They run a model, or start processes."""
