"""What a chat template says by itself: its literals, and what it makes of a short talk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from megatron_prune.errors import CheckpointError
from megatron_prune.files.documents import parse_json, read_json, read_text
from megatron_prune.vocabulary import rendering

ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer", "model")
"""Words that templates put before what is said; they come from the caller and are no literals."""

_TALKS = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
)

_WAIT = 120
"""Seconds for the process of :mod:`rendering`, on a machine that is busy with others; it has five of its own."""


class _Named(TypedDict):
    __pydantic_config__ = {"extra": "ignore"}
    template: str


class _Holder(TypedDict, total=False):
    __pydantic_config__ = {"extra": "ignore"}
    chat_template: str | list[_Named] | None


class _Answer(TypedDict):
    literals: list[str]
    rendered: list[str]
    broke: str | None


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
        CheckpointError: if a template does not end within the limits of :mod:`rendering`, naming its file.
    """
    templates = chat_templates(folder)
    if not templates:
        return []
    texts = [form for role in ROLES for form in (role, f" {role}", f"\n{role}\n")]
    for file, template in templates:
        answer = _read(file, template, special)
        texts += [*answer["literals"], *answer["rendered"]]
    return [text for text in texts if text]


def _read(file: Path, template: str, special: dict[str, Any]) -> _Answer:
    """A template's texts, worked out in a process of its own."""
    do = "correct the template, or remove it: tokens that only it needs may then go"
    request = {"templates": [template], "talks": _TALKS, "special": special, "seconds": rendering.SECONDS}
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", rendering.__name__],
            input=json.dumps(request).encode(),
            capture_output=True,
            cwd="/",  # Python looks for modules where it is started
            env={**os.environ, "PYTHONPATH": paths},
            timeout=_WAIT,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode < 0:
        raise CheckpointError(f"the chat template in {file} does not end", needed=f"{rendering.SECONDS} seconds at most", do=do)
    if done.returncode:
        raise CheckpointError(f"the chat template in {file} cannot be rendered", got="a process that failed", do=do)
    answer = parse_json(done.stdout, _Answer, f"what the chat template in {file} makes")
    if answer["broke"]:
        raise CheckpointError(f"the chat template in {file} goes beyond all limits", got=f"too much {answer['broke']}", do=do)
    return answer
