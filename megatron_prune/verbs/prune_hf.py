"""What ``prune-hf`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.pruning.options import PruningOptions
from megatron_prune.writing.options import HuggingFaceOptions, PushOptions


@dataclass(frozen=True, kw_only=True)
class PruneHfOptions(PruningOptions, HuggingFaceOptions, PushOptions):
    """Prune a Hugging Face model to a smaller shape, by scores or by a plan, and re-fit what stays; single process."""

    EXAMPLES: ClassVar = {
        "all": "megatron-prune prune-hf --load HuggingFaceTB/SmolLM2-135M-Instruct --save small --ratio 0.25 --data text.txt",
        "shape": "--hidden-size-remain 512 --drop-layers 7,13, or a budget: --params 90M --multiple-of hidden=64,ffn=128",
        "text": "--data corpus.jsonl:0.7 wikitext2:0.3 --nsamples 64 --seq-length 256",
        "how": "--metric obs:damping=0.1 --reconstruct 0",
        "run": "--dtype bf16 --seed 7",
    }

    load: str = option(
        "Hugging Face model: a directory, or a hub id", group="model", former=("model_name_or_path",), positional=True
    )
    save: str = option("Hugging Face directory to write", group="model", former=("output_path",))
    tokenizer: str | None = option("Hugging Face directory of the tokenizer (default: the model's own)", None, group="model")
    prune_config_path: str | None = option(
        "JSON file with hidden_size_remain, num_attention_heads_remain, ffn_hidden_size_remain, drop_layers "
        "(and num_query_groups_remain, num_layers_remain) (default: prune_config.json, where no size, budget or plan is given)",
        None,
        group="shape",
        exists=True,
    )
