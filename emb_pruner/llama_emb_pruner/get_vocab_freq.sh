#!/usr/bin/env bash
# A corpus → counts and the ids of the tokens that stay. Settings (environment):
#
#   DATA_PATH           corpora, separated by blanks                     (required)
#   SPM                 tokenizer.model, or a model's directory          (required)
#   DATA_TYPE           txt, jsonl or mmap (Megatron .bin/.idx)          (default mmap)
#   VOCAB_FREQ          start of the name of the counts                  (default vocab_freq)
#   REMAIN_VOCAB_SIZE   tokens that stay, in all                         (default 18000)
#   REMAIN_VOCAB_IDS    file of ids to write                             (default remain_vocab_ids.pt)
#   Further arguments are passed on, such as --overwrite.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/../../scripts/launch.sh"
require DATA_PATH "one or several corpora"
require SPM "tokenizer.model, or the directory of a model"

# shellcheck disable=SC2086  # DATA_PATH holds several
exec "$PYTHON" "$HERE/get_vocab_freq.py" --data_type "${DATA_TYPE:-mmap}" --data_path $DATA_PATH --spm "$SPM" \
  --vocab_freq "${VOCAB_FREQ:-vocab_freq}" --remain_vocab_size "${REMAIN_VOCAB_SIZE:-18000}" \
  --remain_vocab_ids_path "${REMAIN_VOCAB_IDS:-remain_vocab_ids.pt}" "$@"
