"""Change TP × PP, format or dtype of a Megatron checkpoint: ``python tools/checkpoint_conversion/transfer.py --help``."""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("transfer", sys.argv[1:], prog="transfer.py")
