#!/usr/bin/env bash
# The same as scripts/megatron_to_hf.sh, under the name it has in LLama-Pruner.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/megatron_to_hf.sh" "$@"
