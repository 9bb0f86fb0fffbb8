"""Talks (``messages`` of roles and contents, as chat models are trained on): which records hold one, and where answers stand.

What a talk looks like as text is for the tokenizer's own template to say (``template.py``).
"""

from __future__ import annotations

import os
from typing import Any, Callable, Mapping

from megatron_prune.errors import InputError
from megatron_prune.files.documents import shorten
from megatron_prune.runtime.chat_template import Span, TemplateError

FIELDS = ("messages", "conversations")
"""Where a record keeps a talk, if nothing else is said."""

BESIDE = ("tools", "system")
"""What else of a record belongs to it."""

ASSISTANT = "assistant"

_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT, "bing": ASSISTANT, "observation": "tool"}
"""ShareGPT's words; what is not here is said as it is."""

Messages = list[dict[str, Any]]


def find_talk(fields: Mapping[str, Any], key: str) -> list | None:
    """The talk of a record: what stands under ``key``, if that is a list, else, where nothing does, in a usual place."""
    if key in fields:
        found = fields[key]
        return found if isinstance(found, list) and found and all(isinstance(each, dict) for each in found) else None
    return next((fields[name] for name in FIELDS if isinstance(fields.get(name), list)), None)


def read_talk(found: list, fields: Mapping[str, Any], where: str) -> tuple[Messages, list | None]:
    """A talk as templates take it, and the tools that it may use.

    Args:
        found: messages ``{"role": …, "content": …}``, or ShareGPT's ``{"from": …, "value": …}``.

    Raises:
        InputError: naming the message that is not one.
    """
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(found, 1)]
    if not messages:
        raise InputError(f"{where} holds a talk without messages", needed="at least one")
    system, tools = fields.get("system"), fields.get("tools")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: tools", got=shorten(tools), needed="a list of descriptions in JSON schema")
    return messages, tools or None


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(where, got=shorten(message), needed='{"role": …, "content": …}')
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
        message["role"] = _ROLES.get(message["role"], message["role"]) if isinstance(message["role"], str) else None
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}: role", got=shorten(role), needed="a word, such as user")
    if isinstance(content, list):
        message = {**message, "content": _joined(content, where)}
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f"{where}: content", got=shorten(content), needed="text")
    return {name: value for name, value in message.items() if value is not None}  # as transformers does


def _joined(parts: list, where: str) -> str:
    """The text of a content in parts."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise InputError(f"{where}: content", got=shorten(part), needed="parts of text")
    return "".join(part["text"] for part in parts)


def check_said(messages: Messages, text: str) -> None:
    """See that a rendered talk says all that was said; of an answer, what follows its reasoning.

    Raises:
        TemplateError: naming the message that was left out.
    """
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "developer", "user", ASSISTANT) and _core(message) not in text:
            raise TemplateError(f"it leaves out message {number}, of role {message['role']}")


def answer_spans(render: Callable[[Messages, bool], str], messages: Messages, text: str) -> list[Span]:
    """Which characters of a rendered talk the assistant says, the end of its turn with them.

    An answer is what the template puts between the talk before it, with the beginning of a turn of the assistant, and the
    next turn. Space behind the end of a turn does not count: no model is asked for it.

    Args:
        render: messages, whether the beginning of an answer follows → text.
        text: all messages rendered.

    Raises:
        TemplateError: if that cannot be told: the template says things otherwise when more follows.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            start, end = _span(render, messages[: number + 1], text)
            spans.append((start, max(start, len(text[:end].rstrip()))))
    return spans


def _span(render: Callable[[Messages, bool], str], messages: Messages, text: str) -> Span:
    """Of the last message."""
    before, after = render(messages[:-1], True), render(messages, False)
    if after.startswith(before) and text.startswith(after):
        return len(before), len(after)
    base, said = render(messages[:-1], False), _core(messages[-1])
    place = after.rfind(said)
    if said and place >= len(base) and after.startswith(base):
        tail = after[place + len(said) :]
        prompt = before.removeprefix(base)
        for header in (prompt, after[len(base) : place], os.path.commonprefix([prompt, text[len(base) :]])):
            if text.startswith(base + header + said + tail):
                return len(base + header), len(base + header + said + tail)
    raise TemplateError(
        f"it says message {len(messages)} otherwise when more follows, so where that answer stands cannot be told; "
        "mark answers in it with {% generation %} … {% endgeneration %}"
    )


def _core(message: dict[str, Any]) -> str:
    """What every template says of a message: some leave out space around it, and reasoning before an answer."""
    content = message.get("content") or ""
    return (content.rsplit("</think>", 1)[-1] if message["role"] == ASSISTANT else content).strip()
