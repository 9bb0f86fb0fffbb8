"""Logits of a Megatron checkpoint under TP against transformers: ``python tools/checkpoint_conversion/verify.py --help``."""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("verify", sys.argv[1:], prog="verify.py")
