"""torchrun --nproc-per-node N prune_llama.py --load CKPT --save OUT --ffn-hidden-size-remain 1152 …

Prune a Megatron checkpoint under tensor and pipeline parallelism: score, plan, cut, save. ``--help`` lists everything.
"""

import sys

from megatron_prune.cli.main import run_verb

if __name__ == "__main__":
    run_verb("prune", sys.argv[1:], prog="prune_llama.py")
