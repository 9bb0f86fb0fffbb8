"""Prune a Hugging Face model, single process: ``python prune_hf/prune_llama.py --help``."""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("prune-hf", sys.argv[1:], prog="prune_hf/prune_llama.py")
