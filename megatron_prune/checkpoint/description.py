"""What a checkpoint of Megatron-LM or Megatron-Bridge is: from its stored arguments, ``--hf-dir`` and flags, none against another.

Stored arguments may leave things out (older versions, converters, Bridge) and say others by default alone; ``config.json`` says all.
A field is taken from whoever says it, and two that say it differently are refused until the user says which is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig, RopeScaling
from megatron_prune.checkpoint import gemma3_args, heterogeneous, model_folder
from megatron_prune.checkpoint.known_args import refused_arguments, shown
from megatron_prune.config import flag
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.families.family import Family, family_of, kin


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the user says of a checkpoint beside it.

    Attributes:
        hf_dir: directory of the Hugging Face model that it is of, or goes back to.
        believe: ``"args"`` or ``"hf"``: who is right where they contradict each other; ``None``: they must not.
        values: fields of :class:`ModelConfig` from flags.
        ignored: stored arguments that are known to change nothing.
    """

    hf_dir: Path | None = None
    believe: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Description:
    """What stored arguments say.

    Attributes:
        model: field of :class:`ModelConfig` → value, of those that are said.
        tensor, pipeline: sizes of the layout it was written in; ``None`` where that is not said.
        padded_vocab: rows of the embedding.
        vocab_divisible_by: rule of their padding.
        eod_added: the tokenizer may have had a token more than ``vocab_size``.
    """

    model: dict[str, Any] = field(default_factory=dict)
    tensor: int | None = None
    pipeline: int | None = None
    padded_vocab: int | None = None
    vocab_divisible_by: int = 128
    eod_added: bool = False


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The model that a checkpoint holds.

    Attributes:
        family: that of ``--hf-dir``, where the architecture is the same.
        unsaid: fields that nobody says; their value is a stand-in, and the model must not be computed with.
        notes: what the user should know about how it was settled.
    """

    config: ModelConfig
    family: Family | None
    unsaid: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_ALWAYS_SAID = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_NEEDED = {"vocab_size": "--vocab-size", "rotary_base": "--rotary-base", "norm_epsilon": None}
"""Fields without a safe default, and the flag that says them."""
_DEFAULTS = {"tie_embeddings": True, "max_position_embeddings": 2048}
_MANY, _MOST = {"num_layers": 100_000, "num_attention_heads": 1_000_000}, 1 << 31
"""Where sizes end to be believed: what is counted through, and the rest."""
_WIDEST_PADDING = 128 * 256
"""Rows that Megatron-LM pads a vocabulary by at most, on 256 tensor-parallel ranks."""
_EOD_ADDED = ("NullTokenizer", "NullMultimodalTokenizer")
"""Tokenizers that count their end-of-document token beside ``--vocab-size`` in some versions."""


def describe(stored: dict[str, Any], where: object, ignored: frozenset[str] = frozenset()) -> Description:
    """Read stored arguments: Megatron-LM's ``args``, or fields of megatron-core's ``TransformerConfig`` and Bridge's around it.

    Raises:
        CheckpointError: naming every argument that describes a model which is not carried here, or is not of its type.
    """
    gemma3 = gemma3_args.is_gemma3(stored)
    further = (gemma3_args.FIXED, gemma3_args.UNDERSTOOD) if gemma3 else ()
    problems = refused_arguments(stored, ignored, *further)
    read = _Reader({name: value for name, value in stored.items() if name not in ignored}, problems)
    model: dict[str, Any] = {}
    for name in (*_ALWAYS_SAID, "kv_channels", "max_position_embeddings", "vocab_size"):
        model[name] = read.integer(name, _MANY.get(name, _MOST))
    model["max_position_embeddings"] = model["max_position_embeddings"] or read.integer("seq_length", _MOST)
    model["num_query_groups"] = read.integer("num_query_groups", _MANY["num_attention_heads"])
    if "group_query_attention" in stored and not read.switch("group_query_attention"):
        model["num_query_groups"] = model["num_attention_heads"]
    model["norm_epsilon"] = read.number("norm_epsilon", "layernorm_epsilon")
    model["qkv_bias"], model["qk_norm"] = read.switch("add_qkv_bias"), read.switch("qk_layernorm")
    untied = read.switch("untie_embeddings_and_output_weights")
    model["tie_embeddings"] = read.switch("share_embeddings_and_output_weights") if untied is None else not untied
    said = {name: value for name, value in model.items() if value is not None}
    said |= _gemma3(read, model["num_layers"] or 0) if gemma3 else _positions(read)
    by_layer = stored.get(heterogeneous.ARGUMENT)
    if stored.get("heterogeneous_layers_config_path") and not by_layer:
        problems.append(f"sizes by layer in a file elsewhere, needed {heterogeneous.ARGUMENT}")
    if by_layer and not problems:
        said |= heterogeneous.sizes(by_layer, said.get("num_attention_heads", 0), said.get("num_layers", 0), where)
    described = Description(
        model=said,
        tensor=read.integer("tensor_model_parallel_size", _MANY["num_layers"]),
        pipeline=read.integer("pipeline_model_parallel_size", _MANY["num_layers"]),
        padded_vocab=read.integer("padded_vocab_size", _MOST),
        vocab_divisible_by=read.integer("make_vocab_size_divisible_by", _MOST) or 128,
        eod_added=stored.get("tokenizer_type") in _EOD_ADDED if isinstance(stored.get("tokenizer_type"), str) else False,
    )
    unknown = any("not an argument that is known" in problem for problem in problems)
    do = "pass over one that changes nothing which the model computes with --ignore-args=NAME" if unknown else None
    raise_all(CheckpointError, f"the arguments stored in {where} do not describe a supported model", problems, do=do)
    return described


class _Reader:
    """Typed access to stored values: what is absent or ``None`` is ``None``; a problem is noted, and read as absent."""

    def __init__(self, stored: dict[str, Any], problems: list[str]):
        self._stored, self._problems = stored, problems

    def _typed(self, names: tuple[str, ...], kinds: tuple[type, ...], needed: str, fits=lambda value: True) -> Any:
        for name in names:
            value = self._stored.get(name)
            if value is None:
                continue
            if type(value) in kinds and fits(value):
                return value
            self._problems.append(f"{name} = {shown(value)}, needed {needed}")
        return None

    def integer(self, name: str, limit: int) -> int | None:
        return self._typed((name,), (int,), f"a whole number from 1 to {limit:,}", lambda value: 0 < value <= limit)

    def number(self, *names: str) -> float | None:
        value = self._typed(names, (int, float), "a positive number", lambda value: 0 < value < 1e15)
        return None if value is None else float(value)

    def switch(self, *names: str) -> bool | None:
        return self._typed(names, (bool,), "true or false")

    @property
    def stored(self) -> dict[str, Any]:
        return self._stored

    def refuse(self, problem: str) -> None:
        self._problems.append(problem)


def _gemma3(read: _Reader, layers: int) -> dict[str, Any]:
    found, problems = gemma3_args.read(read.stored, layers)
    for problem in problems:
        read.refuse(problem)
    return found


def _positions(read: _Reader) -> dict[str, Any]:
    """The same in every layer."""
    base = read.number("rotary_base")
    return ({} if base is None else {"rotary_base": base}) | _rope_scaling(read) | _window(read)


def _rope_scaling(read: _Reader) -> dict[str, Any]:
    """Megatron-LM's llama3 scaling has one number; the others of config.json are constants there, and not said."""
    scaled, factor = read.switch("use_rope_scaling", "rope_scaling"), read.number("rope_scaling_factor")
    stretched = read.number("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")
    if scaled and stretched not in (None, 1.0):
        read.refuse("llama3 and linear scaling of the rotary embedding at once (rotary_seq_len_interpolation_factor)")
    if scaled:
        return {"rope_scaling": RopeScaling(kind="llama3", factor=8.0 if factor is None else factor)}
    if stretched not in (None, 1.0):
        return {"rope_scaling": RopeScaling(kind="linear", factor=stretched)}
    return {"rope_scaling": None} if scaled is False else {}


def _window(read: _Reader) -> dict[str, Any]:
    """megatron-core's window counts the tokens before the current one; below zero is no limit. What comes after is masked anyway."""
    window = read.stored.get("window_size")
    if window is None:
        return {"sliding_window": None} if "window_size" in read.stored else {}
    parts = list(window) if isinstance(window, (list, tuple)) and len(window) == 2 else [window]
    if not all(type(part) is int and -1 <= part < 1 << 40 for part in parts):
        read.refuse(f"window_size = {shown(window)}, needed (tokens before, tokens after)")
        return {}
    return {"sliding_window": parts[0] + 1 if parts[0] >= 0 else None}


def settle(description: Description, told: Told, padded: int, where: object, *, incomplete: bool = False) -> Settled:
    """Put together what arguments, ``--hf-dir`` and flags say.

    Args:
        description: what stored arguments say.
        padded: rows of the embedding, padding included.
        where: the checkpoint, for messages.
        incomplete: give stand-ins for fields that nobody says rather than to refuse (to look at a checkpoint).

    Raises:
        CheckpointError: naming each field that they contradict each other in, or that nobody says.
    """
    said = dict(description.model)
    hf_config = model_folder.read_config(told.hf_dir) if told.hf_dir and model_folder.is_huggingface(told.hf_dir) else None
    family = family_of(hf_config) if hf_config else None
    theirs = family.model_config(hf_config) if family else None
    if not said and theirs is None:
        raise CheckpointError(
            f"{where} holds no args, which would say what model it is", do="name its Hugging Face model with --hf-dir"
        )
    notes, problems, values = _taken(description, theirs, told), [], {}
    if theirs and said.get("max_position_embeddings", theirs.max_position_embeddings) != theirs.max_position_embeddings:
        length = said.pop("max_position_embeddings")
        notes.append(f"max_position_embeddings is taken from --hf-dir: {theirs.max_position_embeddings}, not args' {length}")
    if theirs and description.eod_added and theirs.vocab_size == said.get("vocab_size", 0) + 1:
        said["vocab_size"] = theirs.vocab_size
    for name in (item.name for item in fields(ModelConfig)):
        values |= _field(name, said, theirs, told.believe, problems)
    do = "name the model it is of with --hf-dir; or say who is right: --believe args, or --believe hf"
    raise_all(CheckpointError, f"{where} is another model than {told.hf_dir}", problems, do=do)
    check_flags(told, values)
    values = {**told.values, **values}
    missing = _fill(values, padded, where, incomplete)
    config = ModelConfig(**values)
    if config.vocab_size > padded:
        raise CheckpointError(
            f"{where} holds fewer rows of the vocabulary than the model has tokens", got=padded, needed=config.vocab_size
        )
    if theirs and "vocab_size" not in {**said, **told.values}:
        _check_padding(padded - config.vocab_size, description, told)
    same = family is not None and family.fits(config)
    return Settled(config=config, family=family if same else None, unsaid=missing, notes=tuple(notes))


def _taken(description: Description, theirs: ModelConfig | None, told: Told) -> list[str]:
    """What is said of numbers that no tensor shows and that the stored arguments leave out."""
    absent = [name for name in ("rotary_base", "rope_scaling", "norm_epsilon", "vocab_size") if name not in description.model]
    if theirs:
        return [f"{', '.join(absent)}: not among its stored arguments, taken from --hf-dir"] if absent else []
    given = [name for name in absent if name in told.values]
    notes = [f"{', '.join(given)}: not among its stored arguments, taken from the command line"] if given else []
    if "rope_scaling" in absent and "rope_scaling" not in given and "rotary_base" in absent:
        notes.append("rope_scaling: said by nobody, so taken as none; if the model has one, name it with --hf-dir")
    return notes


def _field(name: str, said: dict, theirs: ModelConfig | None, believe: str | None, problems: list[str]) -> dict[str, Any]:
    """A field's value by the stored arguments or config.json, or nothing; contradictions are noted."""
    hf = {name: getattr(theirs, name)} if theirs else {}
    chosen = {name: said[name]} if name in said else hf
    if name in said and hf:
        if _same(said[name], hf[name]):
            chosen = hf  # config.json says it to the last digit
        elif believe:
            chosen = hf if believe == "hf" else chosen
        else:
            problems.append(f"{name}: the stored arguments say {_shown(said[name])}, config.json {_shown(hf[name])}")
    return chosen


def check_flags(told: Told, values: dict[str, Any]) -> None:
    """Refuse flags that contradict a checkpoint: they say what it does not.

    Raises:
        CheckpointError: naming every one that does.
    """
    problems = [
        f"{flag(name)} {value}, the checkpoint has {_shown(values[name])}"
        for name, value in told.values.items()
        if name in values and not _same(value, values[name], tolerance=1e-3)
    ]
    raise_all(CheckpointError, "arguments contradict the checkpoint", problems, do="correct them, or leave them out")


def _fill(values: dict[str, Any], padded: int, where: object, incomplete: bool) -> tuple[str, ...]:
    """Give values to fields that follow from others; the names of those that nobody says."""
    absent = [name for name in _ALWAYS_SAID if name not in values]
    raise_all(CheckpointError, f"{where} does not describe its model", [f"{name} is missing" for name in absent])
    heads = values["num_attention_heads"]
    values.setdefault("num_query_groups", heads)
    values.setdefault("kv_channels", max(1, values["hidden_size"] // heads))
    for name, default in _DEFAULTS.items():
        values.setdefault(name, default)
    missing = tuple(name for name in _NEEDED if name not in values)
    if missing and not incomplete:
        flags = [flag for name, flag in _NEEDED.items() if name in missing and flag]
        raise CheckpointError(
            f"{where} does not say its model's {', '.join(missing)}" + _padding(missing, padded),
            do="name its Hugging Face model with --hf-dir" + (f", or say it: {', '.join(flags)}" if flags else ""),
        )
    values.update({name: {"vocab_size": padded}.get(name, 1.0) for name in missing})
    return missing


def _check_padding(rows: int, description: Description, told: Told) -> None:
    """Refuse a vocabulary so small that rows which padding does not explain would be lost."""
    rule = description.vocab_divisible_by * (description.tensor or 1) if description.model else _WIDEST_PADDING
    if rows >= rule:
        raise CheckpointError(
            f"the vocabulary of {told.hf_dir} would leave {rows} rows of the checkpoint's to padding",
            needed=f"fewer than {rule}",
            do="name the model it is of with --hf-dir; or, if it is, repeat its size with --vocab-size",
        )


def _padding(missing: tuple[str, ...], padded: int) -> str:
    return f" ({padded} rows with padding)" if "vocab_size" in missing else ""


def check_goes_back_to(config: ModelConfig, family: Family, hf_dir: Path, *, pruned: bool) -> None:
    """Refuse a ``--hf-dir`` that a checkpoint of this project was not made from.

    Args:
        config, family: what the checkpoint's manifest says.
        pruned: sizes may be smaller than those of ``hf_dir``.

    Raises:
        CheckpointError: naming what differs.
    """
    if not model_folder.is_huggingface(hf_dir):
        return
    hf_config = model_folder.read_config(hf_dir)
    other = family_of(hf_config)
    theirs, problems = other.model_config(hf_config), []
    if kin(theirs) != kin(config):
        switches = (item.name for item in fields(config) if item.type == "bool" and item.name != "tie_embeddings")
        apart = [name for name in switches if getattr(config, name) != getattr(theirs, name)]
        more = f" ({', '.join(apart)} differs)" if apart else ""
        problems.append(f"family: the checkpoint is a {family.name} model, config.json a {other.name} model{more}")
    for name in SHAPE_FIELDS:
        ours, needed = getattr(config, name), getattr(theirs, name)
        larger = max(config.each(name)) > max(theirs.each(name))
        if ours != needed and (not pruned or larger or name in ("vocab_size", "kv_channels")):
            problems.append(f"{name}: the checkpoint has {ours}, config.json {needed}")
    raise_all(CheckpointError, f"--hf-dir {hf_dir} is another model", problems, do="name the model that the checkpoint is of")


def _same(left: Any, right: Any, *, tolerance: float = 1e-6) -> bool:
    if isinstance(left, tuple) or isinstance(right, tuple):  # one value for each layer; a single one is of all
        layers = max(len(value) for value in (left, right) if isinstance(value, tuple))
        each = [value if isinstance(value, tuple) else (value,) * layers for value in (left, right)]
        return len(each[0]) == len(each[1]) and all(_same(*pair, tolerance=tolerance) for pair in zip(*each))
    if left is None or right is None:
        return left is right
    if isinstance(left, float) or isinstance(right, float):
        return math.isclose(left, right, rel_tol=tolerance)
    if isinstance(left, RopeScaling) and isinstance(right, RopeScaling):
        return left.kind == right.kind and math.isclose(left.factor, right.factor, rel_tol=tolerance)
    return left == right


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(dict.fromkeys(map(_shown, value))) + " by layer"
    return f"{value.kind} × {value.factor:g}" if isinstance(value, RopeScaling) else f"{value}"
