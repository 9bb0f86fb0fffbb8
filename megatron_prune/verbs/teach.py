"""What ``teach`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.opening.options import ForeignOptions
from megatron_prune.runtime.options import DTYPES, LayoutOptions


@dataclass(frozen=True, kw_only=True)
class TeachOptions(ForeignOptions, LayoutOptions):
    """Write a teacher's most probable tokens for every token that a recovery will train on; its data arguments must be the same."""

    EXAMPLES: ClassVar = {
        "all": "torchrun --nproc-per-node 3 -m megatron_prune teach --load ckpt/dense --save answers --data-path data/corpus_text_document "
        "--train-iters 100 --global-batch-size 64",
    }

    load: str = option(
        "Megatron checkpoint of the teacher: its root, or an iteration directory", group="model", exists=True, positional=True
    )
    save: str = option("directory to write", group="model")
    train_iters: int = option("steps of the recovery", least=1)
    global_batch_size: int = option("sequences in a step of the recovery", least=1)
    data_path: tuple[str, ...] = option("as for recover", (), group="text")
    split: str | None = option("as for recover (default: 969,30,1)", None, group="text")
    train_data_path: tuple[str, ...] = option("as for recover", (), group="text")
    valid_data_path: tuple[str, ...] = option("as for recover", (), group="text")
    test_data_path: tuple[str, ...] = option("as for recover", (), group="text")
    seq_length: int | None = option(
        "as for recover (default: 4096, or the model's context where that is shorter)", None, least=1, group="text"
    )
    seed: int = option("as for recover", 1234, least=0, group="run")
    eval_iters: int = option("as for recover", 10, least=1)
    top_k: int = option("tokens that are kept of each distribution", 64, least=1)
    distill_temperature: float = option("temperature of the distributions", 1.0, above=0)
    micro_batch_size: int = option("sequences in a forward pass", 1, least=1, group="run")
    dtype: str = option("what to compute in", "fp32", choices=DTYPES, group="run")
    overwrite: bool = option("replace an existing output directory", False, group="run")
