"""The Python interface: ``import megatron_prune as mp``.

Every function does what the verb of its name does on the command line, with the same options under the same names (dashes are
underscores), and raises what the command line says: :class:`megatron_prune.errors.InputError`, before anything is written. Models
are directories, hub ids, Megatron checkpoints (one process of each rank calls the function, under ``torchrun``) or, where a
signature says so, transformers models in memory. Progress is logged to the logger ``megatron_prune``.
"""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from megatron_prune.config import made_of
from megatron_prune.errors import InputError
from megatron_prune.in_memory import folder_of, is_megatron, loaded, named_plan, named_text, placed, several
from megatron_prune.runtime.reporting import log, quiet_libraries
from megatron_prune.runtime.world import World
from megatron_prune.verbs.table import module_of, options_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from megatron_prune.importance.metric import Metric as Metric
    from megatron_prune.planning.plan import Plan as Plan

    Source = str | Path
    Tokenizer = PreTrainedTokenizerBase | str | Path

SIZES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers")
"""Keys of ``target`` that are sizes; all others are the names of options: ``ratio``, ``params``, ``drop_layers``, ``layer_sizes`` …"""


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


def _options(verb: str, given: Mapping[str, Any]) -> Any:
    return made_of(options_of(verb), {name: value for name, value in given.items() if value is not None})


def _target(target: Any) -> dict[str, Any]:
    if not isinstance(target, Mapping):
        return {"plan": target}
    return {f"{name}_remain" if name in SIZES else name: value for name, value in target.items()}


def convert(load: Source, save: Source, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, **options: Any) -> Path:
    """Turn a Hugging Face directory or hub id into a Megatron checkpoint.

    Args:
        tensor_parallel, pipeline_parallel: ranks and stages that it is written for.
        options: further ones of ``megatron-prune convert``.

    Returns:
        ``save``.
    """
    sizes = {"target_tensor_parallel_size": tensor_parallel, "target_pipeline_parallel_size": pipeline_parallel}
    run("convert", _options("convert", {"load": load, "save": save, **sizes, **options}))
    return Path(save)


def export(load: Source, save: Source, **options: Any) -> Path:
    """Turn a Megatron checkpoint into a Hugging Face directory.

    Args:
        options: further ones of ``megatron-prune export``, such as ``target_family`` or ``target_params_dtype``.

    Returns:
        ``save``.
    """
    run("export", _options("export", {"load": load, "save": save, **options}))
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
    with named_text(data, texts) as named:
        run("score", _options("score", {"load": load, "save": save, **named, **options}))
    return Path(save)


def plan(
    load: Source,
    target: Mapping[str, Any],
    *,
    save: Source | None = None,
    data: Any = None,
    texts: Sequence[str] | None = None,
    **options: Any,
) -> Plan:
    """Choose what stays of a model of either kind.

    Args:
        target: what it is to be: sizes (``{"ffn_hidden_size": 1152, "num_layers": 24}``), or a budget (``{"ratio": 0.25}``).
        save: JSON file to write the plan to.
        data, texts: as for :func:`score`; not read where ``scores`` names a directory.
        options: further ones of ``megatron-prune plan``, such as ``scores`` or ``metric``.
    """
    with named_text(data, texts) as named, placed(save, "plan.json") as file:
        return run("plan", _options("plan", {"load": load, "save": file, **_target(target), **named, **options}))


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
        target: sizes (``{"ffn_hidden_size": 1152, "num_layers": 24}``), a budget (``{"ratio": 0.25}``), a plan, or its file.
        save: directory to write; needed unless the model is in memory.
        data: sources as on the command line, or samples as int64 [samples, tokens] (default: the model's own samples).
        texts: texts in memory, instead.
        tokenizer: that text is read with (default: the model's own; a model in memory has none).
        options: further ones of ``megatron-prune prune`` or ``prune-hf``.

    Returns:
        A model in memory for a model in memory, with its element type and on its device; else ``save``.
    """
    given = {**_target(target), **options}
    with named_text(data, texts) as named, named_plan(given) as given, folder_of(model, tokenizer) as folder:
        if folder is None:
            if save is None:
                raise InputError("save", got="nothing", needed="a directory to write the pruned model to")
            verb, more = ("prune", {"tokenizer": tokenizer}) if is_megatron(model) else ("prune-hf", {})
            if verb == "prune-hf" and tokenizer is not None:
                raise InputError("tokenizer beside a directory", do="put its files there, or load the model and give both")
            run(verb, _options(verb, {"load": model, "save": save, **more, **named, **given}))
            return Path(save)
        with placed(save, "pruned") as place:
            run("prune-hf", _options("prune-hf", {"load": folder, "save": place, **named, **given}))
            return loaded(place, model)


@overload
def apply(model: PreTrainedModel, plan: Plan | Source, *, save: Source | None = None, **options: Any) -> PreTrainedModel: ...
@overload
def apply(model: Source, plan: Plan | Source, *, save: Source | None = None, **options: Any) -> Path: ...
def apply(
    model: PreTrainedModel | Source, plan: Plan | Source, *, save: Source | None = None, **options: Any
) -> PreTrainedModel | Path:
    """Cut a model by a plan. Without text (``data``, ``texts``) nothing is re-fitted: what stays keeps its bits.

    Args:
        model, save, options: as for :func:`prune`.
    """
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
        data: corpora that are counted, instead: by processes of their own, which import the calling script, so that it needs
            ``if __name__ == "__main__":`` around what it does.
        options: further ones of ``megatron-prune vocab trim``.

    Returns:
        ``save``.
    """
    with tempfile.TemporaryDirectory() as work:
        named = several(counts)
        if corpora := several(data):
            named = (*named, f"{work}/counts")
            run("vocab count", _options("vocab count", {"tokenizer": load, "input": corpora, "save": named[-1]}))
        given = {"load": load, "save": save, "counts": named, "remain_vocab_size": size, **options}
        run("vocab trim", _options("vocab trim", given))
    return Path(save)


def evaluate(
    model: PreTrainedModel | Source, data: Source, *, tokenizer: Tokenizer | None = None, **options: Any
) -> dict[str, Any]:
    """Perplexity of a model of either kind, or of one in memory, on a text.

    Args:
        data: a source as on the command line.
        tokenizer: that it is read with (default: the model's own).
        options: further ones of ``megatron-prune evaluate``, such as ``seq_length`` and ``windows``.

    Returns:
        The facts, ``"perplexity"`` among them.
    """
    with folder_of(model, tokenizer) as folder:
        named = {"tokenizer": None if folder else tokenizer}
        return run("evaluate", _options("evaluate", {"load": folder or model, "data": data, **named, **options}))


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
    data = tuple(map(str, several(data_path)))
    given = {"load": load, "save": save, "data_path": data, "train_iters": train_iters, **options}
    if run("recover", _options("recover", given)):
        raise InterruptedError(f"the run in {save} was stopped and has saved; the same call goes on from there")
    return Path(save) / "best"


_OWN: set[str] = set()
"""Metrics that callers filed."""


def metric(name: str, *, axes: Sequence[str] = ("hidden", "ffn", "head", "kv_head", "layer")) -> Callable[[Any], Any]:
    """Decorator: file a metric of one's own under a name that ``metric=`` and ``metrics=`` take.

    What it decorates is a function of float32 weights, of any shape, that says what each of them contributes to the unit that owns
    it (a unit's score is their sum, in float64; larger stays), or a class derived from :data:`Metric`, for what needs text.

    Args:
        axes: that a function can score.

    Raises:
        InputError: on a name that is taken (one's own may be filed again) or none, an axis that there is not; and, when a function
            is called, if what it returns is no tensor of its weights' shape.
    """
    from megatron_prune.axes.axis import AXES
    from megatron_prune.importance.metric import METRICS
    from megatron_prune.importance.metric import Metric as Base

    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError("the name of a metric", got=repr(name), needed="a letter, then letters, digits and underscores")
    for axis in axes:
        AXES.get(axis)
    if name not in _OWN and name in METRICS.names():
        raise InputError(f"a metric {name!r} is there already", do="choose another name")

    def filed(given: Any) -> Any:
        if name in _OWN:  # a cell of a notebook that runs again
            METRICS.forget(name)
        _OWN.add(name)
        if isinstance(given, type):
            return METRICS.register(name)(given)

        class OfWeights(Base):
            __doc__ = given.__doc__
            reads_weights = True

            def per_weight(self, axis: str, tensor: Any, weight: Tensor, cols: range) -> Tensor:
                found = given(weight.float())
                shape = list(getattr(found, "shape", ()))
                if not hasattr(found, "double") or shape != list(weight.shape):
                    got = f"a tensor {shape}" if hasattr(found, "double") else type(found).__name__
                    raise InputError(
                        f"metric {name}: what it says of weights", got=got, needed=f"a tensor {list(weight.shape)}, as they are"
                    )
                return found.double()

            def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
                return total

        OfWeights.axes = frozenset(axes)
        METRICS.register(name)(OfWeights)
        return given

    return filed


def __getattr__(name: str) -> Any:
    if name == "Metric":
        return importlib.import_module("megatron_prune.importance.metric").Metric
    if name == "Plan":
        return importlib.import_module("megatron_prune.planning.plan").Plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
