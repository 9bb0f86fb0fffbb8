"""What pruning a model of either kind is asked: a shape, a budget or a plan, the text, and how units are chosen and fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_prune.config import flag, option
from megatron_prune.planning.allocators.allocator import ALLOCATORS
from megatron_prune.planning.target import HIDDEN_METHODS, PRUNE_TYPES
from megatron_prune.runtime.options import DTYPES
from megatron_prune.serving.options import ServeOptions
from megatron_prune.writing.options import OutputOptions

QUICK = {"nsamples": 32, "seq_length": 256, "metric": "activation", "reconstruct": 0, "sequential": False}
"""The settings of ``--quick``, for what is not set otherwise: an eighth of the text, no gradients, and least squares alone."""

BEST = {"hidden": "activation", "ffn": "fisher", "head": "obs", "kv_head": "obs", "layer": "fold"}
"""Axis → how units are chosen where nothing else is asked for: what measured best before least squares in first trials
(channels: perplexity 61.2 by ``fisher``, 63.2 by ``activation``, 65.1 by ``obs`` on one protocol)."""


@dataclass(frozen=True, kw_only=True)
class AmountOptions:
    """How much text a model is measured on, and what it is computed in."""

    data: tuple[str, ...] | None = option(
        "files of text, JSON, CSV or Parquet, folders, Megatron .bin/.idx, data set names, or self (own samples), each with "
        ":WEIGHT if wanted (default: self; named text is mixed half and half with self)",
        None,
        group="text",
    )
    nsamples: int = option("samples from each source", 128, least=1, group="text")
    dtype: str = option("what to compute in", "fp32", choices=DTYPES, group="run")


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(AmountOptions):
    """The text that a model is measured on, and what it is computed in."""

    data_field: str = option("name of the text in JSONL records and data sets", "text", group="text")
    seq_length: int | None = option(
        "tokens in a sample (default: 512, or the model's context where that is shorter)", None, least=2, group="text"
    )
    seed: int = option("seed of all that is drawn: windows, own samples, the random metric", 1234, least=0, group="run")


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How a budget is dealt out to layers."""

    allocate: str = option(
        "within a budget: uniform, all layers keep one shape; free, each has sizes of its own, by what every block is measured "
        "to cost the model (best of several such shapes and of the best uniform ones)",
        "uniform",
        choices=ALLOCATORS.names(),
    )
    min_layer_ratio: float = option(
        "share of a layer's units that stays at least, where its block stays (--allocate free)",
        0.0,
        least=0,
        most=1,
        group="expert",
    )
    max_layer_ratio: float = option(
        "share of a layer's units that stays at most, where it is cut (--allocate free)", 1.0, above=0, most=1, group="expert"
    )


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What the pruned model may cost at most."""

    params: str | None = option("budget: at most this many parameters as stored, such as 90M", None, group="shape")
    ratio: float | None = option("budget: share of all parameters to remove, such as 0.25", None, above=0, below=1, group="shape")
    memory: str | None = option("budget: weights and KV cache of an inference, such as 2GiB", None, group="shape")
    memory_seq_length: int = option("tokens in the KV cache of --memory", 4096, least=1, group="expert")
    memory_batch: int = option("sequences in the KV cache of --memory", 1, least=1, group="expert")
    multiple_of: str | None = option("sizes are multiples of these, such as hidden=64,ffn=128", None, group="shape")

    BUDGETS: ClassVar[tuple[str, ...]] = ("params", "ratio", "memory")


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The shape to reach, size by size (one that is none is refused with all others: ``resolve_target``), or a plan's."""

    hidden_size_remain: int | None = option("residual channels that stay", None, group="shape")
    ffn_hidden_size_remain: int | None = option("feed-forward channels that stay in every layer", None, group="shape")
    num_attention_heads_remain: int | None = option("query heads that stay in every layer", None, group="shape")
    num_query_groups_remain: int | None = option("KV groups that stay in every layer", None, group="shape")
    num_layers_remain: int | None = option("layers that stay, chosen by the depth metric", None, group="shape")
    drop_layers: tuple[int, ...] | None = option("layers that go, 0-based, such as 7,13", None, group="shape")
    drop_attention: tuple[int, ...] | None = option(
        "layers whose attention goes alone, 0-based, such as 3,7", None, group="shape"
    )
    drop_mlp: tuple[int, ...] | None = option("layers whose feed-forward block goes alone, 0-based", None, group="shape")
    layer_sizes: str | None = option(
        'JSON file of sizes by layer, such as {"3": {"ffn_hidden_size": 800, "num_query_groups": 2}, "5": {"mlp": "none"}}',
        None,
        group="shape",
        exists=True,
    )
    untie: bool = option("store the head of a tied model as a matrix of its own", False, group="shape")
    plan: str | None = option("apply this plan instead of making one", None, group="shape", exists=True)
    vocab_plan: str | None = option(
        "keep the tokens of this plan (of megatron-prune vocab select) alone", None, group="shape", exists=True
    )

    SIZES: ClassVar[tuple[str, ...]] = (
        "hidden_size_remain",
        "ffn_hidden_size_remain",
        "num_attention_heads_remain",
        "num_query_groups_remain",
        "num_layers_remain",
        "drop_layers",
    )
    BY_LAYER: ClassVar[tuple[str, ...]] = ("drop_attention", "drop_mlp", "layer_sizes")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How units are chosen."""

    search: int = option(
        "within a budget, re-fit this many of the shapes that look best and keep what loses least on held-out text", 1, least=1
    )
    metric: str | None = option(
        "how units are scored: random, magnitude, activation, wanda, taylor …, with parameters where it has any, as in "
        "obs:damping=0.1 (default: what measured best for each axis)",
        None,
    )
    depth_metric: str | None = option(
        "how layers are chosen (default: fold where there is text, angular with --no-refit, else the metric)", None
    )
    hidden_method: str | None = option(
        "how hidden units are cut (default: rotate where there is text, what stays is re-fitted and the model allows it, else select)",
        None,
        choices=HIDDEN_METHODS,
    )


@dataclass(frozen=True, kw_only=True)
class TargetOptions(AllocationOptions, BudgetOptions, ShapeOptions, MethodOptions):
    """The shape to reach, or a budget to keep to, and how units are chosen; or a plan."""

    uniform: bool = option(
        "turn a plan whose layers differ (--plan) into the shape with layers alike and as many parameters", False, group="shape"
    )


@dataclass(frozen=True, kw_only=True)
class EffortOptions:
    """Whether and how long what stays is re-fitted."""

    refit: bool | None = option("re-fit what stays by least squares (default: where there is text)", None)
    reconstruct: int = option(
        "passes over the text in which all matrices of a cut block are fitted together; 0 leaves it at least squares", 4, least=0
    )
    quick: bool = option(
        "cheap settings for what is not set otherwise: "
        + " ".join(f"{flag(name)} {value}" for name, value in QUICK.items() if value is not False)
        + " --no-sequential; several times faster (docs/quality.md says what it costs)",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class CostOptions(AllocationOptions, BudgetOptions, ShapeOptions, ServeOptions, MethodOptions, AmountOptions, EffortOptions):
    """What the shape, the time and the memory of a pruning follow from."""


@dataclass(frozen=True, kw_only=True)
class DivisionOptions:
    """How ranks share the pruned model, and as what it is to be written."""

    prune_type: str = option("which units each tensor-parallel rank keeps", "balance", choices=PRUNE_TYPES)
    target_family: str | None = option("Hugging Face family the result will be exported as", None, group="model")


@dataclass(frozen=True, kw_only=True)
class FitOptions(CalibrationOptions, EffortOptions):
    """How what stays is re-fitted on the text."""

    sequential: bool | None = option(
        "fit every block to mend what the pruned ones before it left, or to the dense model's own stream (default: the stream; "
        "where that leaves a model far from the dense one, both ways, and the better one stays)",
        None,
    )
    ridge: float | None = option(
        "how strongly o and down are held to the cut matrices, as a share of the moment's mean diagonal (default: for each "
        "what predicts one half of the samples best from the other)",
        None,
        least=0,
        group="expert",
    )
    reader_ridge: float | None = option(
        "the same for q, k, v, gate and up, where hidden units are cut", None, least=0, group="expert"
    )


@dataclass(frozen=True, kw_only=True)
class ChoosingOptions(CostOptions, TargetOptions, FitOptions):
    """What stays, and what it is chosen by."""

    scores: str | None = option("use these scores (of megatron-prune score) and their text", None, group="text", exists=True)


@dataclass(frozen=True, kw_only=True)
class PruningOptions(ChoosingOptions, OutputOptions):
    """What stays, how it is re-fitted, and what is written beside it."""

    save_plan: str | None = option("also write the plan here", None, group="model")
