"""The path through a Megatron checkpoint, every rank running this file.

torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL TEXT.txt WORK
"""

import logging
import os
import sys
from pathlib import Path

import megatron_prune as mp

model, text, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")

mp.convert(model, work / "dense", tensor_parallel=ranks)
mp.prune(work / "dense", {"ffn_hidden_size": 48}, save=work / "pruned", data=text, nsamples=4, seq_length=32, reconstruct=0)
result = mp.evaluate(work / "pruned", text, seq_length=32, windows=4)
mp.export(work / "pruned", work / "hf")
if rank == 0:
    print(f"perplexity {result['perplexity']:.1f} at TP {result['tensor_parallel']}")
