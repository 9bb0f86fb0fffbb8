"""What a chat template says by itself: its literals, and what it makes of a short talk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator

from typing_extensions import TypedDict

from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import read_json, read_text
from megatron_prune.runtime.chat_template import LimitError, TemplateError, TemplateProcess

ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer", "model")
"""Words that templates put before what is said; they come from the caller and are no literals."""

_TALKS = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
)

SECONDS, BYTES, CHARACTERS = 5, 1 << 28, 1 << 20
"""Processor time and memory that one answer of a template may take; length of a text."""


class _Named(TypedDict):
    __pydantic_config__ = {"extra": "ignore"}
    template: str


class _Holder(TypedDict, total=False):
    __pydantic_config__ = {"extra": "ignore"}
    chat_template: str | list[_Named] | None


def chat_templates(folder: Path) -> list[tuple[Path, str]]:
    """(file, text) of all templates of a directory.

    Raises:
        CheckpointError: if a file that may hold one cannot be read.
    """
    found: list[tuple[Path, str]] = []
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            held = read_json(folder / name, _Holder).get("chat_template") or []
            found += [(folder / name, text) for text in ([held] if isinstance(held, str) else [e["template"] for e in held])]
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    return found + [(file, read_text(file)) for file in files if file.is_file()]


def template_texts(folder: Path, special: dict[str, Any]) -> list[str]:
    """Texts whose tokens a trimmed vocabulary keeps: literals of the templates, words for roles, and rendered talks.

    Args:
        special: what templates know of the tokenizer (``bos_token`` …).

    Raises:
        CheckpointError: if a template takes more than :data:`SECONDS` or :data:`BYTES`, naming its file.
    """
    templates = chat_templates(folder)
    if not templates:
        return []
    texts = [form for role in ROLES for form in (role, f" {role}", f"\n{role}\n")]
    process = TemplateProcess(seconds=SECONDS, memory=BYTES)
    do = "correct the template, or remove it: tokens that only it needs may then go"
    for file, template in templates:
        try:
            texts += _texts(process, template, special)
        except LimitError as error:
            if str(error) == "time":
                needed = f"{SECONDS} seconds at most"
                raise CheckpointError(f"the chat template in {file} does not end", needed=needed, do=do) from None
            raise CheckpointError(f"the chat template in {file} goes beyond all limits", got=f"too much {error}", do=do) from None
    return [text for text in texts if text]


def _texts(process: TemplateProcess, template: str, special: dict[str, Any]) -> Iterator[str]:
    """A template's literals, and what it makes of talks, with and without a prompt for the next answer."""
    with contextlib.suppress(TemplateError):  # of another dialect: what it renders to is all that is known
        yield from process.literals(template)
    for talk in _TALKS:
        for prompt in (False, True):
            with contextlib.suppress(TemplateError):
                text, _ = process.render(template, talk, special, prompt=prompt)
                if len(text) > CHARACTERS:
                    raise LimitError("memory")
                yield text
