"""The process behind :mod:`chat_template`: it renders as transformers does, within limits.

    python -m megatron_prune.runtime.rendering PIPE SECONDS BYTES

A request is (name of a function here, its arguments), from this project's own process; an answer is JSON: what the function
``said``, why the template ``refused``, or the limit that it ``broke``. torch is not imported, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag: it marks what to train on and says nothing."""


def render(
    template: str, messages: list[dict], special: dict[str, Any], tools: list | None, prompt: bool, mark: bool
) -> tuple[str, list]:
    """A talk as text, and the characters from … to that the template marks as the assistant's."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=mark,
        **special,
    )
    return texts[0], spans[0] if mark else []


def literals(template: str) -> list[str]:
    """What a template says by itself."""
    from jinja2 import Environment, nodes

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(_GENERATION.sub("", template))
    constants = (node.value for node in tree.find_all(nodes.Const))
    return [*(node.data for node in tree.find_all(nodes.TemplateData)), *(each for each in constants if isinstance(each, str))]


def _answer(name: str, given: tuple[Any, ...]) -> bytes:
    try:
        return json.dumps({"said": {"render": render, "literals": literals}[name](*given)}).encode()
    except MemoryError:
        broke = "memory"
    except RecursionError:
        broke = "depth"
    except OverflowError:
        broke = "size of numbers"
    except Exception as error:  # a template refuses what it is not made for, by any exception
        if "integer string conversion" not in str(error):  # a number of thousands of digits
            return json.dumps({"refused": str(error).split("\n")[0][:500] or type(error).__name__}).encode()
        broke = "size of numbers"
    return json.dumps({"broke": broke}).encode()


def _limit(kind: int, amount: int) -> None:
    try:
        resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))
    except (ValueError, OSError):  # already lower, or unknown to this system
        pass


def _limit_memory(more: int) -> None:
    """Beyond what the process has at its start."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: the time is limited all the same
        return
    _limit(resource.RLIMIT_AS, held + more)


def _serve(pipe: Connection, seconds: int, memory: int) -> None:
    """Requests in, answers out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    render("{{ messages[0].content }}", [{"role": "user", "content": "a"}], {}, None, False, True)  # all that is imported, now
    _limit(resource.RLIMIT_CORE, 0)
    _limit_memory(memory)
    pipe.send_bytes(b"{}")
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            os._exit(0)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        pipe.send_bytes(_answer(name, given))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
