"""Talk → text, by the tokenizer's own chat template."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Iterator

from megatron_prune.errors import InputError
from megatron_prune.runtime.chat_template import LimitError, Span, TemplateError, TemplateProcess
from megatron_prune.text.talks import Messages, answer_spans, check_said

SECONDS, BYTES = 60, 2 << 30
"""Processor time and memory that one rendering of a talk may take."""

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
        self._process = TemplateProcess(seconds=SECONDS, memory=BYTES)

    def render(self, messages: Messages, tools: list | None, where: str) -> tuple[str, list[Span]]:
        """A talk as text, and which characters of it are the assistant's (none if that was not asked for).

        Raises:
            InputError: naming the record, if there is no template, it refuses the talk, or it goes beyond its limits.
        """
        template = self._template(tools)
        if template is None:
            raise InputError(
                f"{where} is a talk, and the tokenizer {self._name} has no chat template for it",
                do="put the model's chat_template.jinja into the tokenizer's directory, or give text",
            )
        with self._told(where):
            return self._rendered(template, messages, tools)

    def turn(self, said: str) -> str | None:
        """A turn of a user and the beginning of the answer to it, or ``None`` where there is no template.

        Raises:
            InputError: if the template refuses such a turn, or goes beyond its limits.
        """
        template = self._template(None)
        if template is None:
            return None
        with self._told("a turn of a user"):
            messages = [{"role": "user", "content": said}]
            text = self._process.render(template, messages, dict(self._tokenizer.special_tokens_map), prompt=True)[0]
            _check(messages, text)
            return text

    @contextlib.contextmanager
    def _told(self, where: str) -> Iterator[None]:
        """What goes wrong in rendering, as a message that names the record."""
        do = "mend the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        try:
            yield
        except RecursionError:
            raise InputError(f"{where} is nested too deeply") from None
        except TemplateError as error:
            raise InputError(f"{where}: the chat template of {self._name} does not do", got=str(error)) from None
        except LimitError as error:
            got = None if str(error) == "time" else f"too much {error}"
            needed = f"an answer within {SECONDS} s and {BYTES >> 30} GiB"
            raise InputError(f"{where}: the chat template of {self._name} did not end", got=got, needed=needed, do=do) from None

    def _template(self, tools: list | None) -> str | None:
        try:
            return self._tokenizer.get_chat_template(None, tools)
        except (ValueError, AttributeError):  # there is none, or several and none of them is the default
            return None

    def _rendered(self, template: str, messages: Messages, tools: list | None) -> tuple[str, list[Span]]:
        special = dict(self._tokenizer.special_tokens_map)
        marked = self._answers and _GENERATION.search(template) is not None

        def render(some: Messages, prompt: bool, mark: bool = False) -> tuple[str, list[Span]]:
            return self._process.render(template, some, special, tools=tools, prompt=prompt, mark=mark)

        text, spans = render(messages, False, marked)
        _check(messages, text)
        if self._answers and not marked:
            spans = answer_spans(lambda some, prompt: render(some, prompt)[0], messages, text)
        return text, spans


def _check(messages: Messages, text: str) -> None:
    if not 0 < len(text) <= _LONGEST:
        raise TemplateError(f"it makes {len(text)} characters of this talk; 1 to {_LONGEST} are taken")
    check_said(messages, text)
