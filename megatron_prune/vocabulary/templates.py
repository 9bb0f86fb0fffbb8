"""What a chat template says by itself: its literals, and what it makes of a short talk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

from megatron_prune.errors import CheckpointError

ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer", "model")
"""Words that templates put before what is said; they come from the caller and are no literals."""

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag: it marks what to train on and says nothing."""

_TALKS = (
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}],
)


def chat_templates(folder: Path) -> list[str]:
    """The texts of all templates of a directory.

    Raises:
        CheckpointError: if a file that may hold one cannot be read.
    """
    found = []
    try:
        for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
            if (folder / name).is_file():
                held = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template") or []
                found += [held] if isinstance(held, str) else [entry["template"] for entry in held]
        files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
        return found + [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the chat template in {folder} cannot be read", got=repr(error)) from None


def template_texts(folder: Path, special: dict[str, Any]) -> list[str]:
    """Texts whose tokens a trimmed vocabulary keeps: literals of the templates, words for roles, and rendered talks.

    Args:
        special: what templates know of the tokenizer (``bos_token`` …).
    """
    templates = chat_templates(folder)
    if not templates:
        return []
    texts = [form for role in ROLES for form in (role, f" {role}", f"\n{role}\n")]
    for template in templates:
        texts += [*_literals(template), *_rendered(template, special)]
    return [text for text in texts if text]


def _literals(template: str) -> Iterator[str]:
    from jinja2 import Environment, TemplateError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateError:
        return  # of another dialect: what it renders to is all that is known
    yield from (node.data for node in tree.find_all(nodes.TemplateData))
    yield from (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))


def _rendered(template: str, special: dict[str, Any]) -> Iterator[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    for talk in _TALKS:
        for prompt in (False, True):
            try:
                texts, _ = render_jinja_template(
                    conversations=[talk], chat_template=template, add_generation_prompt=prompt, **special
                )
            except Exception:  # a template refuses what it is not made for, by any exception
                continue
            yield from texts
