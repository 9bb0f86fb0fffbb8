"""From a budget (parameters, a share of them, or memory) to the uniform shapes that use it up, and which is likely best.

The grid (a *pair* is a number of query heads with a number of KV groups):

- every axis keeps its own size or a multiple of its step: ``multiple_of``, or 64 for hidden, 32 for ffn (smaller in models
  less than eight steps wide), 1 for the others; the tensor-parallel size joins the step of ffn, the pipeline's that of layers;
- hidden channels, heads, KV groups and layers go down to a half, ffn to a quarter. Only where no such shape meets the budget
  do all axes go down to a single step;
- one axis *fills*: ffn, else hidden, else layers (the first that may vary). Of every combination of the others the largest
  filling size that meets the budget is taken. There are at most :data:`LIMIT` combinations: sizes are thinned evenly, from
  the axis that has most, and the largest and smallest stay;
- a shape that another one reaches or surpasses in every size is left out.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from math import ceil, floor, inf, isnan, lcm, log
from typing import Any, Callable, Iterator, NamedTuple

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError, raise_all
from megatron_prune.planning.selection import Scores
from megatron_prune.planning.target import check_parallel

VARIED = ("hidden", "ffn", "head", "kv_head", "layer")
"""Axes that a budget may cut."""
LIMIT = 200
"""Most combinations, and so candidates."""
STEPS = {"hidden": 64, "ffn": 32, "head": 1, "kv_head": 1, "layer": 1}
"""Steps where ``multiple_of`` names none."""
LEAST = {"hidden": 0.5, "ffn": 0.25, "head": 0.5, "kv_head": 0.5, "layer": 0.5}
"""Share of an axis that stays at least, where that meets the budget."""
FINEST_HIDDEN, ENOUGH_HIDDEN = 8, 4
"""Without ``multiple_of`` the step of hidden is halved, down to 8, until four sizes are legal: Llama's class in transformers
wants multiples of the number of heads."""
LOSS_WEIGHTS = {"hidden": 4.25, "ffn": 1.47, "head": 0.55, "kv_head": 0.81, "layer": 1.61}
"""Rise of the log perplexity per −log(share that stays). Measured on SmolLM2-135M-Instruct, re-fitted, one axis at a time
(``spec/quality-protocol.md``: ffn 1152, hidden 512 tied, 24 layers folded, 2 of 3 KV groups, 6 of 9 query heads), with even
scores. The five shapes of 101.9M measured there, four of which mix axes, then come out with an error of −4 to +13 %."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may cost at most: exactly one of ``params``, ``ratio`` and ``memory``.

    Attributes:
        params: parameters as stored (a tied head counts once, vocabulary padding not at all).
        ratio: share of all parameters to remove, 0 < ratio < 1: ``params = floor(total · (1 − ratio))``.
        memory: bytes of an inference, weights and keys and values:
            ``dtype_bytes · (parameters + 2 · layers · kv_groups · head_dim · seq_length · batch)``.
            The whole sequence is cached even where the model has a sliding window, since not every runtime lets go of what
            is outside of it. Activations and the runtime itself come on top.
        seq_length, batch: tokens of a sequence and sequences in the cache that ``memory`` has to hold.
        dtype_bytes: bytes of a stored weight and of a cached value.
    """

    params: int | None = None
    ratio: float | None = None
    memory: int | None = None
    seq_length: int = 4096
    batch: int = 1
    dtype_bytes: int = 2

    def __post_init__(self):
        named = [name for name in ("params", "ratio", "memory") if getattr(self, name) is not None]
        if len(named) != 1:
            got = " and ".join(f"--{name}" for name in named) or "none of them"
            raise InputError("a budget", got=got, needed="one of --params, --ratio and --memory")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InputError("--ratio", got=self.ratio, needed="the share of parameters to remove, between 0 and 1")
        for name in ("params", "memory", "seq_length", "batch", "dtype_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = f"--memory_{name}" if name in ("seq_length", "batch") else f"--{name}"
                raise InputError(flag, got=value, needed="a positive number")

    def limit(self, config: ModelConfig) -> int:
        """The most that a smaller ``config`` may cost: parameters, or bytes."""
        if self.ratio is not None:
            return floor(parameters(config) * (1 - Fraction(repr(float(self.ratio)))))
        return self.memory if self.params is None else self.params

    def cost(self, config: ModelConfig) -> int:
        """What ``config`` costs, in the unit of :meth:`limit`."""
        if self.memory is None:
            return parameters(config)
        cached = 2 * config.num_layers * config.num_query_groups * config.kv_channels * self.seq_length * self.batch
        return self.dtype_bytes * (parameters(config) + cached)

    def describe(self, cost: int) -> str:
        """A cost with its unit."""
        at = f" at {self.batch} × {self.seq_length} tokens"
        return f"{cost:,} parameters" if self.memory is None else f"{cost:,} bytes of weights, keys and values" + at


def parameters(config: ModelConfig) -> int:
    """:func:`parameter_count`, at a cost that does not grow with the number of layers."""
    one, two = (parameter_count(replace(config, num_layers=layers)) for layers in (1, 2))
    return one + (config.num_layers - 1) * (two - one)


def read_budget(
    *, params: str | None, ratio: float | None, memory: str | None, seq_length: int, batch: int, dtype_bytes: int
) -> Budget | None:
    """The budget that options ask for; ``None`` if none does.

    Raises:
        InputError: on more than one, or a value that is none.
    """
    if params is None and ratio is None and memory is None:
        return None
    return Budget(
        params=None if params is None else parse_count(params),
        ratio=ratio,
        memory=None if memory is None else parse_bytes(memory),
        seq_length=seq_length,
        batch=batch,
        dtype_bytes=dtype_bytes,
    )


def parse_count(text: str, flag: str = "--params") -> int:
    """``"90M"``, ``"1.5B"``, ``"123456"`` → that many; a broken number is rounded down.

    Raises:
        InputError: if it is not such a count, or zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)", text.strip().upper())
    count = floor(Fraction(match[1]) * 1000 ** " KMBT".index(match[2] or " ")) if match else 0
    if count < 1:
        raise InputError(flag, got=repr(text), needed="a count such as 90M, 1.5B or 123456")
    return count


def parse_bytes(text: str, flag: str = "--memory") -> int:
    """``"500MB"``, ``"5G"`` (decimal, as transformers reads them), ``"2GiB"`` (binary) → bytes, rounded down.

    Raises:
        InputError: if it is not such a size, or zero.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0
    count = floor(Fraction(match[1]) * unit) if match else 0
    if count < 1:
        raise InputError(flag, got=repr(text), needed="a size such as 5GB, 500MB (decimal) or 2GiB (binary)")
    return count


def parse_multiples(text: str, flag: str = "--multiple_of") -> dict[str, int]:
    """``"hidden=64,ffn=128"`` → ``{"hidden": 64, "ffn": 128}``.

    Raises:
        InputError: on an unknown axis, one named twice, or a step that is not a positive number.
    """
    steps: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\w+)=([0-9]+)", part)
        if not match or match[1] in steps:
            why = f"{match[1]} twice" if match else repr(text)
            raise InputError(flag, got=why, needed="axes and their steps, such as hidden=64,ffn=128")
        steps[match[1]] = int(match[2])
    raise_all(InputError, flag, _step_problems(steps))
    return steps


def check_multiples(config: ModelConfig, new: ModelConfig, multiple_of: dict[str, int]) -> None:
    """Refuse an exact request whose sizes are no multiples; a size that does not change need not be one.

    Args:
        config: the model.
        new: the completed request (:func:`target.resolve_target`).

    Raises:
        InputError: naming the nearest sizes that would do, or steps that no size of this model can have.
    """
    raise_all(InputError, "--multiple_of", _step_problems(multiple_of, config))
    problems = []
    for name, step in multiple_of.items():
        field = AXES.get(name).field
        old, asked = getattr(config, field), getattr(new, field)
        if asked != old and asked % step:
            below = asked - asked % step
            near = [size for size in (below, min(below + step, old)) if size]
            problems.append(f"{field}_remain {asked} is not a multiple of {step}; nearest: {' or '.join(map(str, near))}")
    raise_all(InputError, "the requested shape is not of the multiples asked for", problems)


def _step_problems(multiple_of: dict[str, int], config: ModelConfig | None = None) -> list[str]:
    problems = []
    for name, step in multiple_of.items():
        if name not in VARIED:
            problems.append(f"unknown axis {name!r}, needed one of {', '.join(VARIED)}")
        elif step < 1:
            problems.append(f"{name}={step} is not a positive number")
        elif config is not None and step > (size := getattr(config, AXES.get(name).field)):
            problems.append(f"{name}={step} is larger than the model's {size}")
    return problems


class _Column(NamedTuple):
    """Shapes that differ in the filling ``field`` alone: ``sizes``, descending."""

    base: ModelConfig
    field: str
    sizes: list[int]

    def shapes(self, start: int = 0) -> Iterator[ModelConfig]:
        return (replace(self.base, **{self.field: size}) for size in self.sizes[start:])

    def first_within(self, budget: Budget, limit: int) -> int:
        """Index of the largest shape that costs at most ``limit`` (the number of sizes, if none does)."""
        within = lambda size: budget.cost(replace(self.base, **{self.field: size})) <= limit
        if not within(self.sizes[-1]):
            return len(self.sizes)
        return bisect_left(self.sizes, True, key=within)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The sizes to combine. ``steps`` are those of ``multiple_of``; ``least`` the share of each axis that stays."""

    config: ModelConfig
    axes: tuple[str, ...]
    steps: dict[str, int]
    layout: ParallelLayout
    prune_type: str
    legal: Callable[[ModelConfig], bool]
    least: dict[str, float]

    def allowed(self, shape: ModelConfig) -> bool:
        """Whether ranks can share the shape and a family can express it."""
        try:
            check_parallel(self.config, shape, self.layout, self.prune_type)
        except InputError:
            return False
        return self.legal(shape)

    def sizes(self, axis: str, step: int) -> list[int]:
        """The model's own size and smaller multiples of ``step``, descending."""
        size = getattr(self.config, AXES.get(axis).field)
        if axis not in self.axes:
            return [size]
        return [size] + [n for n in range((size - 1) // step * step, 0, -step) if n >= ceil(size * self.least[axis])]

    def step(self, axis: str) -> int:
        """The step of an axis, divisibility by ranks included."""
        step, size = self.steps.get(axis, STEPS[axis]), getattr(self.config, AXES.get(axis).field)
        while axis not in self.steps and step > 1 and step * 8 > size:
            step //= 2
        ranks = {"ffn": 1 if self.prune_type == "unbalance" else self.layout.tensor, "layer": self.layout.pipeline}
        return lcm(step, ranks.get(axis, 1))

    def pairs(self) -> list[tuple[int, int]]:
        """(query heads, KV groups), by attention's size, descending: whole groups, and the same heads of each."""
        old, pairs = self.config, []
        per_group = range(1, old.heads_per_group + 1) if "head" in self.axes else [old.heads_per_group]
        groups = self.sizes("kv_head", self.step("kv_head"))
        for kept, each in product(groups, per_group):
            heads = kept * each
            whole = heads == old.num_attention_heads or heads % self.step("head") == 0
            if whole and each >= ceil(old.heads_per_group * self.least["head"]):
                pairs.append((heads, kept))
        return sorted(pairs, key=lambda pair: (sum(pair), pair), reverse=True)

    def hidden_sizes(self, pair: tuple[int, int]) -> list[int]:
        """Sizes of hidden that are legal with these heads (asked with the model's own layers and ffn)."""
        base, step = replace(self.config, num_attention_heads=pair[0], num_query_groups=pair[1]), self.step("hidden")
        while True:
            sizes = [size for size in self.sizes("hidden", step) if self.allowed(replace(base, hidden_size=size))]
            fixed = "hidden" in self.steps or "hidden" not in self.axes
            if fixed or len(sizes) >= ENOUGH_HIDDEN or step <= FINEST_HIDDEN:
                return sizes
            step //= 2

    def columns(self) -> list[_Column]:
        """All combinations of the axes that do not fill, thinned to :data:`LIMIT`."""
        fill = next((axis for axis in ("ffn", "hidden", "layer") if axis in self.axes), "ffn")
        hidden = {pair: sizes for pair in self.pairs() if (sizes := self.hidden_sizes(pair))}
        layers = self.sizes("layer", self.step("layer"))
        if not hidden:
            return []
        most = {"pairs": len(hidden)}
        most["hidden"] = 1 if fill == "hidden" else max(map(len, hidden.values()))
        most["layers"] = 1 if fill == "layer" else len(layers)
        while most["pairs"] * most["hidden"] * most["layers"] > LIMIT:
            most[max(most, key=most.get)] -= 1
        columns = []
        for pair in _spread(list(hidden), most["pairs"]):
            width, depth = _spread(hidden[pair], most["hidden"]), _spread(layers, most["layers"])
            fills = {"ffn": self.sizes("ffn", self.step("ffn")), "hidden": hidden[pair], "layer": layers}[fill]
            for size, count in product(width, depth):
                base = replace(self.config, num_attention_heads=pair[0], num_query_groups=pair[1])
                base = replace(base, hidden_size=size, num_layers=count)
                columns.append(_Column(base, AXES.get(fill).field, fills))
        return columns


def _spread(values: list, count: int) -> list:
    """``count`` of the values, evenly, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(n * (len(values) - 1) / max(1, count - 1))] for n in range(count)]


def candidates(
    config: ModelConfig,
    budget: Budget,
    *,
    multiple_of: dict[str, int],
    layout: ParallelLayout,
    prune_type: str,
    legal: Callable[[ModelConfig], bool],
    fixed: dict[str, Any] | None = None,
    axes: tuple[str, ...] = VARIED,
) -> list[ModelConfig]:
    """The uniform shapes on the grid (see the module) that meet the budget and could not be larger, largest first.

    Args:
        layout, prune_type: how ranks share the model; every shape divides over them.
        legal: whether a family can express a shape.
        fixed: sizes that were named exactly, by option: none may be, beside a budget (``None`` values are not named).
        axes: those that may be cut.

    Raises:
        InputError: if a budget and exact sizes are both given, a step fits no size, the model meets the budget already, or
            no shape does (naming the smallest).
    """
    if named := [f"--{name}" for name, value in (fixed or {}).items() if value is not None]:
        raise InputError(f"a budget and {', '.join(named)} both say what stays", do="give one of the two")
    if not axes or set(axes) - set(VARIED):
        raise InputError("axes to cut", got=", ".join(axes) or "none", needed="some of " + ", ".join(VARIED))
    raise_all(InputError, "--multiple_of", _step_problems(multiple_of, config))
    layout.check(config)
    limit = budget.limit(config)
    if budget.cost(config) <= limit:
        raise InputError(
            "nothing to prune: the model meets the budget as it is",
            got=budget.describe(limit),
            needed=f"less than the model's {budget.describe(budget.cost(config))}",
        )
    shared = dict(config=config, axes=tuple(axes), steps=multiple_of, layout=layout, prune_type=prune_type, legal=legal)
    for least in (LEAST, dict.fromkeys(VARIED, 0.0)):
        grid = _Grid(**shared, least=least)
        columns = grid.columns()
        found = [_first(grid, column, column.first_within(budget, limit)) for column in columns]
        if shapes := _undominated([shape for shape in found if shape is not None]):
            return sorted(shapes, key=lambda shape: (parameters(shape), _sizes(shape)), reverse=True)
    raise _nothing_meets(budget, limit, grid, columns)


def _first(grid: _Grid, column: _Column, start: int) -> ModelConfig | None:
    return next((shape for shape in column.shapes(start) if grid.allowed(shape)), None)


def _nothing_meets(budget: Budget, limit: int, grid: _Grid, columns: list[_Column]) -> InputError:
    smallest = []
    for column in columns:
        turned = column._replace(sizes=column.sizes[::-1])
        smallest += [shape] if (shape := _first(grid, turned, 0)) else []
    nearest = "no shape of these multiples is legal"
    if smallest:
        shape = min(smallest, key=budget.cost)
        sizes = ", ".join(f"{name} {getattr(shape, AXES.get(name).field)}" for name in VARIED)
        nearest = f"at least {budget.describe(budget.cost(shape))}: the smallest shape is {sizes}"
    return InputError(
        "no shape meets the budget",
        got=f"at most {budget.describe(limit)}",
        needed=nearest,
        do="allow more, smaller multiples, or more axes to be cut",
    )


def _sizes(shape: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(shape, AXES.get(name).field) for name in VARIED)


def _undominated(shapes: list[ModelConfig]) -> list[ModelConfig]:
    """Without those that another one reaches or surpasses in every size, and each once."""
    by_sizes = {_sizes(shape): shape for shape in shapes}
    covers = lambda large, small: large != small and all(a >= b for a, b in zip(large, small))
    return [shape for sizes, shape in by_sizes.items() if not any(covers(other, sizes) for other in by_sizes)]


def rank_candidates(
    config: ModelConfig, candidates: list[ModelConfig], loss: Callable[[ModelConfig], float]
) -> list[tuple[float, ModelConfig]]:
    """(loss, shape) by loss, ascending; among equals more parameters first, then fewer axes cut. NaN counts as infinite."""
    measured = [(inf if isnan(value := float(loss(shape))) else value, shape) for shape in candidates]
    return sorted(measured, key=lambda pair: (pair[0], -parameters(pair[1]), len(cut_axes(config, pair[1]))))


def cut_axes(config: ModelConfig, new: ModelConfig) -> list[str]:
    """Axes on which ``new`` is smaller; query heads that go with their KV group are not cut themselves."""
    return [name for name in VARIED if _units_each(new, name) < _units_each(config, name)]


def estimated_loss(config: ModelConfig, target: ModelConfig, scores: Scores, *, even: float = 0.0) -> float:
    """What a shape costs by the metric's own scores: :func:`loss_estimate` of one shape."""
    return loss_estimate(config, scores, even=even)(target)


def loss_estimate(config: ModelConfig, scores: Scores, *, even: float = 0.0) -> Callable[[ModelConfig], float]:
    """A function that tells what a shape costs by the metric's own scores, to compare shapes of one model.

    Σ over cut axes of ``LOSS_WEIGHTS[axis] · −log(share of the summed score that stays)``. The share of an axis chosen layer
    by layer is the mean over **all** layers (those that go too, so that dropping one never hides what it lost), each layer
    normalised to one; of query heads, over all KV groups as well. The best units stay, wherever ranks hold them: the
    estimate is the same at every TP and prune type. Negative scores count as zero; of units that are all zero, each counts
    the same. Cutting more never lowers it.

    Args:
        scores: of every axis that is cut, all layers (``("hidden", None)``, ``("ffn", 0…)``, …); sorted once.
        even: weight of even scores mixed in, 0 to 1. At 1 sizes alone decide, by the measured weights. More than 0 guards
            against scores so skewed (channels of massive activation) that a cut looks free.

    Raises:
        InputError: (the function) if scores are missing, of another size, or not finite.
    """
    curve = cache(lambda axis: _kept_shares(scores, axis, config))

    def loss(target: ModelConfig) -> float:
        total = 0.0
        for axis in cut_axes(config, target):
            keep, shares = _units_each(target, axis), curve(axis)
            stays = min(1.0, (1 - even) * shares[keep - 1] + even * keep / len(shares))
            total += LOSS_WEIGHTS[axis] * -log(stays) if stays > 0 else inf
        return total

    return loss


def _units_each(config: ModelConfig, axis: str) -> int:
    """Units of an axis; query heads are counted within their KV group."""
    return config.heads_per_group if axis == "head" else AXES.get(axis).count(config)


def _kept_shares(scores: Scores, axis: str, config: ModelConfig) -> list[float]:
    """Share of the score that the best 1, 2, … units hold: the mean over layers (and KV groups), each normalised."""
    layers = range(config.num_layers) if AXES.get(axis).per_layer else [None]
    rows = torch.cat([_rows(scores, axis, layer, config) for layer in layers])
    largest = rows.amax(1, keepdim=True)
    rows = torch.where(largest > 0, rows / largest, torch.ones_like(rows)).sort(1, descending=True).values
    return (rows / rows.sum(1, keepdim=True)).cumsum(1).mean(0).tolist()


def _rows(scores: Scores, axis: str, layer: int | None, config: ModelConfig) -> torch.Tensor:
    """Scores of one layer, float64 [KV groups or 1, units]."""
    where, count = axis if layer is None else f"{axis} in layer {layer}", AXES.get(axis).count(config)
    units = scores.get((axis, layer))
    if units is None or units.numel() != count:
        raise InputError(f"scores of {where}", got="none" if units is None else units.numel(), needed=f"{count}, one per unit")
    if not units.isfinite().all():
        raise InputError(f"scores of {where} are not finite", do="look for NaN or infinity in the model's weights or activations")
    return units.to(torch.float64).clamp(min=0).view(-1, _units_each(config, axis))
