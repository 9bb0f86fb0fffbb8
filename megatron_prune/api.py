"""The Python interface: ``import megatron_prune as mp``.

Every function does what the verb of its name does on the command line, with the same options under the same names (dashes are
underscores), and raises what the command line says: :class:`megatron_prune.errors.InputError`, before anything is written. Models
are directories, hub ids, Megatron checkpoints (one process of each rank calls the function, under ``torchrun``) or, where a
signature says so, transformers models in memory. Progress is logged to the logger ``megatron_prune``.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from megatron_prune.checkpoint import model_folder
from megatron_prune.config import made_of, shown
from megatron_prune.errors import InputError
from megatron_prune.in_memory import (
    called,
    folder_of,
    loaded,
    named_plan,
    named_text,
    place_of,
    placed,
    several,
    standing_for,
)
from megatron_prune.runtime.reporting import log, quiet_libraries
from megatron_prune.runtime.world import World
from megatron_prune.spelling import Arguments, check_beside, check_named, options_of_target, reworded
from megatron_prune.verbs.table import module_of, options_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from megatron_prune.importance.metric import Metric as Metric
    from megatron_prune.planning.plan import Plan as Plan

    Source = str | Path
    Tokenizer = PreTrainedTokenizerBase | str | Path


def run(verb: str, options: Any, world: World | None = None) -> Any:
    """Run a verb: what the command line does once its words are read.

    Args:
        options: of the class that ``megatron_prune.verbs.table.options_of`` names.
        world: the processes of this run (default: as torchrun started them).

    Returns:
        An exit code (``verify``, ``inspect``, ``recover``), the result (``evaluate``, ``plan``), or nothing.
    """
    if not log.isEnabledFor(logging.DEBUG):
        quiet_libraries()
    name = module_of(verb)
    step = importlib.import_module(f"megatron_prune.steps.{name}")
    return getattr(step, name)(options, world or World.of_environment())


def _call(function: str, verb: str, given: Mapping[str, Any], **renamed: str) -> Any:
    """Run a verb, and say what there is to say in the words of the function that calls it.

    Args:
        given: its options; what is ``None`` is not said.
        renamed: option → the argument of the function that it is, where their names differ.
    """
    kind, said = options_of(verb), {name: value for name, value in given.items() if value is not None}
    with reworded(Arguments(kind, said, renamed)):
        return run(verb, made_of(kind, said, of=f"mp.{function}"))


def _check_twice(function: str, verb: str, options: Mapping[str, Any], renamed: Mapping[str, str]) -> None:
    """Refuse, among further options, one that an argument of the function says already: under its name, or a former one."""
    former = {old: item.name for item in fields(options_of(verb)) for old in item.metadata.get("former", ())}
    for name in options:
        if argument := renamed.get(former.get(name, name)):
            raise InputError(f"{name} is no argument of mp.{function}", do=f"say {argument}=")


def convert(load: Source, save: Source, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, **options: Any) -> Path:
    """Turn a Hugging Face directory or hub id into a Megatron checkpoint.

    Args:
        tensor_parallel, pipeline_parallel: ranks and stages that it is written for.
        options: further ones of ``megatron-prune convert``.

    Returns:
        ``save``.
    """
    names = {"target_tensor_parallel_size": "tensor_parallel", "target_pipeline_parallel_size": "pipeline_parallel"}
    _check_twice("convert", "convert", options, names)
    sizes = {"target_tensor_parallel_size": tensor_parallel, "target_pipeline_parallel_size": pipeline_parallel}
    given = {"load": place_of(load, "load"), "save": place_of(save, "save"), **sizes, **options}
    _call("convert", "convert", given, **names)
    return Path(save)


def export(load: Source, save: Source, **options: Any) -> Path:
    """Turn a Megatron checkpoint into a Hugging Face directory.

    Args:
        options: further ones of ``megatron-prune export``, such as ``target_family`` or ``target_params_dtype``.

    Returns:
        ``save``.
    """
    _call("export", "export", {"load": place_of(load, "load"), "save": place_of(save, "save"), **options})
    return Path(save)


def score(load: Source, save: Source, *, data: Any = None, texts: Sequence[str] | None = None, **options: Any) -> Path:
    """Measure a model of either kind on text and keep the scores of every axis.

    Args:
        data: sources as on the command line, or samples as int64 [samples, tokens] (default: the model's own samples).
        texts: texts in memory, instead.
        options: further ones of ``megatron-prune score``, such as ``metrics=("activation", "obs:damping=0.1")``.

    Returns:
        ``save``: the directory of scores.
    """
    check_named(options)
    given = {"load": place_of(load, "load"), "save": place_of(save, "save"), **options}
    with named_text(data, texts) as named:
        _call("score", "score", {**given, **named})
    return Path(save)


def plan(
    load: Source,
    target: Mapping[str, Any] | Plan | Source,
    *,
    save: Source | None = None,
    data: Any = None,
    texts: Sequence[str] | None = None,
    **options: Any,
) -> Plan:
    """Choose what stays of a model of either kind.

    Args:
        target: what it is to be: sizes (``{"ffn_hidden_size": 1152, "num_layers": 24}``), or a budget (``{"ratio": 0.25}``);
            a plan, or its file, with ``uniform=True``: turned into the shape with layers alike and as many parameters.
        save: JSON file to write the plan to.
        data, texts: as for :func:`score`; not read where ``scores`` names a directory.
        options: further ones of ``megatron-prune plan``, such as ``scores`` or ``metric``.
    """
    load, given = place_of(load, "load"), _asked(target, "plan", options)
    with named_text(data, texts) as named, named_plan(given) as given, placed(save, "plan.json", "the plan") as file:
        return _call("plan", "plan", {"load": load, "save": file, **named, **given}, **_PLAN)


_PLAN, _PRUNE = {"plan": "target"}, {"plan": "target", "load": "model"}
"""Option → the argument of :func:`plan`, and of those that prune, which it is."""


def _asked(target: Any, verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``target`` says, and the options beside it."""
    check_beside(options)
    function, renamed = ("plan", _PLAN) if verb == "plan" else ("prune", _PRUNE)
    _check_twice(function, verb, options, renamed)
    return {**options_of_target(target, options_of(verb), options), **options}


@overload
def prune(
    model: PreTrainedModel,
    target: Mapping[str, Any] | Plan | Source,
    *,
    save: Source | None = None,
    data: Any = None,
    texts: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> PreTrainedModel: ...
@overload
def prune(
    model: Source,
    target: Mapping[str, Any] | Plan | Source,
    *,
    save: Source | None = None,
    data: Any = None,
    texts: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Path: ...
def prune(
    model: PreTrainedModel | Source,
    target: Mapping[str, Any] | Plan | Source,
    *,
    save: Source | None = None,
    data: Any = None,
    texts: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> PreTrainedModel | Path:
    """Prune a model and re-fit what stays.

    Args:
        model: a transformers model in memory (it is not changed), a Hugging Face directory or hub id, or a Megatron checkpoint.
        target: a plan, or its file; or what the model is to be, as keys with values: sizes that are to stay (``hidden_size``,
            ``ffn_hidden_size``, ``num_attention_heads``, ``num_query_groups``, ``num_layers``), layers or blocks that go
            (``drop_layers``, ``drop_attention``, ``drop_mlp``), sizes by layer (``layer_sizes``), or a budget (``ratio``,
            ``params``, ``memory``): ``{"ffn_hidden_size": 1152, "num_layers": 24}``, ``{"ratio": 0.25}``.
        save: directory to write; needed unless the model is in memory.
        data: sources as on the command line, or samples as int64 [samples, tokens] (default: the model's own samples).
        texts: texts in memory, instead.
        tokenizer: that text is read with (default: the model's own; a model in memory has none): itself beside a model in
            memory, or its directory or hub id.
        options: further ones of ``megatron-prune prune`` or ``prune-hf``.

    Returns:
        A model in memory for a model in memory, with its element type and on its device; else ``save``.
    """
    given = _asked(target, "prune-hf", options)
    with named_text(data, texts) as named, named_plan(given) as given, folder_of(model, tokenizer) as folder:
        if folder is None:
            if save is None:
                raise InputError("save=", got="nothing", needed="a directory to write the pruned model to")
            asked = {"load": model, "save": place_of(save, "save"), "tokenizer": tokenizer, **named, **given}
            _call("prune", "prune" if model_folder.is_megatron(Path(model)) else "prune-hf", asked, **_PRUNE)
            return Path(save)
        with placed(save, "pruned", "memory") as place:
            _call("prune", "prune-hf", {"load": folder, "save": place, **named, **given}, **_PRUNE)
            return loaded(place, model, save)


@overload
def apply(model: PreTrainedModel, plan: Plan | Source, *, save: Source | None = None, **options: Any) -> PreTrainedModel: ...
@overload
def apply(model: Source, plan: Plan | Source, *, save: Source | None = None, **options: Any) -> Path: ...
def apply(
    model: PreTrainedModel | Source, plan: Plan | Source, *, save: Source | None = None, **options: Any
) -> PreTrainedModel | Path:
    """Cut a model by a plan. Without text (``data``, ``texts``) nothing is re-fitted: what stays keeps its bits.

    Args:
        plan: itself, or its file.
        model, save, options: as for :func:`prune`.
    """
    if not isinstance(plan, (str, Path)) and not hasattr(plan, "dumps"):
        do = "make one with mp.plan, or prune by sizes or a budget with mp.prune" if isinstance(plan, Mapping) else None
        raise InputError("plan=", got=shown(plan), needed="a plan, or its file", do=do)
    if options.get("data") is None and options.get("texts") is None:
        options.setdefault("refit", False)
    return prune(model, plan, save=save, **options)


def trim_vocabulary(
    load: Source,
    save: Source,
    *,
    size: int | None = None,
    counts: Source | Sequence[Source] = (),
    data: Source | Sequence[Source] = (),
    **options: Any,
) -> Path:
    """Cut the vocabulary of a model of either kind, its tokenizer with it.

    Args:
        size: tokens that stay, exactly (or say ``coverage``, ``min_count``, ``keep_script`` … as options).
        counts: files of ``megatron-prune vocab count``.
        data: corpora that are counted, instead.
        options: further ones of ``megatron-prune vocab trim``.

    Returns:
        ``save``.
    """
    _check_twice("trim_vocabulary", "vocab trim", options, {"remain_vocab_size": "size"})
    load, named, corpora = place_of(load, "load"), several(counts, "counts"), several(data, "data")
    given = {"load": load, "save": place_of(save, "save"), "remain_vocab_size": size, **options}
    with tempfile.TemporaryDirectory() as work, standing_for(f"{work}/counts", "counts of data"):
        if corpora:
            named = (*named, f"{work}/counts")
            counted = {"tokenizer": load, "input": corpora, "save": named[-1]}
            _call("trim_vocabulary", "vocab count", counted, tokenizer="load", input="data")
        _call("trim_vocabulary", "vocab trim", {**given, "counts": named or None}, remain_vocab_size="size")
    return Path(save)


def evaluate(
    model: PreTrainedModel | Source,
    data: Source | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Perplexity of a model of either kind, or of one in memory, on a text.

    Args:
        data: a source as on the command line.
        texts: texts in memory, instead.
        tokenizer: that it is read with (default: the model's own; a model in memory has none): itself beside a model in memory,
            or its directory or hub id.
        options: further ones of ``megatron-prune evaluate``, such as ``seq_length`` and ``windows``.

    Returns:
        The facts, ``"perplexity"`` among them; ``"content_id"`` is what the model records of itself, else ``None``, unless
        ``output`` names a file: then all weights are read for it.
    """
    _check_twice("evaluate", "evaluate", options, {"load": "model"})
    if data is None and texts is None:
        raise InputError("data= or texts=", got="neither", needed="one of the two")
    if not isinstance(data, (str, Path, type(None))):
        raise InputError("data=", got=shown(data), needed="a name, or a path", do="give texts in memory as texts=")
    with named_text(data, texts) as named, folder_of(model, tokenizer) as folder:
        who = {"checkpoint": called(model)} if folder else {"tokenizer": tokenizer}
        given = {"load": folder or model, "data": named["data"][0], "text": None if texts is None else "texts", **who, **options}
        return _call("evaluate", "evaluate", given, load="model")


def recover(load: Source, save: Source, data_path: Source | Sequence[Any], *, train_iters: int, **options: Any) -> Path:
    """Train a Megatron checkpoint, plain, distilled (``teacher``) or adapters alone (``lora_r``).

    Args:
        data_path: prefixes of ``.bin``/``.idx`` pairs, each after its weight or all without.
        options: further ones of ``megatron-prune recover``.

    Returns:
        The directory of the best checkpoint.

    Raises:
        InterruptedError: if the run was asked to stop; it goes on when it is called again.
    """
    data = (data_path,) if isinstance(data_path, (str, Path)) else tuple(map(str, data_path))
    given = {"load": place_of(load, "load"), "save": place_of(save, "save"), "data_path": data, "train_iters": train_iters}
    if _call("recover", "recover", {**given, **options}):
        raise InterruptedError(f"the run in {save} was stopped and has saved; the same call goes on from there")
    return Path(save) / "best"


def metric(name: str, *, axes: Sequence[str] = ("hidden", "ffn", "head", "kv_head", "layer")) -> Callable[[Any], Any]:
    """Decorator: file a metric of one's own under a name that ``metric=`` and ``metrics=`` take.

    What it decorates is a function of float32 weights, of any shape, that says what each of them contributes to the unit that owns
    it (a unit's score is their sum, in float64; larger stays), or a class derived from :data:`Metric`, for what needs text.

    Args:
        axes: that a function can score.

    Raises:
        InputError: on a name that is taken (one's own may be filed again) or none, an axis that there is not, a class that is no
            metric or lacks a method; and, when a function is called, if what it returns is no tensor of its weights' shape.
    """
    from megatron_prune.importance.own import filed

    return filed(name, axes)


def __getattr__(name: str) -> Any:
    if name == "Metric":
        return importlib.import_module("megatron_prune.importance.metric").Metric
    if name == "Plan":
        return importlib.import_module("megatron_prune.planning.plan").Plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
