"""The uniform shapes that use a budget up.

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

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, lcm
from typing import Any, Callable, Iterator, NamedTuple

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import AXES
from megatron_prune.config import flag
from megatron_prune.errors import InputError, raise_all
from megatron_prune.planning.allocators.allocator import Bounds
from megatron_prune.planning.budget import Budget, parameters
from megatron_prune.planning.multiples import VARIED, step_problems
from megatron_prune.planning.target import check_parallel

LIMIT = 200
"""Most combinations, and so candidates."""
STEPS = {"hidden": 64, "ffn": 32, "head": 1, "kv_head": 1, "layer": 1}
"""Steps where ``multiple_of`` names none."""
LEAST = {"hidden": 0.5, "ffn": 0.25, "head": 0.5, "kv_head": 0.5, "layer": 0.5}
"""Share of an axis that stays at least, where that meets the budget."""
FINEST_HIDDEN, ENOUGH_HIDDEN = 8, 4
"""Without ``multiple_of`` the step of hidden is halved, down to 8, until four sizes are legal: Llama's class in transformers
wants multiples of the number of heads."""


def axis_step(axis: str, size: int, multiple_of: dict[str, int]) -> int:
    """The step of an axis of ``size`` units: what was named, else its own, smaller where that would leave less than eight."""
    step = multiple_of.get(axis, STEPS[axis])
    while axis not in multiple_of and step > 1 and step * 8 > size:
        step //= 2
    return step


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

    def shared(self, shape: ModelConfig) -> bool:
        """Whether ranks can share the shape."""
        try:
            check_parallel(self.config, shape, self.layout, self.prune_type)
        except InputError:
            return False
        return True

    def allowed(self, shape: ModelConfig) -> bool:
        """Whether ranks can share the shape and a family can express it."""
        return self.shared(shape) and self.legal(shape)

    def sizes(self, axis: str, step: int) -> list[int]:
        """The model's own size and smaller multiples of ``step``, descending."""
        size = getattr(self.config, AXES.get(axis).field)
        if axis not in self.axes:
            return [size]
        return [size] + [n for n in range((size - 1) // step * step, 0, -step) if n >= ceil(size * self.least[axis])]

    def step(self, axis: str) -> int:
        """The step of an axis, divisibility by ranks included."""
        ranks = {"ffn": 1 if self.prune_type == "unbalance" else self.layout.tensor, "layer": self.layout.pipeline}
        return lcm(axis_step(axis, getattr(self.config, AXES.get(axis).field), self.steps), ranks.get(axis, 1))

    def pairs(self) -> list[tuple[int, int]]:
        """(query heads, KV groups), by attention's size, descending: whole groups, and the same heads of each."""
        old, pairs = self.config, []
        per_group = range(1, old.heads_per_group + 1) if "head" in self.axes else [old.heads_per_group]
        groups = self.sizes("kv_head", self.step("kv_head"))
        for kept, each in product(groups, per_group):
            heads = kept * each
            whole = heads == old.units("head") or heads % self.step("head") == 0
            if whole and each >= ceil(old.heads_per_group * self.least["head"]):
                pairs.append((heads, kept))
        return sorted(pairs, key=lambda pair: (sum(pair), pair), reverse=True)

    def hidden_sizes(self, pair: tuple[int, int]) -> list[int]:
        """Sizes of hidden that are legal with these heads (asked with the model's own layers and ffn)."""
        base, step = replace(self.config, num_attention_heads=pair[0], num_query_groups=pair[1]), self.step("hidden")
        if not self.shared(base):  # no size of hidden mends heads that do not divide
            return []
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
                base = replace(base.of_layers(range(count)), hidden_size=size)
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
        fixed: as for :func:`check_budget`.
        axes: those that may be cut.

    Raises:
        InputError: as :func:`check_budget`; if layers differ, or no shape meets the budget (naming the smallest).
    """
    if not axes or set(axes) - set(VARIED):
        raise InputError("axes to cut", got=", ".join(axes) or "none", needed="some of " + ", ".join(VARIED))
    limit = check_budget(config, budget, multiple_of=multiple_of, layout=layout, fixed=fixed or {})
    for field in (AXES.get(axis).field for axis in VARIED):
        config.uniform(field)
    shared = dict(config=config, axes=tuple(axes), steps=multiple_of, layout=layout, prune_type=prune_type, legal=legal)
    for least in (LEAST, dict.fromkeys(VARIED, 0.0)):
        grid = _Grid(**shared, least=least)
        columns = grid.columns()
        found = [_first(grid, column, column.first_within(budget, limit)) for column in columns]
        if shapes := _undominated([shape for shape in found if shape is not None]):
            return sorted(shapes, key=lambda shape: (parameters(shape), _sizes(shape)), reverse=True)
    raise _nothing_meets(budget, limit, grid, columns)


def uniform_shapes(bounds: Bounds, *, fixed: dict[str, Any] | None = None, axes: tuple[str, ...] = VARIED) -> list[ModelConfig]:
    """:func:`candidates` within bounds.

    Raises:
        InputError: as these; if the model's class cannot say the model itself, or it cannot be served as asked for, that.
    """

    def legal(shape: ModelConfig) -> bool:
        try:
            bounds.check(shape)
        except InputError:
            return False
        return not bounds.unserved(shape)

    kept = {name: getattr(bounds, name) for name in ("multiple_of", "layout", "prune_type")}
    try:
        return candidates(bounds.config, bounds.budget, **kept, legal=legal, fixed=fixed, axes=axes)
    except InputError:
        bounds.check(bounds.config)  # a class that cannot say the model itself is why there is no shape
        if problems := bounds.unserved(bounds.config):
            got, do = f"a model of which --serve cannot have: {'; '.join(problems)}", "allow more, or ask less of --serve"
            raise InputError("no shape within the budget can be served as asked for", got=got, do=do) from None
        raise


def check_budget(
    config: ModelConfig, budget: Budget, *, multiple_of: dict[str, int], layout: ParallelLayout, fixed: dict[str, Any]
) -> int:
    """The most that a smaller ``config`` may cost, in the budget's unit.

    Args:
        fixed: sizes that were named exactly, by option: none may be, beside a budget (``None`` values are not named).

    Raises:
        InputError: if a budget and exact sizes are both given, a step fits no size, or the model meets the budget already.
    """
    if named := [flag(name) for name, value in fixed.items() if value is not None]:
        raise InputError(f"a budget and {', '.join(named)} both say what stays", do="give one of the two")
    raise_all(InputError, "--multiple-of", step_problems(multiple_of, config))
    layout.check(config)
    limit = budget.limit(config)
    if budget.cost(config) <= limit:
        raise InputError(
            "nothing to prune: the model meets the budget as it is",
            got=budget.describe(limit),
            needed=f"less than the model's {budget.describe(budget.cost(config))}",
        )
    return limit


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
