"""Hugging Face → Megatron: ``python tools/checkpoint_conversion/hf_to_megatron.py --help``."""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("convert", sys.argv[1:], prog="hf_to_megatron.py")
