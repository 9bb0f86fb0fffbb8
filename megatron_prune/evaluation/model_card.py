"""``README.md`` of an exported model: its shape, and the recipe that made it."""

from __future__ import annotations

import json
from typing import Any

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig
from megatron_prune.arch.tensors import parameter_count


def model_card(config: ModelConfig, recipe: list[dict[str, Any]], *, name: str, family: str, code: bool = False) -> str:
    """The card's text.

    Args:
        recipe: the manifest's entries, oldest first.
        name: what to call the model.
        family: its Hugging Face ``model_type``.
        code: whether a file of code lies beside it, without which transformers cannot load it.
    """
    lines = ["---", "library_name: transformers", "tags: [pruned, megatron-prune]", "---", "", f"# {name}", ""]
    lines += [f"A {family} model of {parameter_count(config):,} parameters, pruned with megatron-prune.", ""]
    if code:
        lines += ["Its layers differ, which no class of transformers can say: load it with `trust_remote_code=True`.", ""]
    lines += ["| size | |", "|---|---|"]
    for field in SHAPE_FIELDS:
        sizes = config.each(field)
        lines.append(f"| {field} | {sizes[0] if len(sizes) == 1 else ', '.join(map(str, sizes))} |")
    lines += ["", "## Recipe", ""]
    for number, entry in enumerate(recipe, 1):
        rest = {key: value for key, value in entry.items() if key != "step"}
        lines.append(f"{number}. **{entry['step']}** `{json.dumps(rest)}`")
    return "\n".join(lines) + "\n"
