#!/usr/bin/env bash
# The archives of a release, in an environment of their own outside the repository: sdist and wheel are built and hold what they
# must; where the wheel's own requirements alone are installed, a tiny model goes through convert, prune under torchrun, transfer,
# preprocess, recover and export; then a fast part of the suite runs beside the installed package.     make test-wheel
#   PYTHON, TORCH        interpreter that the environment is made with, and what is installed of torch first
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

mkdir "$work/source"
git -C "$repository" ls-files --cached --others --exclude-standard -z | tar -C "$repository" --null --files-from - --create \
  --ignore-failed-read | tar -C "$work/source" --extract
cp "$repository/tests/tiny.py" "$work"
cp -r "$work/source" "$work/build" # what is built leaves its traces here
cd "$work"
"${PYTHON:-python3}" -m venv env
"${PYTHON:-python3}" -m venv builder
builder/bin/python -m pip install --quiet build
builder/bin/python -m build --outdir dist build > build.log 2>&1 || {
  cat build.log >&2
  exit 1
}
env/bin/python -m pip install --quiet "${TORCH:-torch==2.13.0}"
env/bin/python -m pip install --quiet dist/*.whl

env/bin/python source/tests/archives.py source dist

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
run convert --load hf --save dense --target-tensor-parallel-size 2
echo "+ torchrun --nproc-per-node 2 -m megatron_prune prune"
timeout 300 env/bin/torchrun --nproc-per-node 2 -m megatron_prune prune --load dense --save pruned --ffn-hidden-size-remain 64 \
  --data text.txt --nsamples 4 --seq-length 16 --reconstruct 0
run transfer --load pruned --save moved --target-tensor-parallel-size 1
run preprocess --input text.txt --tokenizer hf --save data --workers 1
run recover --load moved --save run --data-path data_text_document --split 80,20,0 --seq-length 32 --train-iters 4 \
  --global-batch-size 2 --save-interval 2 --eval-iters 1 --lr 1e-3
run export --load run/best --save recovered
env/bin/python - << 'END'
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_pretrained("recovered").config.intermediate_size == 64
END

# A part of the suite that takes seconds, beside the installed package: the repository is nowhere on the path.
mkdir suite
cp -r source/tests source/pyproject.toml suite
cd suite
env="$work/env/bin/python"
"$env" -m pip install --quiet 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
"$env" -c 'import megatron_prune, sys; assert megatron_prune.__file__.startswith(sys.prefix), megatron_prune.__file__'
fast=()
for name in command_line config errors registry arch blocks families config_keys selection plan target metrics; do
  fast+=("tests/unit/test_$name.py")
done
"$env" -m pytest -p no:cacheprovider "${fast[@]}"
echo "sdist and wheel hold what they need"
