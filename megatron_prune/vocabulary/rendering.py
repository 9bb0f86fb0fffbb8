"""A process that renders chat templates, which are programs of strangers: sandboxed, and within limits of time and memory.

    python -m megatron_prune.vocabulary.rendering < request.json > texts.json

The request names ``templates``, ``talks``, ``special`` tokens and ``seconds`` of processor time; the answer is, for each template, its ``literals``, what it
``rendered`` to, and the limit that it ``broke``, if one. Nothing but jinja2 is imported, so that it starts at once.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from typing import Any, Iterator

SECONDS, BYTES, CHARACTERS = 5, 1 << 28, 1 << 20
"""Processor time and address space of the process; length of a text."""

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag: it marks what to train on and says nothing."""


def environment() -> Any:
    """jinja2 as transformers sets it up for chat templates."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def read(template: str, talks: list[list[dict[str, str]]], special: dict[str, str]) -> dict[str, Any]:
    """What a template says by itself, and what it makes of talks, with and without a prompt for the next answer."""
    found: dict[str, Any] = {"literals": [], "rendered": [], "broke": None}
    try:
        source = _GENERATION.sub("", template)
        found["literals"] = list(_literals(source))
        found["rendered"] = list(_rendered(source, talks, special))
    except (MemoryError, RecursionError, OverflowError) as error:
        found["broke"] = {"MemoryError": "memory", "RecursionError": "depth"}.get(type(error).__name__, "size of numbers")
    return found


def _literals(source: str) -> Iterator[str]:
    from jinja2 import TemplateError, nodes

    try:
        tree = environment().parse(source)
    except TemplateError:
        return  # of another dialect: what it renders to is all that is known
    yield from (node.data for node in tree.find_all(nodes.TemplateData))
    yield from (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))


def _rendered(source: str, talks: list[list[dict[str, str]]], special: dict[str, str]) -> Iterator[str]:
    for talk in talks:
        for prompt in (False, True):
            given = {"messages": talk, "tools": None, "documents": None, "add_generation_prompt": prompt, **special}
            try:
                text = _joined(environment().from_string(source).generate(given))
            except (MemoryError, RecursionError, OverflowError):
                raise
            except Exception as error:  # a template refuses what it is not made for, by any exception
                if "integer string conversion" in str(error):  # a number of thousands of digits
                    raise OverflowError from None
                continue
            yield text


def _joined(pieces: Iterator[str]) -> str:
    text, length = [], 0
    for piece in pieces:
        text.append(piece)
        length += len(piece)
        if length > CHARACTERS:
            raise MemoryError
    return "".join(text)


def _limit(seconds: int) -> None:
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # already lower, or unknown to this system
            pass


if __name__ == "__main__":
    request = json.load(sys.stdin)
    _limit(request["seconds"])
    for template in request["templates"]:
        print(json.dumps(read(template, request["talks"], request["special"])), flush=True)
