"""``per_layer_config``, transformers' own words for layers that differ (since 5.2x: ``integrations/heterogeneity``).

    "per_layer_config": {"3": {"intermediate_size": 800, "num_key_value_heads": 2, "skip": ["attention"]}}

Classes of transformers read it in their configuration alone, so that a modelling file leaves with the model
(``shipped/modeling_per_layer.py``). Transformers 4 does not know the field: where nothing but blocks is missing, its stock class
would load the model without a word and make up what is not there. The width that counts for all layers is then 0, and
every layer says its own.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_prune.arch.model import ModelConfig, check_value
from megatron_prune.errors import CheckpointError
from megatron_prune.families.form import SIZES, Form, code_of, commonest
from megatron_prune.files.documents import shorten

FIELD, SKIP = "per_layer_config", "skip"
KEYS = dict(zip(SIZES, ("intermediate_size", "num_attention_heads", "num_key_value_heads")))
"""Field of :class:`ModelConfig` → key of one layer."""

_BLOCKS = {"attention": ("num_attention_heads", "num_query_groups"), "mlp": ("ffn_hidden_size",)}
"""Word of ``skip`` → the sizes that are 0."""

_WIDTH, _PREFIX, _MODULE = KEYS["ffn_hidden_size"], "PerLayer", "modeling_per_layer"
_OURS = re.compile(rf"{_MODULE}\.{_PREFIX}\w+")


def _said_in(hf: dict[str, Any]) -> bool:
    return bool(hf.get(FIELD))


def _plain(hf: dict[str, Any]) -> dict[str, Any]:
    changes = _changes(hf)
    found = {key: value for key, value in hf.items() if key != FIELD}
    wanted = hf.get("auto_map")
    if isinstance(wanted, dict) and all(isinstance(name, str) and _OURS.fullmatch(name) for name in wanted.values()):
        del found["auto_map"]
    stated = hf.get("architectures")
    if isinstance(stated, list):
        found["architectures"] = [name.removeprefix(_PREFIX) if isinstance(name, str) else name for name in stated]
    if type(hf.get(_WIDTH)) is int and hf[_WIDTH] == 0:
        found[_WIDTH] = next((own[_WIDTH] for own in changes.values() if _WIDTH in own), 1)
    return found


def _changes(hf: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Layer → what it says of itself, checked."""
    said, found = hf[FIELD], {}
    if not isinstance(said, dict):
        raise CheckpointError(f"config.json: {FIELD}", got=shorten(said), needed="a JSON object")
    for number, own in said.items():
        layer = int(number) if re.fullmatch("[0-9]{1,9}", number) else None
        layers = hf.get("num_hidden_layers")
        if layer is None or (type(layers) is int and layer >= layers) or layer in found:
            raise CheckpointError(
                f"config.json: {FIELD}", got=f"an entry {shorten(number)}", needed=f"numbers of layers below {layers}, each once"
            )
        _check_layer(own, f"config.json: {FIELD}: layer {layer}")
        found[layer] = own
    return found


def _check_layer(own: Any, what: str) -> None:
    if not isinstance(own, dict):
        raise CheckpointError(what, got=shorten(own), needed="a JSON object")
    if unknown := sorted(set(own) - {*KEYS.values(), SKIP}):
        raise CheckpointError(
            what, got=", ".join(map(shorten, unknown)), needed=f"only {', '.join(KEYS.values())} and {SKIP} may differ by layer"
        )
    skip = own.get(SKIP, [])
    if not isinstance(skip, list) or any(word not in list(_BLOCKS) for word in skip):
        raise CheckpointError(f"{what}: {SKIP}", got=shorten(skip), needed=f"a list of {' or '.join(_BLOCKS)}")
    if set(skip) == set(_BLOCKS):
        raise CheckpointError(f"{what}: {SKIP}", got="both blocks", needed="a layer with one of them, or no such layer")
    for key in set(own) - {SKIP}:
        check_value("int", own[key], f"{what}: {key}")


def _sizes(hf: dict[str, Any], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    changes = _changes(hf)
    usual = {field: getattr(config, field) for field in SIZES}
    if hf.get(_WIDTH) == 0:
        usual["ffn_hidden_size"] = 0
    rows = []
    for layer in range(config.num_layers):
        own = changes.get(layer, {})
        absent = {field for word in own.get(SKIP, ()) for field in _BLOCKS[word]}
        rows.append({field: 0 if field in absent else own.get(key, usual[field]) for field, key in KEYS.items()})
        if not rows[-1]["ffn_hidden_size"] and "ffn_hidden_size" not in absent:
            check_value("int", 0, f"config.json: {_WIDTH} of layer {layer}")
    return {field: tuple(row[field] for row in rows) for field in SIZES}


def _write(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    usual, found = commonest(config), {}
    layers = [config.of_layer(layer) for layer in range(config.num_layers)]
    differ = any(getattr(layer, field) not in (0, getattr(usual, field)) for layer in layers for field in SIZES)
    for number, layer in enumerate(layers):
        own: dict[str, Any] = {}
        for field, key in KEYS.items():
            size = getattr(layer, field)
            if size and (size != getattr(usual, field) or (key == _WIDTH and not differ)):
                own[key] = size
        if skip := [word for word, (field, *_) in _BLOCKS.items() if not getattr(layer, field)]:
            own[SKIP] = skip
        if own:
            found[str(number)] = own
    (stock,) = hf["architectures"]
    classes = {"AutoModel": _base_of(stock), "AutoModelForCausalLM": stock}
    return {
        **hf,
        **({} if differ else {_WIDTH: 0}),
        "architectures": [class_name(stock)],
        "auto_map": {auto: f"{_MODULE}.{class_name(name)}" for auto, name in classes.items()},
        FIELD: found,
    }


def class_name(stock: str) -> str:
    """The class of ``shipped/modeling_per_layer.py`` that a class of transformers becomes."""
    return _PREFIX + stock


def _base_of(architecture: str) -> str:
    """The class without a head."""
    return {"Gemma3ForCausalLM": "Gemma3TextModel"}.get(architecture, architecture.replace("ForCausalLM", "Model"))


PER_LAYER = Form(
    name="per-layer",
    said_in=_said_in,
    plain=_plain,
    sizes=_sizes,
    unsaid=lambda config: "",
    write=_write,
    whole=lambda hf: bool(code_of(hf)),
)
