#!/usr/bin/env bash
# The same as scripts/hf_to_megatron.sh, under the name it has in LLama-Pruner.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/hf_to_megatron.sh" "$@"
