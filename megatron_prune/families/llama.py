"""Llama 1, 2 and 3.x (arXiv 2302.13971, 2307.09288, 2407.21783), and models that ship as Llama (SmolLM2, Yi).

``attention_bias`` gives its class biases on the query, key and value projections, as Qwen2 has them, and one on the output
projection, which has to be zero.
"""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import check_value
from megatron_prune.families.entries import Entries
from megatron_prune.families.family import FAMILIES, NAMES, QKV_BIASES, Family
from megatron_prune.families.rope import ROTARY
from megatron_prune.families.windows import NO_WINDOW

_BIASED = "attention_bias"


def _read_bias(hf: dict[str, Any]) -> dict[str, bool]:
    said = hf.get(_BIASED, False)
    check_value("bool", said, f"config.json: {_BIASED}")
    return {"qkv_bias": said}


BIAS = Entries(fields=("qkv_bias",), keys=(_BIASED,), read=_read_bias, write=lambda config: {_BIASED: config.qkv_bias})

FAMILIES.register("llama")(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        names={**NAMES, **QKV_BIASES},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False},
        entries=(ROTARY, NO_WINDOW, BIAS),
        heads_divide_hidden=True,
        zeros={"o": NAMES["o"].replace("weight", "bias")},
    )
)
