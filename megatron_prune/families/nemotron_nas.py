"""``nemotron-nas`` (``DeciLMForCausalLM``): Llama with KV groups, widths and missing blocks by layer (Bercovich et al. 2024,
Puzzle, arXiv 2411.19146), as NVIDIA publishes Llama-3_1-Nemotron-51B and Llama-3_3-Nemotron-Super-49B.

    "block_configs": [{"attention": {"n_heads_in_group": 8, "no_op": false, …}, "ffn": {"ffn_mult": 2.625, "no_op": false, …}}, …]

vLLM, SGLang, TensorRT-LLM, MLX-LM and llama.cpp read it. A width stands as ``ffn_mult`` where one means it (they round up to a
multiple of 256), and as ``intermediate_size`` always, which vLLM alone reads. ``qkv_bias`` says Qwen2's biases, as vLLM reads it.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_prune.arch.model import ModelConfig, check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.families.form import SIZES, Form
from megatron_prune.files.documents import shorten

TYPE, FIELD, ARCHITECTURE = "nemotron-nas", "block_configs", "DeciLMForCausalLM"
_MODULE = "configuration_nemotron_nas"
_STOCK = {False: ("llama", "LlamaForCausalLM"), True: ("qwen2", "Qwen2ForCausalLM")}
"""Whether there are biases → the family that has the same blocks, and its class."""

_MEANT = {"attention": ("n_heads_in_group", "no_op"), "ffn": ("ffn_mult", "intermediate_size", "no_op")}
"""Keys of a block that are read. All others must say that nothing is there."""
_NEUTRAL = {"gated": (True,), "hidden_act": ("silu", None)}
_NOTHING = (None, False)


def _said_in(hf: dict[str, Any]) -> bool:
    return hf.get("model_type") == TYPE


def _plain(hf: dict[str, Any]) -> dict[str, Any]:
    blocks = _blocks(hf)
    heads, hidden = hf.get("num_attention_heads"), hf.get("hidden_size")
    check_value("int", heads, "config.json: num_attention_heads")
    check_value("int", hidden, "config.json: hidden_size")
    biased = hf.get("qkv_bias", False)
    check_value("bool", biased, "config.json: qkv_bias")
    if hf.get("attention_bias", False) is not False:
        got, needed = shorten(hf["attention_bias"]), "false: a bias of the output projection is not carried"
        raise CheckpointError("config.json of a nemotron-nas model: attention_bias", got=got, needed=needed)
    if hf.get("position_embedding_type", "rope") not in ("rope", None):
        raise CheckpointError("config.json: position_embedding_type", got=shorten(hf["position_embedding_type"]), needed="rope")
    stated = hf.get("architectures")
    if stated not in (None, [ARCHITECTURE]):
        raise CheckpointError("config.json of a nemotron-nas model: architectures", got=shorten(stated), needed=ARCHITECTURE)
    _check_code(hf.get("auto_map"))
    family, architecture = _STOCK[biased]
    groups = (_groups(block["attention"], heads, layer) for layer, block in enumerate(blocks))
    widths = (_width(block["ffn"], hidden, layer) for layer, block in enumerate(blocks))
    return {
        **{key: value for key, value in hf.items() if key not in (FIELD, "auto_map", "qkv_bias", "position_embedding_type")},
        "model_type": family,
        "architectures": [architecture],
        "num_key_value_heads": next(filter(None, groups), heads),
        "intermediate_size": next(filter(None, widths), 1),
    }


def _check_code(wanted: Any) -> None:
    """Refuse code of another kind than that of this form: NVIDIA's, or ours. Neither is ever run here."""
    known = ("DeciLMConfig", ARCHITECTURE)
    names = wanted.values() if isinstance(wanted, dict) else [wanted]
    if wanted and not all(isinstance(name, str) and name.rpartition(".")[2] in known for name in names):
        raise CheckpointError(
            "config.json: the model wants code of its own, which is never run",
            got=f"auto_map {shorten(wanted)}",
            do=f"if {ARCHITECTURE} computes this model, take auto_map out of config.json",
        )


def _blocks(hf: dict[str, Any]) -> list[dict[str, Any]]:
    """``block_configs``, checked."""
    blocks, layers = hf.get(FIELD), hf.get("num_hidden_layers")
    if not isinstance(blocks, list) or (type(layers) is int and len(blocks) != layers):
        got = f"{len(blocks)} entries" if isinstance(blocks, list) else shorten(blocks)
        raise CheckpointError(f"config.json: {FIELD}", got=got, needed=f"a list of {layers}, one for each layer")
    for layer, block in enumerate(blocks):
        what = f"config.json: {FIELD}: layer {layer}"
        if not isinstance(block, dict) or not all(isinstance(block.get(part), dict) for part in _MEANT):
            raise CheckpointError(what, got=shorten(block), needed=f"a JSON object with {' and '.join(_MEANT)}")
        if more := [name for name in block if name not in _MEANT and block[name] not in _NOTHING]:
            raise CheckpointError(what, got=", ".join(map(shorten, more)), needed=f"{' and '.join(_MEANT)} alone")
        for part, meant in _MEANT.items():
            _check_block(block[part], meant, f"{what}: {part}")
        if all(block[part].get("no_op", False) for part in _MEANT):
            raise CheckpointError(what, got="no_op in both blocks", needed="a layer with one of them, or no such layer")
    return blocks


def _check_block(block: dict[str, Any], meant: tuple[str, ...], what: str) -> None:
    check_value("bool", block.get("no_op", False), f"{what}: no_op")
    for key in set(block) - set(meant):
        allowed = _NEUTRAL.get(key, _NOTHING)
        if not any(type(block[key]) is type(value) and block[key] == value for value in allowed):
            raise CheckpointError(
                f"{what}: {shorten(key)}", got=shorten(block[key]), needed=f"{str(allowed[-1]).lower()}: it is not carried"
            )


def _groups(block: dict[str, Any], heads: int, layer: int) -> int:
    """KV groups of a layer; 0 where it has no attention."""
    if block.get("no_op", False):
        return 0
    each = block.get("n_heads_in_group")
    check_value("int", each, f"config.json: {FIELD}: layer {layer}: attention: n_heads_in_group")
    if heads % each:
        raise CheckpointError(
            f"config.json: {FIELD}: layer {layer}: attention: n_heads_in_group", got=each, needed=f"a divisor of {heads} heads"
        )
    return heads // each


def _width(block: dict[str, Any], hidden: int, layer: int) -> int:
    """Channels of a layer; 0 where it has no feed-forward block."""
    if block.get("no_op", False):
        return 0
    what = f"config.json: {FIELD}: layer {layer}: ffn"
    said, factor = block.get("intermediate_size"), block.get("ffn_mult")
    if factor is None:
        check_value("int", said, f"{what}: intermediate_size")
        return said
    check_value("float", factor, f"{what}: ffn_mult")
    meant = width_of(factor, hidden)
    check_value("int", meant, f"{what}: the width that ffn_mult means")
    if said not in (None, meant):
        raise CheckpointError(
            f"{what}: intermediate_size", got=shorten(said), needed=f"{meant}, which ffn_mult {factor} means, or no ffn_mult"
        )
    return meant


def _sizes(hf: dict[str, Any], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    blocks = _blocks(hf)
    groups = tuple(_groups(block["attention"], heads, layer) for layer, block in enumerate(blocks))
    widths = tuple(_width(block["ffn"], hidden, layer) for layer, block in enumerate(blocks))
    return dict(zip(SIZES, (widths, tuple(heads if number else 0 for number in groups), groups)))


def width_of(factor: float, hidden: int) -> int:
    """Channels that an ``ffn_mult`` means."""
    return -(-int(2 * factor * hidden / 3) // 256) * 256


def factor_of(width: int, hidden: int) -> float | None:
    """An ``ffn_mult`` that means a width, of six decimals (MLX rounds to so many); ``None`` where none does."""
    return None if width % 256 else math.floor(1.5e6 * width / hidden) / 1e6


def _unsaid(config: ModelConfig) -> str:
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    heads = sorted({layer.num_attention_heads for layer in layers} - {0})
    if not layers[0].num_attention_heads:
        return "a first layer without attention, which vLLM does not add up rightly"
    if len(heads) > 1:
        return "query heads that differ by layer: " + ", ".join(map(str, heads))
    if config.qk_norm or any(config.each("sliding_window")):
        return "norms of queries and keys" if config.qk_norm else "sliding windows"
    return "" if config.activation == "silu" and not config.after_norms else "blocks that are not Llama's"


def _write(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    left = ("auto_map", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return {
        **{key: value for key, value in hf.items() if key not in left},
        "model_type": TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{_MODULE}.DeciLMConfig"},
        "num_key_value_heads": max(config.each("num_query_groups")),
        "intermediate_size": max(config.each("ffn_hidden_size")),
        "attention_bias": False,
        "mlp_bias": False,
        **({"qkv_bias": True} if config.qkv_bias else {}),
        FIELD: [_block(config.of_layer(layer)) for layer in range(config.num_layers)],
    }


def _block(layer: ModelConfig) -> dict[str, Any]:
    heads, groups, width = layer.num_attention_heads, layer.num_query_groups, layer.ffn_hidden_size
    each = heads // groups if groups else None
    ffn: dict[str, Any] = {"no_op": not width, "replace_with_linear": False}
    if not width:
        ffn["ffn_mult"] = None  # llama.cpp's converter asks for it everywhere, as NVIDIA's files have it
    else:
        ffn["intermediate_size"] = width
        if factor := factor_of(width, layer.hidden_size):
            ffn["ffn_mult"] = factor
    return {"attention": {"n_heads_in_group": each, "no_op": not groups, "replace_with_linear": False}, "ffn": ffn}


NEMOTRON_NAS = Form(
    name=TYPE,
    said_in=_said_in,
    plain=_plain,
    sizes=_sizes,
    unsaid=_unsaid,
    write=_write,
    whole=lambda hf: bool(hf.get("auto_map")),
)
