"""Talk → text, by the tokenizer's own chat template, in a process of its own: a template is a program of whoever made it.

transformers' sandbox keeps it from everything but its input. What it may take of time and memory is limited here: the process
is ended where it takes more.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from multiprocessing.connection import Connection
from typing import Any

from megatron_prune.calibration.talks import Messages, Span, TemplateError, answer_spans, check_said
from megatron_prune.calibration.workers import end_with_parent, processes
from megatron_prune.errors import InputError, PruneError

_SECONDS = 60.0
"""That one talk may take, on a machine with much else to do."""

_START_SECONDS = 600.0
_MEMORY = 2 << 30
"""Bytes that a template may take beyond what the process has at its start."""

_LONGEST = 1 << 26
"""Characters of a talk."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: of Hugging Face.
        name: of it, for messages.
        answers: whether to tell which characters are the assistant's.
    """

    def __init__(self, tokenizer: Any, name: str, *, answers: bool):
        self._tokenizer, self._name, self._answers = tokenizer, name, answers
        self._process = self._pipe = None

    def render(self, messages: Messages, tools: list | None, where: str) -> tuple[str, list[Span]]:
        """A talk as text, and which characters of it are the assistant's (none if that was not asked for).

        Raises:
            InputError: naming the record, if there is no template, it refuses the talk, or it does not end.
        """
        template = self._template(tools, where)
        if self._pipe is None:
            self._start()
        try:
            self._pipe.send((template, messages, tools))
        except RecursionError:
            raise InputError(f"{where} is nested too deeply") from None
        answer = self._receive(_SECONDS)
        if answer is None:
            raise InputError(
                f"{where}: the chat template of {self._name} did not end",
                needed=f"an answer within {_SECONDS:.0f} s and {_MEMORY >> 30} GiB",
                do="mend the template (chat_template.jinja, or chat_template in tokenizer_config.json)",
            )
        problem, text, spans = answer
        if problem is not None:
            raise InputError(f"{where}: the chat template of {self._name} does not do", got=problem)
        return text, spans

    def _template(self, tools: list | None, where: str) -> str:
        try:
            return self._tokenizer.get_chat_template(None, tools)
        except (ValueError, AttributeError):  # there is none, or several and none of them is the default
            raise InputError(
                f"{where} is a talk, and the tokenizer {self._name} has no chat template for it",
                do="put the model's chat_template.jinja into the tokenizer's directory, or give text",
            ) from None

    def _start(self) -> None:
        context = processes()
        self._pipe, theirs = context.Pipe()
        given = (theirs, dict(self._tokenizer.special_tokens_map), self._answers)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()
        if self._receive(_START_SECONDS) is None:
            raise PruneError(
                "the process that fills in chat templates did not start\n  what to do: see whether there is memory for it"
            )

    def _receive(self, seconds: float) -> Any:
        """What the process says; ``None``, and no process, if it says nothing in time or is gone."""
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            pass
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None
        return None


def _serve(pipe: Connection, special: dict[str, Any], answers: bool) -> None:
    """The process: talks in, texts out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    pipe.send("ready")
    _limit_memory()
    while True:
        try:
            template, messages, tools = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            reply = (None, *_rendered(template, messages, tools, special, answers))
        except Exception as error:  # a template refuses what it is not made for, by any exception
            reply = (str(error).split("\n")[0][:500] or type(error).__name__, "", [])
        pipe.send(reply)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: the time is limited all the same
        return
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))


def _rendered(
    template: str, messages: Messages, tools: list | None, special: dict[str, Any], answers: bool
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = answers and _GENERATION.search(template) is not None

    def render(some: Messages, prompt: bool, mark: bool = False) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            conversations=[some],
            tools=tools,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=mark,
            **special,
        )
        return texts[0], spans[0] if mark else []

    text, spans = render(messages, False, marked)
    if not 0 < len(text) <= _LONGEST:
        raise TemplateError(f"it makes {len(text)} characters of this talk; 1 to {_LONGEST} are taken")
    check_said(messages, text)
    if answers and not marked:
        spans = answer_spans(lambda some, prompt: render(some, prompt)[0], messages, text)
    return text, spans
