"""Megatron → Hugging Face: ``python tools/checkpoint_conversion/megatron_to_hf.py --help``."""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("export", sys.argv[1:], prog="megatron_to_hf.py")
