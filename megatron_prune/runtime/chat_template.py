"""Chat templates, which are programs of strangers, rendered in a process of their own: transformers' sandbox keeps them from
everything but their input, and limits are set here to what they may take of time and memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_prune.errors import PruneError
from megatron_prune.runtime import rendering

Span = tuple[int, int]
"""Characters from … to of a text."""

_PATIENCE = 600.0
"""Seconds that the process may take to start or to answer, on a machine that is busy with others."""


class TemplateError(Exception):
    """A template does not do for a talk."""


class LimitError(Exception):
    """A template takes too much time, memory, depth or size of numbers, which the message names."""


class TemplateProcess:
    """The process, started when it is first needed, and anew after a template that broke a limit.

    Args:
        seconds: of processor time that one answer may take.
        memory: bytes beyond those that the process has at its start.
    """

    def __init__(self, *, seconds: int, memory: int):
        self._limits = (str(seconds), str(memory))
        self._pipe: Connection | None = None

    def render(
        self,
        template: str,
        messages: list[dict[str, Any]],
        special: dict[str, Any],
        *,
        tools: list | None = None,
        prompt: bool = False,
        mark: bool = False,
    ) -> tuple[str, list[Span]]:
        """A talk as text, and which characters are the assistant's where the template marks them.

        Args:
            special: what templates know of the tokenizer (``bos_token`` …).
            tools: that the talk may use.
            prompt: whether the beginning of an answer follows.
            mark: whether to tell what is marked.

        Raises:
            TemplateError: if the template, or its author, refuses the talk.
            LimitError: if a limit is broken.
            RecursionError: if the talk is nested too deeply to be handed over.
        """
        text, spans = self._ask("render", template, messages, special, tools, prompt, mark)
        return text, [(start, end) for start, end in spans]

    def literals(self, template: str) -> list[str]:
        """What a template says by itself.

        Raises:
            TemplateError: if it is none.
            LimitError: if a limit is broken.
        """
        return self._ask("literals", template)

    def _ask(self, name: str, *given: Any) -> Any:
        if self._pipe is None:
            self._start()
        answer = self._exchange((name, given))
        if answer is None:
            raise LimitError("time")
        if "broke" in answer:
            raise LimitError(answer["broke"])
        if "refused" in answer:
            raise TemplateError(answer["refused"])
        return answer["said"]

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-m", rendering.__name__, str(theirs.fileno()), *self._limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            cwd="/",  # Python looks for modules where it is started
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, process, self._pipe)
        if self._exchange(None) is None:
            raise PruneError("the process that renders chat templates did not start")

    def _exchange(self, request: tuple[str, tuple] | None) -> Any:
        """What the process says; ``None``, and no process, if it says nothing in time or is gone."""
        try:
            if request is not None:
                self._pipe.send(request)
            if self._pipe.poll(_PATIENCE):
                return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            pass
        self._pipe = None
        self._end()
        return None


def _end(process: subprocess.Popen, pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.wait()
