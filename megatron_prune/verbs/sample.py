"""What ``sample`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES, LayoutOptions


@dataclass(frozen=True, kw_only=True)
class SampleOptions(ForeignOptions, LayoutOptions):
    """Sample text from a Megatron checkpoint, to be given to --data."""

    EXAMPLES: ClassVar = {"all": "torchrun --nproc-per-node 3 -m megatron_prune sample --load ckpt/dense --save own.safetensors"}

    load: str = option("Megatron checkpoint: its root, or an iteration directory", group="model", exists=True, positional=True)
    save: str = option("file to write, *.safetensors", group="model")
    nsamples: int = option("samples", 128, least=1, group="text")
    seq_length: int = option("tokens in a sample", 512, least=2, group="text")
    seed: int = option("seed of the draws", 1234, least=0, group="run")
    dtype: str = option("what to compute in", "fp32", choices=DTYPES, group="run")
