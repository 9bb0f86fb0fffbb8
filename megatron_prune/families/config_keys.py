"""The keys of ``config.json``, so that none which changes what a model computes is passed over.

A key of a family's class in transformers is read, or must have the one value that is carried, or changes nothing. What a later
transformers adds to a class is in none of the three, and is refused where it differs from that class's default.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import shorten

READ = {"model_type", "architectures", "auto_map", "quantization_config", "dtype", "torch_dtype", "pad_token_id"}
"""Keys that are looked at in every family, beside those of its sizes and of its ``entries``."""

FIXED: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "return_dict": (True, None),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "compression_config": (None, {}),
    "fusion_config": (None, {}),
    "transformers_weights": (None,),
    "attn_implementation": (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "_attn_implementation": (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "experts_implementation": (None, "eager"),
}
"""Key → the values that are carried. An attention of another name would be a kernel fetched from elsewhere."""

IDLE: dict[str, tuple[type, ...]] = {
    "initializer_range": (float, int),
    "attention_dropout": (float, int, NoneType),
    "use_cache": (bool,),
    "pretraining_tp": (int, NoneType),
    "chunk_size_feed_forward": (int,),
    "bos_token_id": (int, NoneType),
    "eos_token_id": (int, list, NoneType),
    "output_hidden_states": (bool, NoneType),
    "output_attentions": (bool, NoneType),
    "id2label": (dict, NoneType),
    "label2id": (dict, NoneType),
    "num_labels": (int, NoneType),
    "problem_type": (str, NoneType),
    "transformers_version": (str, NoneType),
    "name_or_path": (str, NoneType),
    "_name_or_path": (str, NoneType),
}
"""Keys that change no logits → the types that transformers takes for them."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Every key that a family knows: what a model is read from; key → the values that are carried; key → types, of no effect."""

    read: frozenset[str]
    fixed: dict[str, tuple]
    idle: dict[str, tuple[type, ...]]


def keys_of(read: set[str], fixed: dict[str, tuple], idle: dict[str, tuple[type, ...]]) -> Keys:
    """Those of a family, with the keys that all have; what the family says of a key goes before."""
    mine = read | set(fixed) | set(idle)
    others = lambda table: {key: values for key, values in table.items() if key not in mine}
    return Keys(read=frozenset(read | READ), fixed=others(FIXED) | fixed, idle=others(IDLE) | idle)


_DTYPES = (None, "float32", "bfloat16", "float16", "float64")


def check_keys(hf: dict[str, Any], model_type: str, architecture: str, keys: Keys) -> None:
    """Refuse a ``config.json`` of a model that is not what a family's class in transformers computes.

    Raises:
        CheckpointError: naming the key.
    """
    if hf.get("quantization_config"):
        raise CheckpointError("config.json has a quantization_config", needed="plain weights (fp32, bf16 or fp16)")
    if hf.get("auto_map"):
        raise CheckpointError(
            "config.json: the model wants code of its own, which is never run",
            got=f"auto_map {shorten(hf['auto_map'])}",
            do=f"if transformers' own {architecture} computes this model, take auto_map out of config.json",
        )
    stated = hf.get("architectures") or [architecture]
    known = isinstance(stated, list) and all(isinstance(name, str) for name in stated)
    if not known or any(name.lower() != architecture.lower() for name in stated):
        raise CheckpointError(
            f"config.json of a {model_type} model: architectures",
            got=shorten(stated),
            needed=architecture,
            do="give a model for causal language modelling; if these weights are one, correct the entry",
        )
    for key, allowed in keys.fixed.items():
        if key in hf and not any(type(hf[key]) is type(value) and hf[key] == value for value in allowed):
            needed = "nothing" if allowed[0] is None else f"one of {list(allowed)}"
            raise CheckpointError(f"config.json of a {model_type} model: {key}", got=shorten(hf[key]), needed=needed)
    for key, kinds in keys.idle.items():
        if key in hf and (type(hf[key]) not in kinds or hf[key] != hf[key] or not _whole_list(hf[key])):
            needed = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise CheckpointError(f"config.json of a {model_type} model: {key}", got=shorten(hf[key]), needed=needed)
    for key in ("dtype", "torch_dtype"):
        if isinstance(hf.get(key), (list, dict)) or hf.get(key) not in _DTYPES:
            raise CheckpointError(f"config.json: {key}", got=shorten(hf[key]), needed=f"one of {list(_DTYPES[1:])}, or null")
    for key in sorted(set(hf) - keys.read - set(keys.fixed) - set(keys.idle)):
        if _mentioned(key, model_type) and key in (fields := class_fields(model_type)) and hf[key] != fields[key]:
            raise CheckpointError(
                f"config.json of a {model_type} model: {key}",
                got=shorten(hf[key]),
                needed=f"{shorten(fields[key])}: what this installed transformers added is not carried",
            )


def _whole_list(value: Any) -> bool:
    """Whether a list, if it is one, holds whole numbers alone."""
    return not isinstance(value, list) or all(type(item) is int for item in value)


def _mentioned(key: str, model_type: str) -> bool:
    """Whether the files that the installed transformers' class is written in have a word, which spares importing it for most keys."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    folder = Path(spec.origin).parent
    own = [*(folder / "models" / model_type).glob("configuration_*.py")]
    files = [*own, folder / "configuration_utils.py", folder / "modeling_rope_utils.py"]
    if not own or not all(file.is_file() for file in files):
        return True
    return any(re.search(rf"\b{re.escape(key)}\b", file.read_text(encoding="utf-8")) for file in files)


@functools.cache
def class_fields(model_type: str) -> dict[str, Any]:
    """Key → default of the installed transformers' configuration class."""
    from transformers import CONFIG_MAPPING

    empty = dataclasses.MISSING
    found = dataclasses.fields(CONFIG_MAPPING[model_type])
    return {
        field.name: field.default_factory() if field.default_factory is not empty else field.default
        for field in found
        if field.init
    }
