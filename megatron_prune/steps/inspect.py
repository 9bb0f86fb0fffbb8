"""What a checkpoint is: shape, parallel layout, parameters, bytes, dtype, recipe, read from headers; and, if asked for, which
weights are not sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table
from rich.text import Text

from megatron_prune.arch.model import FIELDS
from megatron_prune.checkpoint import model_folder
from megatron_prune.errors import InputError, plain
from megatron_prune.opening.facts import describe, describe_config
from megatron_prune.opening.foreign import told
from megatron_prune.runtime.reporting import print_table
from megatron_prune.runtime.world import World
from megatron_prune.serving.runtime import RUNTIMES
from megatron_prune.verbs.inspect import InspectOptions

if TYPE_CHECKING:  # torch, which a configuration alone need not wait for
    from megatron_prune.checkpoint.stream import StreamReport
    from megatron_prune.checkpoint.tensor_map import TensorMap


def inspect(options: InspectOptions, world: World) -> int:
    """Run the step.

    Returns:
        1 if weights or files are not those that were written, else 0.

    Raises:
        CheckpointError: if it is not a whole checkpoint of a kind this project knows.
    """
    facts = _facts(options, world)
    differs = bool(facts.get("changed_weights") or facts.get("changed_files"))
    if not world.is_main:
        return int(differs)
    if options.json:
        print(json.dumps(facts, indent=2))
        return int(differs)
    table = Table(show_header=False, title=Text(options.load))  # no markup: names may hold brackets
    for key, value in facts.items():
        if key == "recipe":
            value = ", ".join(entry["step"] for entry in value) or "-"
        elif key == "serving":
            value = "\n".join(f"{RUNTIMES.get(name).title}: {said}" for name, said in value.items())
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif key == "layers":
            value = _picture(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {amount}" for name, amount in value.items()) or "none"
        elif isinstance(value, int):
            value = f"{value:,}"
        elif value is None:
            value = "none"
        table.add_row(key.replace("_", " "), Text(plain(value)))
    print_table(table)
    if facts.get("recipe"):
        print(recipe_text(facts["recipe"]))
    return int(differs)


def _facts(options: InspectOptions, world: World) -> dict[str, Any]:
    path = Path(options.load)
    if path.is_file() or model_folder.is_huggingface(path) and not _holds_weights(path):
        if options.weights:
            raise InputError(f"--weights: {path} holds none", needed="a model", do="leave it out")
        return describe_config(model_folder.read_config(path))

    from megatron_prune.opening.opened import open_either
    from megatron_prune.opening.source import observe

    model = open_either(options.load, world, told(options))
    facts = describe(model)
    if options.weights:
        report = observe(world, model.source(), None, label="reading")
        facts["unsound_weights"] = dict(sorted(report.troubled.items()))
        facts |= compare(report, model.tensors)
    return facts


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json") for path in folder.iterdir())


def compare(report: StreamReport, tensors: TensorMap) -> dict[str, Any]:
    """What weights were compared with, and which are not those that were written."""
    from megatron_prune.checkpoint.stream import content_id

    if tensors.expected:
        return {"compared_with": "the digest of every tensor", "changed_weights": dict(sorted(report.damaged.items()))}
    if tensors.content_id is None:
        return {"compared_with": "nothing: no digests are kept"}
    found = content_id(report.digests)
    changed = {} if found == tensors.content_id else {"content_id": f"{found}; which tensor cannot be told"}
    return {"compared_with": "the content id", "changed_weights": changed}


def recipe_text(recipe: list[dict[str, Any]]) -> str:
    """The steps that made a model as YAML, oldest first, each with its name first and with the sizes that it changed as ``old → new``."""
    steps = []
    for entry in json.loads(json.dumps(recipe)):  # nothing in it is one object twice
        old, new = entry.pop("old", {}), entry.pop("new", {})
        changed = {key: f"{_short(old.get(key))} → {_short(size)}" for key, size in new.items() if old.get(key) != size}
        steps.append({"step": entry["step"], **entry, **({"sizes": changed} if changed else {})})
    text = yaml.safe_dump({"recipe": steps}, sort_keys=False, allow_unicode=True, width=130, default_flow_style=None)
    return plain(text, 1 << 20).rstrip()


def _short(size: int | list[int] | None) -> str:
    return f"{min(size)} to {max(size)} by layer" if isinstance(size, list) and size else str(size)


def _picture(layers: dict[str, list[int]]) -> str:
    """A line for each layer: what it has of every size that differs, and a bar of it."""
    most, names = {name: max(sizes) for name, sizes in layers.items()}, {field: axis for axis, field in FIELDS.items()}
    lines = ["layer " + " ".join(f"{names[field]:>6}{'':{_BAR + 1}}" for field in layers)]
    for layer in range(len(next(iter(layers.values())))):
        parts = []
        for name, sizes in layers.items():
            bar = "█" * round(_BAR * sizes[layer] / most[name])
            parts.append(f"{sizes[layer] or '-':>6} {bar:<{_BAR}}")
        lines.append(f"{layer:>5} " + " ".join(parts).rstrip())
    return "\n".join(lines)


_BAR = 7
"""Characters of the bar of the largest size."""
