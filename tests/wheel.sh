#!/usr/bin/env bash
# The wheel in an environment that holds its own requirements alone, outside the repository: all packages are in it, and a tiny
# model goes through convert, prune, preprocess, recover and export.     make test-wheel
#   PYTHON, TORCH        interpreter that the environment is made with, and what is installed of torch first
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

mkdir "$work/source"
cp -r "$repository"/{setup.py,pyproject.toml,README.md,megatron_prune} "$work/source"
cp "$repository/tests/tiny.py" "$work"
cd "$work"
"${PYTHON:-python3}" -m venv env
env/bin/python -m pip install --quiet "${TORCH:-torch==2.13.0}"
env/bin/python -m pip wheel --quiet --no-deps --wheel-dir . ./source
env/bin/python -m pip install --quiet ./*.whl

here() { find "$1" -name '*.py' -printf '%P\n' | sort; }
diff <(here source/megatron_prune) <(here env/lib/python3*/site-packages/megatron_prune) || {
  echo "the wheel lacks modules" >&2
  exit 1
}

env/bin/python - << 'END'
from pathlib import Path
from tiny import build_tiny
build_tiny(Path("hf"), "llama", num_hidden_layers=2)
Path("text.txt").write_text("\n\n".join(f"{n} boxes and {n * n} jugs of a small text stand in row {n % 7}." * 4 for n in range(200)))
END
run() {
  echo "+ megatron-prune $*"
  timeout 300 env/bin/megatron-prune "$@"
}
run convert --load hf --save dense
run prune --load dense --save pruned --ffn_hidden_size_remain 64 --metric magnitude
run preprocess --input text.txt --tokenizer hf --output-prefix data --workers 1
run recover --load pruned --save run --data-path data_text_document --split 80,20,0 --seq-length 32 --train-iters 4 \
  --global-batch-size 2 --save-interval 2 --eval-iters 1 --lr 1e-3
run export --load run/best --save recovered
env/bin/python - << 'END'
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_pretrained("recovered").config.intermediate_size == 64
END
echo "the wheel holds what it needs"
