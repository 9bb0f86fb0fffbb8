"""Whether a plan fits a model."""

from __future__ import annotations

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import layer_axes
from megatron_prune.errors import PlanError, raise_all
from megatron_prune.planning.plan import ALL, LayerPlan, Plan, shape_of


def check_plan(plan: Plan, config: ModelConfig, where: object) -> None:
    """Refuse a plan that does not fit a model of shape ``config``.

    Raises:
        PlanError: naming everything that does not fit.
    """
    problems = []
    for name, value in shape_of(config).items():
        if plan.old.get(name) != value:
            problems.append(f"it was made for {name} {plan.old.get(name)}, the checkpoint has {value}")
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    new = plan.new
    if new["kv_channels"] != config.kv_channels:
        problems.append("kv_channels cannot change")
    problems += _vocab_problems(plan, config)
    if plan.untied and not config.tie_embeddings:
        problems.append("it makes the head a matrix of its own, which it is already")
    if plan.rotated and not 0 < new["hidden_size"] < config.hidden_size:
        problems.append(f"it rotates the stream and keeps {new['hidden_size']} channels of {config.hidden_size}")
    if not plan.rotated:
        problems += _unit_problems("hidden", plan.hidden, config.hidden_size, new["hidden_size"])
    numbers = [entry.layer for entry in plan.layers]
    problems += _unit_problems("layers", numbers, config.num_layers, new["num_layers"])
    if not numbers:
        problems.append("no layer stays")
    if numbers != sorted(numbers):
        problems.append("layers must stand in ascending order")
    for name, size in new.items():
        if isinstance(size, list) and len(size) != len(numbers):
            problems.append(f"{name}: sizes of {len(size)} layers, and {len(numbers)} layers that stay")
    for number, entry in enumerate(plan.layers):
        if not 0 <= entry.layer < config.num_layers:
            continue
        old, sizes = config.of_layer(entry.layer), {axis: plan.size(axis, number) for axis in layer_axes()}
        for axis in layer_axes():
            problems += _unit_problems(f"layer {entry.layer}: {axis}", entry.units(axis), old.units(axis), sizes[axis])
        problems += _head_problems(entry, old, sizes)
        problems += _shard_problems(entry, sizes)
        if not any(sizes.values()):
            problems.append(f"layer {entry.layer}: neither its attention nor its mlp stays; leave the layer out")
    for kind in map(BLOCKS.get, config.blocks):
        if plan.layers and not any(plan.size(kind.axes[0], number) for number in range(len(plan.layers))):
            problems.append(f"no layer keeps its {kind.half}")
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    plan.new_config(config)


def kept_tokens(plan: Plan, config: ModelConfig, where: object) -> list[int]:
    """The vocabulary of a plan, for any model with as many tokens as the one that it was made for.

    Raises:
        PlanError: if it does not fit the model, or keeps them all.
    """
    if plan.vocab is None:
        raise PlanError(f"{where} keeps the whole vocabulary", do="make one with megatron-prune vocab select")
    problems = []
    if plan.old["vocab_size"] != config.vocab_size:
        problems.append(f"it was made for vocab_size {plan.old['vocab_size']}, the checkpoint has {config.vocab_size}")
    problems += _vocab_problems(plan, config)
    raise_all(PlanError, f"{where} does not fit the checkpoint", problems)
    return plan.vocab


def _vocab_problems(plan: Plan, config: ModelConfig) -> list[str]:
    ascending = plan.vocab is None or plan.vocab == sorted(plan.vocab)
    problems = _unit_problems("vocab", plan.vocab, config.vocab_size, plan.new["vocab_size"])
    return problems + ([] if ascending else ["vocab must stand in ascending order"])


def _unit_problems(what: str, units: list[int] | None, count: int, keep: int) -> list[str]:
    if units is None:
        return [] if count == keep else [f'{what}: "{ALL}" keeps {count} units, the new shape says {keep}']
    problems = []
    if len(units) != keep:
        problems.append(f"{what}: {len(units)} units, the new shape says {keep}")
    outside = [unit for unit in units if not 0 <= unit < count]
    if outside:
        problems.append(f"{what}: {outside[:5]} out of range 0 to {count - 1}")
    if len(set(units)) != len(units):
        problems.append(f"{what}: a unit stands twice")
    return problems


def _head_problems(entry: LayerPlan, config: ModelConfig, sizes: dict[str, int]) -> list[str]:
    """Args:
    config: of the layer before the cut.
    sizes: of its axes after it.
    """
    kept, kept_groups = sizes["head"], sizes["kv_head"]
    if not kept and not kept_groups:
        return []
    if not kept or not kept_groups or kept % kept_groups:
        return [f"layer {entry.layer}: {kept} heads do not divide over {kept_groups} KV groups"]
    per_group = kept // kept_groups
    heads = entry.head if entry.head is not None else list(range(config.units("head")))
    groups = entry.kv_head if entry.kv_head is not None else list(range(config.units("kv_head")))
    expected = [group for group in groups for _ in range(per_group)]
    if [head // config.heads_per_group for head in heads] != expected:
        return [f"layer {entry.layer}: head must list {per_group} query heads of each KV group in kv_head, in that order"]
    return []


def _shard_problems(entry: LayerPlan, sizes: dict[str, int]) -> list[str]:
    problems = []
    for axis, counts in entry.shards.items():
        if axis not in ("ffn", "kv_head"):
            problems.append(f"layer {entry.layer}: shards of {axis}: only ffn and kv_head have shards")
        elif min(counts, default=-1) < 0 or sum(counts) != sizes[axis]:
            problems.append(f"layer {entry.layer}: shards of {axis} {counts} do not add up to {sizes[axis]}")
    return problems
