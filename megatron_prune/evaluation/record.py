"""What ``evaluate --output`` wrote, as a step of a model's recipe; and what a recipe says of perplexities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import InputError
from megatron_prune.files.documents import read_json

EVALUATED = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The part of the file that a recipe keeps.

    Attributes:
        content_id: of the model that was measured; ``None`` of a checkpoint that has none.
    """

    __pydantic_config__ = {"extra": "ignore", "allow_inf_nan": False}

    content_id: str | None = None
    perplexity: float
    text: str
    windows: int
    seq_length: int
    dtype: str


def read_evaluations(files: tuple[str, ...], models: dict[str | None, str]) -> list[dict[str, Any]]:
    """Entries of a recipe.

    Args:
        models: content id → what it is, of the models that may have been measured.

    Raises:
        InputError: if a file is no such one, or of another model.
    """
    found = []
    for file in files:
        held = read_json(Path(file), Evaluation, error=InputError, do="write it with megatron-prune evaluate --output")
        if held.content_id is None or held.content_id not in models:
            known = [f"{text} ({content_id})" for content_id, text in models.items() if content_id]
            raise InputError(
                f"--evaluations {file} is of another model",
                got=f"content_id {held.content_id}",
                needed=" or ".join(known) or "a model whose content id is known",
                do="measure with megatron-prune evaluate --output, or leave it out",
            )
        found.append({"step": EVALUATED, **asdict(held)})
    return found


def evaluations_of(recipe: list[dict[str, Any]], *, before: str | None, after: str | None) -> dict[str, tuple[str, str]]:
    """Text and windows → perplexity before and after, in words, the last measured; of models with these content ids alone."""
    found: dict[str, list[str]] = {}
    for entry in recipe:
        content_id, value = entry.get("content_id"), entry.get("perplexity")
        if entry["step"] == EVALUATED and content_id and content_id in (before, after) and isinstance(value, float):
            text = f"{Path(str(entry.get('text'))).name}, {entry.get('windows')} windows of {entry.get('seq_length')} tokens"
            pair = found.setdefault(text, ["not measured", "not measured"])
            pair[int(content_id == after)] = f"{value:.4g}"
    return {text: (one, other) for text, (one, other) in found.items()}
