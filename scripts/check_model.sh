#!/usr/bin/env bash
# The name that LLama-Pruner gives its recovery training. Settings and arguments are those of recover.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/recover.sh" "$@"
